"""A server as `trl vllm-serve` runs by itself, compiled: what was captured in graphs has to read the weights that are published."""

from __future__ import annotations

from .bench import Bench
from .server import run_each


def run(bench: Bench) -> None:
    if not bench.is_cuda:
        bench.report(skipped="needs a GPU")
        return
    run_each(bench, {"graphs": ("trl_atropos_shm", ())})
