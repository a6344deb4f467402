"""Sources whose tasks are seeds."""

from __future__ import annotations

from typing import Any


SIZE_OF_SPLIT = 1_000_000
"""Tasks of training have numbers below it; task n of the evaluation is task SIZE_OF_SPLIT + n."""


class SeededSource:
    """The part of an [`EnvironmentSource`] that makes its tasks: seeds, of which the evaluation has its own.

    What derives from it has episodes of several turns that it opens in this process, as many at once as are asked for,
    unless it says otherwise.

    Args:
        name (`str`), options (`dict[str, Any]`):
            As of the source.
    """

    is_single_turn = False
    has_eval_split = True
    runs_elsewhere = False
    max_episodes: int | None = None

    def __init__(self, name: str, options: dict[str, Any]):
        self._name, self._options = name, options

    def make_task(self, number: int, *, is_eval: bool = False) -> int:
        """Return the seed of an episode."""
        return number % SIZE_OF_SPLIT + SIZE_OF_SPLIT * is_eval
