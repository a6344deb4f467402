"""`reasoning-core:TASK`: symbolic tasks with external solvers, https://github.com/sileod/reasoning_core."""

from __future__ import annotations

from typing import Any

from .graded import GradedEpisode
from .random_state import RandomState


NUM_KEPT = 1000
"""Far more than groups that are sampled at once."""


def task_names() -> list[str]:
    """Names of all tasks."""
    import reasoning_core

    return sorted(reasoning_core.list_tasks())


class ReasoningCore:
    """A task of reasoning-core. It draws problems without end, and some of its tasks draw others with the same seed: there
    is no evaluation split, and a second run has problems of its own.

    Args:
        name (`str`):
            Name of the task, such as `arithmetics`.
        options (`dict[str, Any]`):
            Keyword arguments of `reasoning_core.get_task`.
    """

    is_single_turn = True
    has_eval_split = False
    runs_elsewhere = False
    max_episodes: int | None = None

    def __init__(self, name: str, options: dict[str, Any]):
        import reasoning_core

        self._task = reasoning_core.get_task(name, **options)
        self._score = reasoning_core.score_answer
        self._problems: dict[int, Any] = {}

    def make_task(self, number: int, *, is_eval: bool = False) -> int:
        """Return the number of a problem."""
        return number

    def open(self, task: int) -> GradedEpisode:
        """Ask the problem of a number. The last `NUM_KEPT` problems are kept for the episodes of their groups."""
        if task not in self._problems:
            # It draws from the process' generator.
            with RandomState(task):
                self._problems[task] = self._task.generate_example()
            for old in list(self._problems)[:-NUM_KEPT]:
                del self._problems[old]
        problem = self._problems[task]
        return GradedEpisode(problem.prompt, lambda answer: self._score(answer, problem))
