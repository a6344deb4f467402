"""A request to the server beside a collective with its workers."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from ...errors import TrlAtroposError, WeightSyncError, WeightSyncTimeout


logger = logging.getLogger(__name__)

T = TypeVar("T")

SAY_S = 1.0
"""Seconds that a request is given to say why a collective with its workers has failed."""


class Cancelled(Exception):
    """Ends a collective whose request has failed. Never leaves this package."""


class _Side:
    """One of the two, on a daemon thread, so that it does not keep the process."""

    def __init__(self, name: str, function: Callable[[], Any], ended: SimpleQueue[_Side]):
        self.value: Any = None
        self.error: BaseException | None = None
        self._function = function
        self._ended = ended
        self.thread = threading.Thread(target=self._run, name=f"weight-sync-{name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as exc:
            # Its frames would keep groups and ports for as long as somebody keeps the error.
            traceback.clear_frames(exc.__traceback__)
            # Raised by `run_beside` on the calling thread.
            self.error = exc
        self._ended.put(self)


class Collective(Generic[T]):
    """Runs a collective with the workers beside the HTTP request that makes them join; the first that fails ends both.

    The calling thread waits for the two and is open to Ctrl-C. If the request fails, its error says what the server
    thinks and is raised. If the collective fails first, the request would go on to its own deadline: it is given `SAY_S`
    to say why, then the collective's error is raised, and the request is left to its end.

    `name` stands in messages and names the threads. `function` is the collective; wherever it can, it looks at the
    event that it is given, which is set when it shall end; `end`, if given, ends it from outside. `timeout_s` is how
    long the collective may go on after the request has succeeded, and `end_s`, by default as long, how long it is waited
    for once it shall end, both in seconds; afterwards its thread stays until it or the process ends.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[threading.Event], T],
        *,
        timeout_s: float,
        end: Callable[[], None] | None = None,
        end_s: float | None = None,
    ):
        self.name = name
        self.timeout_s = timeout_s
        self._end_s = timeout_s if end_s is None else end_s
        self._function = function
        self._end = end
        self._is_cancelled = threading.Event()

    def run_beside(self, request: Callable[[], None]) -> T:
        """Run the collective and the request, and return what the collective returned.

        `request` returns when every worker has taken part.

        Raises:
            [`WeightSyncTimeout`]: if the collective goes on after the request has succeeded.
            [`WeightSyncError`]: if either fails.
        """
        ended: SimpleQueue[_Side] = SimpleQueue()
        collective = _Side(self.name, lambda: self._function(self._is_cancelled), ended)
        asking = _Side(f"{self.name} request", request, ended)
        try:
            self._wait_for(collective, asking, ended)
        except BaseException:
            self._is_cancelled.set()
            if self._end is not None:
                self._end()
            collective.thread.join(self._end_s)
            raise
        value: T = collective.value
        return value

    def _wait_for(self, collective: _Side, asking: _Side, ended: SimpleQueue[_Side]) -> None:
        first = ended.get()
        if first.error is None:
            try:
                ended.get(timeout=self.timeout_s if first is asking else None)
            except Empty:
                raise WeightSyncTimeout(
                    f"The {self.name} still runs {self.timeout_s:.0f} s after every worker has answered.",
                    "The two sides disagree about what was sent.",
                    "Restart the vLLM server, then train with --resume_from_checkpoint.",
                ) from None
        elif first is collective:
            with suppress(Empty):
                ended.get(timeout=SAY_S)
        if asking.error is not None:
            if collective.error is not None:
                logger.warning(f"The {self.name} beside the failed request ended with {_describe(collective.error)}")
            raise asking.error
        if collective.error is not None:
            raise self._explain(collective.error)

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, TrlAtroposError):
            return error
        explained = WeightSyncError(
            f"The {self.name} failed: {_describe(error)}.",
            "The workers hold a part of the policy, or none of it.",
            "Look at the server's log; restart the server if it does not take the next publish.",
        )
        explained.__cause__ = error
        return explained


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
