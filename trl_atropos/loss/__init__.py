"""From logprobs and advantages to one number that is exact at any split of the batch."""
