"""What a launch shows: a checklist, a line that says what it waits for, and one log of all its processes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.status import Status
from rich.text import Text


SILENCE_S = 4.5

POLL_S = 0.2
COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")
MAX_NOTE_CHARS = 100
MIN_NAME_CHARS = 8

REQUEST = re.compile(r'"(?:GET|POST) \S+ HTTP/')
"""In a line of a server's access log, which is no news of what is waited for."""


class LaunchOutput:
    """The terminal and the combined log at `path`, which is emptied first, of one launch. Thread-safe.

    Every line of the combined log has the seconds since the start and the name of its process; on a terminal each name
    has its colour. A line there says what is waited for: a moving one on a terminal, otherwise one after `silence_s`
    seconds without another. `shows_all` shows the lines of all followed logs there.
    """

    def __init__(
        self, path: Path, shows_all: bool = False, console: Console | None = None, silence_s: float = SILENCE_S
    ):
        self._silence_s = silence_s
        self.shows_all = shows_all
        self._console = console or Console(highlight=False, soft_wrap=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._combined = path.open("w", encoding="utf-8")
        self._lock = threading.RLock()
        self._start = self._last_line = self._waits_since = time.monotonic()
        self._activity: tuple[str, str] | None = None
        self._waits_for: frozenset[str] | None = None
        self._may_be_silent = False
        # The newest line of each process, the newest of them last.
        self._newest: dict[str, str] = {}
        self._followed: dict[str, _FollowedLog] = {}
        self._width = MIN_NAME_CHARS
        self._status: Status | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="launch-output", daemon=True)

    def __enter__(self) -> LaunchOutput:
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._poll_logs(is_last=True)
        if self._status is not None:
            self._status.stop()
        self._combined.close()

    def elapsed_s(self) -> float:
        """Seconds since the launch began."""
        return time.monotonic() - self._start

    def say(self, name: str, message: str) -> None:
        """Print one line of the checklist."""
        with self._lock:
            self._log(name, message)
            line = Text.assemble(f"[{self.elapsed_s():6.1f} s] ", (self._padded(name), self._colour(name)))
            self._print(line.append(f" {message}"))

    def show(self, line: str) -> None:
        """Print a line of the trainer as it is. Its log is followed, so this one does not reach the combined log."""
        with self._lock:
            if not self.shows_all:
                self._print(Text.from_ansi(line))

    def wait_for(
        self, name: str, message: str, processes: Collection[str] | None = None, only_on_terminal: bool = False
    ) -> None:
        """Say from now on what `name` waits for, whenever nothing else is said.

        The newest line of one of `processes`, by default of any, goes with it. `only_on_terminal` leaves a log silent:
        for a wait that has no end.
        """
        with self._lock:
            self._may_be_silent = only_on_terminal
            self._activity = (name, message)
            self._waits_for = None if processes is None else frozenset(processes)
            self._waits_since = time.monotonic()

    def follow(self, name: str, path: Path) -> None:
        """Copy a process's log into the combined one from now on. A second call for a name changes nothing: a process that is
        started again goes on with its log.
        """
        with self._lock:
            if name not in self._followed:
                self._followed[name] = _FollowedLog(path)
            self._width = max(self._width, len(name))

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._poll_logs()
            self._keep_alive()

    def _poll_logs(self, is_last: bool = False) -> None:
        with self._lock:
            for name, followed in self._followed.items():
                for line in followed.read_lines(is_last):
                    self._take(name, line)
                if is_last:
                    followed.close()
            self._combined.flush()

    def _take(self, name: str, line: str) -> None:
        self._log(name, line)
        if line.strip() and not REQUEST.search(line):
            self._newest.pop(name, None)
            self._newest[name] = line.strip()
        if self.shows_all:
            self._print(Text.assemble((self._padded(name), self._colour(name)), " | ").append(Text.from_ansi(line)))

    def _log(self, name: str, line: str) -> None:
        self._combined.write(f"[{self.elapsed_s():6.1f} s] {self._padded(name)} | {line}\n")

    def _print(self, line: Text) -> None:
        self._console.print(line)
        self._last_line = time.monotonic()

    def _keep_alive(self) -> None:
        with self._lock:
            if self._activity is None:
                return
            name, message = self._activity
            now = time.monotonic()
            note = f"{message} ({now - self._waits_since:.0f} s)"
            for process in reversed(self._newest):
                if self._waits_for is None or process in self._waits_for:
                    note += f"; {process}: {Text.from_ansi(self._newest[process]).plain[:MAX_NOTE_CHARS]}"
                    break
            if self._status is not None:
                # A Text, because a string would be read as markup.
                self._status.update(Text(note, overflow="ellipsis", no_wrap=True))
            elif now - self._last_line >= self._silence_s and not self._may_be_silent:
                self.say(name, note)

    def _padded(self, name: str) -> str:
        return f"{name:<{self._width}}"

    def _colour(self, name: str) -> str:
        names = list(self._followed)
        return COLOURS[names.index(name) % len(COLOURS)] if name in names else "bold"


class _FollowedLog:
    """Reads what is appended to a file, line by line."""

    def __init__(self, path: Path):
        self._file: IO[bytes] = path.open("rb")
        self._rest = b""

    def read_lines(self, is_last: bool = False) -> list[str]:
        """Return the new lines, with `is_last` also one that has no line break yet."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        if is_last and self._rest:
            lines.append(self._rest)
        # A progress bar rewrites its line: what it showed last counts.
        return [line.decode(errors="replace").rstrip("\r").rpartition("\r")[2] for line in lines]

    def close(self) -> None:
        self._file.close()
