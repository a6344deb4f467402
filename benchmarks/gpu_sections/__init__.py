"""The sections of `benchmarks/gpu.py`: each module has a `run(bench)`."""
