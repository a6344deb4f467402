"""A request to the server beside a collective with its workers."""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

from ...errors import TrlAtroposError, WeightSyncError, WeightSyncTimeout


logger = logging.getLogger(__name__)

T = TypeVar("T")


class Cancelled(Exception):
    """Ends a collective whose request has failed. Never leaves this package."""


class Collective(Generic[T]):
    """Runs a collective with the workers on a daemon thread, beside the HTTP request that makes them join.

    The request runs on the calling thread, under its own deadline and open to Ctrl-C; its error says what the server
    thinks and wins. A collective over gloo ends by its timeout or when it is cancelled. One over NCCL cannot be ended:
    its thread waits until the process ends, and is a daemon so that it does not keep the process.

    `name` stands in messages and names the thread. `function` is the collective; wherever it can, it looks at the
    event that it is given, which is set when the request has failed. `timeout_s` is how long the collective may go on
    after the request has succeeded, in seconds. `can_be_ended` says whether a failed request waits for the end of the
    collective.
    """

    def __init__(self, name: str, function: Callable[[threading.Event], T], *, timeout_s: float, can_be_ended: bool):
        self.name = name
        self.timeout_s = timeout_s
        self.can_be_ended = can_be_ended
        self._function = function
        self._is_cancelled = threading.Event()
        self._values: list[T] = []
        self._errors: list[BaseException] = []

    def run_beside(self, request: Callable[[], None]) -> T:
        """Run the collective and the request, and return what the collective returned.

        `request` returns when every worker has taken part.

        Raises:
            [`WeightSyncTimeout`]: if the collective goes on after the request has succeeded.
            [`WeightSyncError`]: if either fails.
        """
        thread = threading.Thread(target=self._run, name=f"weight-sync-{self.name}", daemon=True)
        thread.start()
        try:
            request()
        except BaseException:
            self._is_cancelled.set()
            if self.can_be_ended:
                thread.join(self.timeout_s)
            self._log_errors()
            raise
        thread.join(self.timeout_s)
        if thread.is_alive():
            self._is_cancelled.set()
            raise WeightSyncTimeout(
                f"The {self.name} still runs {self.timeout_s:.0f} s after every worker has answered.",
                "The two sides disagree about what was sent.",
                "Restart the vLLM server, then train with --resume_from_checkpoint.",
            )
        if self._errors:
            raise self._explain(self._errors[0])
        return self._values[0]

    def _run(self) -> None:
        try:
            self._values.append(self._function(self._is_cancelled))
        except Cancelled:
            # The error of the request is the one to read.
            return
        except BaseException as exc:
            # Its frames would keep groups and ports for as long as somebody keeps the error.
            traceback.clear_frames(exc.__traceback__)
            # Read by `run_beside` on the calling thread.
            self._errors.append(exc)

    def _log_errors(self) -> None:
        for error in self._errors:
            logger.warning(f"The {self.name} beside the failed request ended with {type(error).__name__}: {error}")

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, TrlAtroposError):
            return error
        explained = WeightSyncError(
            f"The {self.name} failed: {type(error).__name__}: {error}.",
            "The workers hold a part of the policy, or none of it.",
            "Look at the server's log; restart the server if it does not take the next publish.",
        )
        explained.__cause__ = error
        return explained
