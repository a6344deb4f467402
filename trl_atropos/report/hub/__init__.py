"""To the Hub: which files of a run, the model card, the configuration that repeats it, and uploads that cannot end a run."""
