"""Starts the processes of a test on several ranks, and ends them all."""

from __future__ import annotations

import base64
import io
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fork_server import ForkedProcess


TESTS = Path(__file__).parent
# A launcher that is told to stop gives its processes half a minute.
STOP_TIMEOUT_S = 60
RANKS_TIMEOUT_S = 240


def run_launcher(
    arguments: Sequence[str | Path], *, timeout_s: float, environment: Mapping[str, str], cwd: Path | None = None
) -> tuple[int, str]:
    """Run a launcher, given as arguments of Python, in a clean environment for gloo on a CPU.

    With `fork_server.PROGRAM` before the script that it is to start, its processes are forks.

    Returns:
        `tuple[int, str]`: exit status of the launcher, and what it and its processes printed.
    """
    variables = {
        # Not those of a launcher above this one.
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "OMP_NUM_THREADS": "1",
        # What the threads of a process did that a library has aborted.
        "PYTHONFAULTHANDLER": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
        **environment,
    }
    note = ""
    with tempfile.TemporaryFile() as printed:
        process = ForkedProcess(
            [sys.executable, *arguments], cwd=cwd, env=variables, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # It takes its processes with it, which a SIGKILL would leave behind.
            process.terminate()
            status = process.wait(STOP_TIMEOUT_S)
            note = f"\nStopped after {timeout_s} s."
        printed.seek(0)
        return status, printed.read().decode(errors="replace") + note


def start_call(function: Callable[..., None], *arguments: Any, **options: Any) -> ForkedProcess:
    """Call a function of a module in a process of its own. `options`: those of [`ForkedProcess`]."""
    # Where the module is found comes first.
    call = base64.b64encode(pickle.dumps(sys.path) + pickle.dumps((function, arguments))).decode()
    return ForkedProcess([sys.executable, __file__, call], **options)


def run_ranks(function: Callable[..., None], arguments: tuple[Any, ...], *, num_ranks: int) -> None:
    """Call a function of a module with its rank and these arguments, in as many processes, and fail if one fails."""
    with tempfile.TemporaryFile() as log:
        processes = [
            start_call(function, rank, *arguments, stdout=log, stderr=subprocess.STDOUT) for rank in range(num_ranks)
        ]
        deadline = time.monotonic() + RANKS_TIMEOUT_S
        statuses: list[int | None] = [None]
        while None in statuses and not any(statuses) and time.monotonic() < deadline:
            time.sleep(0.01)
            statuses = [process.poll() for process in processes]
        for process in processes:
            process.kill()
        log.seek(0)
        assert statuses == [0] * num_ranks, f"{statuses}\n{log.read().decode(errors='replace')}"


def _call(call: str) -> None:
    pickled = io.BytesIO(base64.b64decode(call))
    sys.path[:] = pickle.load(pickled)
    function, arguments = pickle.load(pickled)
    function(*arguments)


if __name__ == "__main__":
    _call(sys.argv[1])
