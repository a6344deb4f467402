"""Starts the processes of a test on several ranks, and ends them all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


TESTS = Path(__file__).parent
# A launcher that is told to stop gives its processes half a minute.
STOP_TIMEOUT_S = 60


def run_launcher(
    arguments: Sequence[str | Path], *, timeout_s: float, environment: Mapping[str, str], cwd: Path | None = None
) -> tuple[int, str]:
    """Run a launcher, given as arguments of Python, in a clean environment for gloo on a CPU.

    Returns:
        `tuple[int, str]`: exit status of the launcher, and what it and its processes printed.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={
            # Not those of a launcher above this one.
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
            "OMP_NUM_THREADS": "1",
            # What the threads of a process did that a library has aborted.
            "PYTHONFAULTHANDLER": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        log, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # It takes its processes with it, which a SIGKILL would leave behind.
        process.terminate()
        log, _ = process.communicate(timeout=STOP_TIMEOUT_S)
        log += f"\nStopped after {timeout_s} s."
    return process.returncode, log
