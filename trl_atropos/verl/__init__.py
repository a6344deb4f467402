"""verl's SFT trainer on rollouts of Atropos environments. `atropos_sft_trainer` is what users import."""
