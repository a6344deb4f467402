"""`trl-atropos launch`: API, inference server, environments and trainer as one group of processes."""
