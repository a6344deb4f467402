"""What becomes of a launch when a part of it ends: the part is started again, the run ends, or it goes on without it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import PreflightError
from .config import CONTINUE, STOP
from .guard import COMMAND_NOT_FOUND
from .output import LaunchOutput
from .processes import ManagedProcess, ProcessGroup, failure_of


FIRST_PAUSE_S = 1.0
"""Between the end of a part and its first restart. The pause doubles with each further one."""

MAX_PAUSE_S = 30.0
MAX_LINE_CHARS = 200


class Answering(Protocol):
    """What another part needs."""

    @property
    def name(self) -> str:
        """As messages call it."""

    def answers(self) -> bool:
        """Return whether it can be used."""


class Restartable(Answering, Protocol):
    """A part that can be started again, at the same address if it has one."""

    process: ManagedProcess

    def start_again(self) -> None:
        """Replace `process`, which has ended and which the group has let go."""


@dataclass(frozen=True)
class RestartLimit:
    """How often one part is started again: `max_restarts` times within `window_s` seconds."""

    max_restarts: int
    window_s: float

    def pause_s(self, ends: Sequence[float], now: float) -> float | None:
        """Return for how long a part that ended now is not started again, None if it is not any more.

        `ends` are the times of its earlier ends. All are of one clock, in seconds.
        """
        num_recent = sum(now - end < self.window_s for end in ends)
        if num_recent >= self.max_restarts:
            return None
        return float(min(FIRST_PAUSE_S * 2**num_recent, MAX_PAUSE_S))

    def __str__(self) -> str:
        return f"{self.max_restarts} times within {self.window_s:g} s"


@dataclass(eq=False)
class _Part:
    """A part and what has happened to it. Times are monotonic seconds.

    `due_at` is when it is started again, None while it runs. `starting_since` is when that was done, until it answers. One that
    `is_gone` is not looked at any more.
    """

    program: Restartable
    on_exit: str
    needs: Sequence[Answering]
    is_environment: bool
    ends: list[float] = field(default_factory=list)
    due_at: float | None = None
    starting_since: float | None = None
    is_gone: bool = False
    num_restarts: int = 0


class Supervisor:
    """Looks after the parts of a launch that run until the trainer has ended.

    `limit` is that of each part, and `startup_timeout_s` how long one may take to answer after a restart, in seconds.
    """

    def __init__(self, limit: RestartLimit, startup_timeout_s: float, group: ProcessGroup, output: LaunchOutput):
        self._limit = limit
        self._startup_timeout_s = startup_timeout_s
        self._group = group
        self._output = output
        self._parts: list[_Part] = []

    def add(
        self, program: Restartable, on_exit: str, needs: Sequence[Answering] = (), is_environment: bool = False
    ) -> None:
        """Look after a part that runs, from now on.

        `on_exit` is one of `ON_EXITS`. A part is not started again before all that it `needs` answer. Without any
        environment the run is over.
        """
        self._parts.append(_Part(program, on_exit, needs, is_environment))

    @property
    def num_restarts(self) -> dict[str, int]:
        """How often each part was started again, by name; only those that were."""
        return {part.program.name: part.num_restarts for part in self._parts if part.num_restarts}

    @property
    def may_end(self) -> Collection[str]:
        """Names of the parts whose end does not end the run at once."""
        return [part.program.name for part in self._parts if part.on_exit != STOP]

    def awaits(self, program: Answering) -> bool:
        """Return whether a part is being started again, or is about to be."""
        return any(
            part.program is program and (part.due_at is not None or part.starting_since is not None)
            for part in self._parts
        )

    def check(self, may_finish: str | None = None) -> bool:
        """Look at everything once; return whether `may_finish`, the process that may end, has ended with exit code 0.

        Raises:
            ProcessFailedError: A process ended that is not started again and without which the run does not go on.
            PreflightError: A part does not answer after a restart.
        """
        for part in self._parts:
            if part.on_exit != STOP and not part.is_gone:
                self._look(part, time.monotonic())
        return self._group.check(may_finish, self.may_end)

    def _look(self, part: _Part, now: float) -> None:
        if part.due_at is not None:
            if now >= part.due_at and all(needed.answers() for needed in part.needs):
                part.program.start_again()
                part.num_restarts += 1
                part.due_at, part.starting_since = None, now
        elif part.program.process.poll() is not None:
            self._note_end(part, now)
        elif part.starting_since is not None:
            self._note_start(part, now)

    def _note_end(self, part: _Part, now: float) -> None:
        process = part.program.process
        others = [name for name in self._group.names if name != process.name]
        part.starting_since = None
        if part.on_exit == CONTINUE:
            part.is_gone = True
            left = [other.program.name for other in self._parts if other.is_environment and not other.is_gone]
            if part.is_environment and not left:
                raise failure_of(process, still_running=others)
            self._group.discard(process)
            goes_on = f"with {', '.join(left)}" if part.is_environment else "without it"
            self._output.say(
                process.name,
                f"ended with exit code {process.poll()}; the run goes on {goes_on}. The last lines of its log "
                f"({process.log_path}):\n{process.log_tail()}",
            )
            return
        if process.poll() == COMMAND_NOT_FOUND:
            # It would not be found a second time.
            raise failure_of(process, still_running=others)
        pause_s = self._limit.pause_s(part.ends, now)
        part.ends.append(now)
        if pause_s is None:
            raise failure_of(
                process, still_running=others, history=f"It was started again {self._limit} (`max_restarts`)."
            )
        self._group.discard(process)
        part.due_at = now + pause_s
        last_line = process.log_tail(1)[-MAX_LINE_CHARS:]
        self._output.say(
            process.name,
            f"ended with exit code {process.poll()} and is started again in {pause_s:g} s (restart {part.num_restarts + 1}; at most "
            f"{self._limit}). The last line of its log: {last_line}",
        )

    def _note_start(self, part: _Part, now: float) -> None:
        assert part.starting_since is not None, "it was started again"
        if part.program.answers():
            part.starting_since = None
            self._output.say(part.program.name, "is there again")
        elif now - part.starting_since >= self._startup_timeout_s:
            raise PreflightError(
                f"`{part.program.name}` was started again, and did not answer within {self._startup_timeout_s:.0f} s.",
                f"The last line of its log: {part.program.process.log_tail(1)}",
                "Raise `startup_timeout_s` in the launch file if it was still loading the model.",
            )
