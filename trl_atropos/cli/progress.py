"""Signs of life while something takes seconds and says nothing. Loads nothing but the standard library."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


INTERVAL_S = 3.0


def say(message: str) -> None:
    """Print one line on standard error at once; standard output is for results."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Say what is done, and every `INTERVAL_S` seconds that it still is. `what` begins a sentence."""
    start = time.monotonic()
    is_done = threading.Event()

    def tick() -> None:
        while not is_done.wait(INTERVAL_S):
            say(f"{what} ({time.monotonic() - start:.0f} s)")

    say(what)
    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
