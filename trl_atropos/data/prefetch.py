"""One item ahead: the next batch is fetched, checked and looked up while the current one is trained."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar


T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Takes items from an iterator, on request one ahead on a thread. One thread at a time advances the iterator."""

    def __init__(self, items: Iterator[T]):
        self._items = items
        self._pending: Future[T | None] | None = None

    def start(self) -> None:
        """Begin to take the next item, if that has not begun."""
        if self._pending is not None:
            return
        self._pending = Future()
        # A daemon: a request that hangs must not keep the process alive.
        threading.Thread(target=self._run, args=(self._pending,), name="prefetch", daemon=True).start()

    def take(self) -> T | None:
        """Return the next item, or None after the last; waits for it, and raises what taking it raised."""
        self.start()
        assert self._pending is not None
        try:
            return self._pending.result()
        finally:
            self._pending = None

    def _run(self, pending: Future[T | None]) -> None:
        try:
            pending.set_result(next(self._items, None))
        except BaseException as exc:
            pending.set_exception(exc)
