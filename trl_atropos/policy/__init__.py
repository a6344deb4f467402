"""The policy as a function from token ids to logprobs: loading it, laying rollouts out, scoring their trained tokens."""
