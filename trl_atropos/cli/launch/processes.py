"""Child processes of a launch: each behind a guard and in a session of its own, with one log file, ended together."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from ...errors import TrlAtroposError
from . import guard


EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_USER_PORT = 1024
NUM_CANDIDATE_PORTS = 8000
LOG_TAIL_LINES = 30
LOG_TAIL_BYTES = 64 * 1024
# What compiled extensions print when their interpreter exits; in a crash it buries the cause.
EXIT_NOISE = ("nanobind:", " - leaked ", " - ... skipped")
# The guard needs its own grace and a moment to look for what is left.
GUARD_GRACE_S = guard.GRACE_S + 5.0
# A service that dies takes its clients along: wait this long for the others to show it, so that the cause is named.
SETTLE_S = 1.0
# The pipe of an ended process holds at most 64 KiB.
PUMP_JOIN_S = 1.0
STARTED_AGAIN = b"\n=== started again ===\n"


class ProcessFailedError(TrlAtroposError, ChildProcessError):
    """A process of the launch ended although the launch still needed it."""


def free_port() -> int:
    """Return a loopback TCP port that was free a moment ago.

    It lies below those that Linux gives to connections, where it could be taken while a service imports for half a minute.
    """
    first_ephemeral = int(EPHEMERAL_PORTS.read_text().split()[0]) if EPHEMERAL_PORTS.exists() else 0
    candidates = range(max(first_ephemeral - NUM_CANDIDATE_PORTS, FIRST_USER_PORT), first_ephemeral)
    # Of its own: a seed that somebody set would give two processes the same one.
    order = random.SystemRandom().sample(candidates, len(candidates))
    for port in (*order, 0):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return int(sock.getsockname()[1])
    raise OSError("No TCP port can be bound on 127.0.0.1.")


class ManagedProcess:
    """One running command, behind `guard.py`. Its output goes to `log_path`, behind what an earlier process left there.

    `name` is what messages call it. `env` is added to this process's environment. `on_output` gets each line of
    standard output as well, without its line break, on a thread of its own.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        env: Mapping[str, str] | None = None,
        on_output: Callable[[str], None] | None = None,
    ):
        self.name = name
        self.log_path = log_path
        self._pump: threading.Thread | None = None
        log_path.parent.mkdir(parents=True, exist_ok=True)
        # Append mode, because standard error and the pump below write into the same file, and earlier processes did. Standard error is not pumped, so
        # that what a process says while it ends is kept also when this one was killed; a line that it writes in pieces can
        # have one of standard output in its middle.
        with log_path.open("ab") as log:
            if log.tell():
                log.write(STARTED_AGAIN)
                log.flush()
            self._log_start = log.tell()
            self._guard = subprocess.Popen(
                [sys.executable, "-m", guard.__name__, *command],
                stdin=subprocess.PIPE,
                stdout=log if on_output is None else subprocess.PIPE,
                stderr=log,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        if on_output is not None:
            self._pump = threading.Thread(
                target=_copy_lines,
                args=(self._guard.stdout, log_path, on_output),
                name=f"{name}-output",
                daemon=True,
            )
            self._pump.start()

    def poll(self) -> int | None:
        """Return the exit code, 128 + n after signal n, or None while the process runs."""
        code = self._guard.poll()
        if code is not None and self._pump is not None:
            self._pump.join(timeout=PUMP_JOIN_S)
        return code if code is None or code >= 0 else 128 - code

    def log_tail(self, num_lines: int = LOG_TAIL_LINES) -> str:
        """Return the last `num_lines` lines of the log that say something, of those that this process wrote."""
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_start, self.log_path.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip() and not line.startswith(EXIT_NOISE)][-num_lines:])

    def request_stop(self) -> None:
        """Ask the guard to end the process and everything that it started; returns at once."""
        if self._guard.poll() is None:
            self._guard.send_signal(signal.SIGTERM)

    def wait_stopped(self) -> None:
        """Wait for the guard to end; kill its whole process group if it does not, or if it was itself killed."""
        try:
            killed = self._guard.wait(timeout=GUARD_GRACE_S) < 0
        except subprocess.TimeoutExpired:
            killed = True
        if killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()
        if self._pump is not None:
            self._pump.join(timeout=PUMP_JOIN_S)
        for stream in (self._guard.stdin, self._guard.stdout):
            if stream is not None:
                stream.close()


def _copy_lines(source: IO[bytes], log_path: Path, on_output: Callable[[str], None]) -> None:
    """Copy a process's standard output to its log and to `on_output`, line by line."""
    with log_path.open("ab", buffering=0) as log:
        for line in source:
            log.write(line)
            on_output(line.decode(errors="replace").rstrip("\r\n"))


class ProcessGroup:
    """The processes of one launch. Leaving the context ends all of them, in whatever way it is left."""

    def __init__(self) -> None:
        self._processes: list[ManagedProcess] = []
        self._places: dict[str, int] = {}

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add(self, process: ManagedProcess) -> None:
        """Take over a started process. One of a name that was there before has the place of the first."""
        self._places.setdefault(process.name, len(self._places))
        self._processes.append(process)
        self._processes.sort(key=lambda process: self._places[process.name])

    def discard(self, process: ManagedProcess) -> None:
        """Forget a process that has ended and is replaced, or not needed any more."""
        process.wait_stopped()
        self._processes.remove(process)

    @property
    def names(self) -> list[str]:
        """Names of the processes, in the order of their first start."""
        return [process.name for process in self._processes]

    def check(self, may_finish: str | None = None, may_end: Collection[str] = ()) -> bool:
        """Look at all processes once; return whether `may_finish`, the one that may end, has ended with exit code 0.

        The processes in `may_end` are not looked at: somebody else does, and replaces or forgets them.

        Raises:
            ProcessFailedError: Another one has ended, with whatever exit code, or that one with an error. Names the one
                that was started first, because the later ones depend on it, and shows the end of its log.
        """
        needed = [process for process in self._processes if process.name not in may_end]
        if all(process.poll() is None for process in needed):
            return False
        finished = any(process.name == may_finish and process.poll() == 0 for process in needed)
        if not finished:
            time.sleep(SETTLE_S)
        ended = [process for process in needed if process.poll() is not None]
        failed = [process for process in ended if process.name != may_finish or process.poll() != 0]
        if failed:
            raise failure_of(
                failed[0],
                also_ended=[process.name for process in failed[1:]],
                still_running=[process.name for process in self._processes if process not in ended],
            )
        return True

    def stop(self) -> None:
        """End all processes: SIGTERM to everything that they started, SIGKILL after 10 s. Newest first."""
        # A second Ctrl-C must not leave half of them running; the wait below is bounded.
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for process in reversed(self._processes):
                process.request_stop()
            for process in reversed(self._processes):
                process.wait_stopped()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._processes.clear()


def failure_of(
    process: ManagedProcess, also_ended: Sequence[str] = (), still_running: Sequence[str] = (), history: str = ""
) -> ProcessFailedError:
    """Return the error that names a process that ended, its exit code and the last lines of its log.

    `also_ended` are the names of those that ended by themselves with it, `still_running` of those that the launch ends
    now. `history` is a sentence about earlier processes of this name.
    """
    others = f" (after it or with it: {', '.join(also_ended)})" if also_ended else ""
    ended = f"The launch has ended {', '.join(still_running)}; it started nothing else. " if still_running else ""
    return ProcessFailedError(
        f"The process `{process.name}` ended with exit code {process.poll()} while the run needed it{others}.",
        f"{history}{' ' if history else ''}The last lines of its log:\n{process.log_tail()}\n",
        f"{ended}The whole log is {process.log_path}.",
    )
