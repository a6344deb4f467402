"""Signs of life while something takes seconds and says nothing. Loads nothing but the standard library."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


INTERVAL_S = 3.0


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Say what is done, and every three seconds that it still is, on standard error.

    Args:
        what (`str`):
            Begins a sentence.
    """
    start = time.monotonic()
    is_done = threading.Event()

    def tick() -> None:
        while not is_done.wait(INTERVAL_S):
            print(f"{what} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)

    print(what, file=sys.stderr, flush=True)
    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
