"""A call that goes on beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar


T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """Calls a function on a daemon thread, which does not keep the process."""

    def __init__(self, function: Callable[[], T], name: str):
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, args=(function,), name=name, daemon=True).start()

    def result(self) -> T:
        """Wait for the function, and return its value or raise its error."""
        return self._future.result()

    def error_within(self, seconds: float) -> BaseException | None:
        """Wait at most this long, and return the error of the function; None if it has ended without one.

        Raises:
            TimeoutError: It has not ended.
        """
        return self._future.exception(seconds)

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._future.set_result(function())
        except BaseException as exc:
            # Raised by `result` on the thread that waits.
            self._future.set_exception(exc)
