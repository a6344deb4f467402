"""`gem:ENV`: games, puzzles and questions of gem-llm, https://github.com/axon-rl/gem."""

from __future__ import annotations

from typing import Any

from .graded import ANSWER_FAULTS, warn_of_grader
from .random_state import RandomState
from .seeded import SeededSource
from .source import EpisodeStep


ASK_FOR_BOX = "Put your answer within \\boxed{}."
"""For questions that do not say themselves where gem looks for the answer."""

BOXED = ("math:", "rg:")
"""Kinds of questions that say nothing of it."""

ONLY_EVALUATED = "eval:"


def task_names() -> list[str]:
    """Names of all environments but those that are there for evaluations alone."""
    import gem
    from gem.envs.registration import ENV_REGISTRY

    del gem  # importing it registers its environments
    # A composite needs other data sets in its options.
    return sorted(name for name in ENV_REGISTRY if not name.startswith(ONLY_EVALUATED) and name != "rg:composite")


class Gem(SeededSource):
    """An environment of gem. The evaluation has seeds of its own.

    Args:
        name (`str`):
            Of the environment, such as `game:GuessTheNumber-v0-easy`.
        options (`dict[str, Any]`):
            Keyword arguments of the environment, such as `{"max_turns": 3}`.
    """

    def open(self, task: int) -> GemEpisode:
        """Begin an episode with a seed."""
        return GemEpisode(self._name, self._options, task)


class GemEpisode:
    """One episode. It is told what is new after each answer, and the suffix that gem puts behind it.

    Args:
        name (`str`), options (`dict[str, Any]`):
            As of [`Gem`].
        seed (`int`):
            Of its task.
    """

    def __init__(self, name: str, options: dict[str, Any], seed: int):
        import gem

        # It draws from the process' generator, also while it is made.
        self._random = RandomState(seed)
        with self._random:
            self._environment = gem.make(name, **options)
            observation, info = self._environment.reset(seed=seed)
        first = _joined(observation, info)
        if name.startswith(BOXED):
            first = f"{first}\n\n{ASK_FOR_BOX}"
        self.messages = [{"role": "user", "content": first}]

    def step(self, text: str) -> EpisodeStep:
        """Answer. An answer on which its grader fails ends the episode without a reward."""
        try:
            with self._random:
                observation, reward, is_terminated, is_truncated, info = self._environment.step(text)
        except ANSWER_FAULTS:
            warn_of_grader(text)
            return EpisodeStep(None, 0.0)
        is_over = is_terminated or is_truncated
        return EpisodeStep(None if is_over else _joined(observation, info), float(reward))

    def close(self) -> None:
        """There is nothing to give back."""


def _joined(observation: str, info: dict[str, Any]) -> str:
    return f"{observation}\n{info.get('suffix', '')}".strip()
