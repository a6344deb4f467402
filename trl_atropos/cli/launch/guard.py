"""The parent of one launched process: when the launcher is gone or the process has ended, nothing of it stays behind.

Usage: python -m trl_atropos.cli.launch.guard COMMAND...   (started by `processes.py` only)

Standard input is a pipe whose other end only the launcher holds. It reads as closed as soon as the launcher ends, for
whatever reason, SIGKILL included. That is why a pipe, and not a message from the launcher, is what the guard waits on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import psutil


GRACE_S = 10.0
"""How long a process may take to end after SIGTERM before it gets SIGKILL."""

TRACKER_GRACE_S = 3.0
"""How long Python's resource trackers may take to remove shared memory after the processes that made it were killed."""

POLL_S = 0.1
PR_SET_CHILD_SUBREAPER = 36
COMMAND_NOT_FOUND = 127

SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"
"""Names the directory in which vLLM's processes meet at sockets, each with a UUID as its name."""

MAX_SOCKETS_PATH_BYTES = 107 - len("/01234567-89ab-cdef-0123-456789abcdef")
"""What the address of a Unix socket leaves for its directory."""


def main(command: list[str]) -> int:
    """Run `command` until it ends, until SIGTERM, or until standard input closes; then end all that it started.

    Returns its exit code: 128 + n if signal n ended it, 127 if it could not be started.
    """
    if sys.platform == "linux":
        # Orphaned descendants, also those in sessions of their own, become children of this process and are found.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stop_requests: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: stop_requests.append(received))

    with own_sockets() as variables:
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **variables})
        except OSError as exc:
            print(f"cannot start {command[0]}: {exc}", file=sys.stderr)
            return COMMAND_NOT_FOUND
        stdin = sys.stdin.fileno()
        while child.poll() is None and not stop_requests:
            readable, _, _ = select.select([stdin], [], [], POLL_S)
            if readable and not os.read(stdin, 1):
                break
        end_descendants(GRACE_S)
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def own_sockets() -> Iterator[dict[str, str]]:
    """The variable that puts vLLM's sockets into a directory that is removed in the end: a server that is killed leaves them.

    None where the user has named a directory, or where the path of a new one leaves too little for their names.
    """
    if SOCKETS_VARIABLE in os.environ:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="trl_atropos-", ignore_cleanup_errors=True) as directory:
        yield {SOCKETS_VARIABLE: directory} if len(os.fsencode(directory)) <= MAX_SOCKETS_PATH_BYTES else {}


def end_descendants(grace_s: float) -> None:
    """End every descendant and every member of this process group: SIGTERM, and SIGKILL after `grace_s` seconds."""
    for process in _living_descendants():
        _send(process, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and _living_descendants():
        time.sleep(POLL_S / 2)
    # Again until none is left: a process can start another one between the listing and its end.
    tracker_deadline = time.monotonic() + TRACKER_GRACE_S
    while remaining := _living_descendants():
        may_clean_up = time.monotonic() < tracker_deadline
        for process in remaining:
            if not (may_clean_up and _is_resource_tracker(process)):
                _send(process, signal.SIGKILL)
        time.sleep(POLL_S / 2)


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Return whether `process` removes the shared memory of Python processes that were killed, once they are gone."""
    try:
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _living_descendants() -> list[psutil.Process]:
    own_pid, own_group = os.getpid(), os.getpgrp()
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        if process.pid != own_pid and _group_of(process.pid) == own_group:
            found[process.pid] = process
    return [process for process in found.values() if _is_alive(process)]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
