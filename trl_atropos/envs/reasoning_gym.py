"""`reasoning-gym:TASK`: procedural tasks with answers that are checked, https://github.com/open-thought/reasoning-gym."""

from __future__ import annotations

from functools import partial
from typing import Any

from .graded import GradedEpisode


SEED = 42
NUM_PROBLEMS = 2000
"""Some data sets make all their problems at the start."""


def task_names() -> list[str]:
    """Names of all data sets that can be made by their name alone."""
    import reasoning_gym.factory

    # A composite needs other data sets in its options.
    return sorted(set(reasoning_gym.factory.DATASETS) - {"composite"})


class ReasoningGym:
    """A data set of reasoning-gym. The evaluation has tasks of its own.

    Args:
        name (`str`):
            Name of the data set, such as `chain_sum`.
        options (`dict[str, Any]`):
            Fields of its configuration, such as `{"min_terms": 2, "max_digits": 1}`. Its `seed` is 42 and
            its `size` 2000 unless they say otherwise; half of the problems are for the evaluation.
    """

    is_single_turn = True
    has_eval_split = True
    runs_elsewhere = False
    max_episodes: int | None = None

    def __init__(self, name: str, options: dict[str, Any]):
        import reasoning_gym

        self._dataset = reasoning_gym.create_dataset(name, **{"seed": SEED, "size": NUM_PROBLEMS, **options})

    def make_task(self, number: int, *, is_eval: bool = False) -> int:
        """Return the index of a problem; after half the data set the first one comes again."""
        half = len(self._dataset) // 2 or 1
        return (number % half + half * is_eval) % len(self._dataset)

    def open(self, task: int) -> GradedEpisode:
        """Ask the problem of an index."""
        entry = self._dataset[task]
        return GradedEpisode(entry["question"], partial(self._dataset.score_answer, entry=entry))
