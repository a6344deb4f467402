"""What an ecosystem has to offer, so that its tasks become groups of Atropos: one small file each beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class EpisodeStep:
    """What the environment answered to one text of the policy.

    Args:
        observation (`str`, *optional*):
            What the policy is told next, as a message of the user; `None` when the episode is over by its own rules.
        reward (`float`):
            Reward of this turn. The rewards of all turns of an episode are added up.
    """

    observation: str | None
    reward: float


class EnvironmentEpisode(Protocol):
    """One attempt at a task, which becomes one rollout.

    Attributes:
        messages (`list[dict[str, str]]`):
            What the policy sees first: messages with `role` and `content`, the last one of role `user`.
    """

    messages: list[dict[str, str]]

    def step(self, text: str) -> EpisodeStep:
        """Answer what the policy wrote, without special tokens. A text that breaks the rules earns a reward, and is no
        exception: an exception loses the whole group.
        """

    def close(self) -> None:
        """Give back what the episode holds. Called once, also after an exception, and where `runs_elsewhere` also while
        `step` is waiting, which has to end then in one way or another.
        """


class EnvironmentSource(Protocol):
    """The tasks of one name of an ecosystem.

    Attributes:
        is_single_turn (`bool`):
            Whether every episode ends with its first answer. Then a group is one request for all its answers.
        has_eval_split (`bool`):
            Whether `make_task(..., is_eval=True)` gives tasks that are never trained on.
        runs_elsewhere (`bool`):
            Whether episodes wait for another process, thread or machine. Their methods and `open` are then called in threads
            of their own, those of several episodes at once, so that one that waits does not hold up the others.
        max_episodes (`int`, *optional*):
            Episodes that may be open at once; `None`: any number.
    """

    is_single_turn: bool
    has_eval_split: bool
    runs_elsewhere: bool
    max_episodes: int | None

    def make_task(self, number: int, *, is_eval: bool = False) -> Any:
        """Return task `number`, counted from 0, as something that JSON can hold. The same number gives the same task
        in this process, and in another one unless the source says otherwise.
        """

    def open(self, task: Any) -> EnvironmentEpisode:
        """Begin an episode of a task. Episodes of one task begin alike: they are the rollouts of one group."""
