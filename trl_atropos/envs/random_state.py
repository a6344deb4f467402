"""A generator of random numbers for each episode, for libraries that draw from that of the process."""

from __future__ import annotations

import random
from types import TracebackType


class RandomState:
    """`random` as if this were the only one who draws from it: inside of `with`, and again where it was left in the next.

    Args:
        seed (`int`):
            What the first `with` begins with.
    """

    def __init__(self, seed: int):
        self._state = random.Random(seed).getstate()

    def __enter__(self) -> None:
        self._outside = random.getstate()
        random.setstate(self._state)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state = random.getstate()
        random.setstate(self._outside)
