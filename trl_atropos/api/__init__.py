"""The trajectory API, `trl-atropos api`: atroposlib's API for environments and trainers, with everything on the disk."""
