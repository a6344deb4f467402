"""Environments of other ecosystems as Atropos environments: `trl-atropos env reasoning-gym:chain_sum serve ...`."""
