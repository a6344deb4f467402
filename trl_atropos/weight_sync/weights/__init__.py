"""Which tensors a policy is published as: gathered over ranks, merged, named as in the checkpoint, staged."""
