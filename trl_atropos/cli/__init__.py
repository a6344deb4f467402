"""The `trl-atropos` command line. Importing it loads neither torch nor vLLM."""
