"""A policy that is loaded into a GPU beside the served one, and one that is loaded in the pause, in the same run."""

from __future__ import annotations

from .bench import Bench
from .server import run_each
from .serving import EAGER


def run(bench: Bench) -> None:
    if not bench.is_cuda:
        bench.report(skipped="needs a GPU; the section `server` loads beside the served policy on a CPU")
        return
    run_each(bench, {"in the pause": ("trl_atropos_shm", EAGER), "beside": ("trl_atropos_shm", EAGER)})
