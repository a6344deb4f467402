"""`AtroposTrainer`, its options, and what a run holds from its start to its end."""
