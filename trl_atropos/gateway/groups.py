"""From sessions to the groups of the wire: every sampled token is trained in exactly one rollout.

A session is a tree of turns. Each of its leaves makes a sequence; the turns that several sequences share are trained in the
first of them and are context in the others. A session in which nothing was rewritten is one rollout.

Shape letters: T tokens of a rollout.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..wire.rollout_key import oldest_of_calls
from .turns import Turn, text_of


UNTRAINED_LABEL = -100
UNTRAINED_LOGPROB = 1.0
"""Atropos' entry of `inference_logprobs` where a token was not sampled."""

STD_EPSILON = 1e-4
"""Added to the standard deviation of rewards, as the trainer and TRL add it."""

NO_TURN = -1
"""In the place of a turn's index where a token is not trained."""

WIRE_ROLES = frozenset({"system", "user", "assistant", "tool"})


@dataclass(frozen=True)
class SessionRollout:
    """One sequence of a session.

    Args:
        tokens (`list[int]`):
            Ids, of shape (T,).
        masks (`list[int]`):
            The id where a token is trained, -100 elsewhere, of shape (T,).
        inference_logprobs (`list[float]`):
            Of the trained tokens, 1.0 elsewhere, of shape (T,).
        turns (`list[int]`):
            Index of the turn that sampled a token, where that is trained, -1 elsewhere, of shape (T,).
        policy_version (`int`, *optional*):
            Of the oldest policy that sampled any trained token; None if any of them is unknown.
        messages (`list[dict]`):
            The conversation as text, for people.
    """

    tokens: list[int]
    masks: list[int]
    inference_logprobs: list[float]
    turns: list[int]
    policy_version: int | None
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class FinishedSession:
    """What a group needs of a session that ended.

    Args:
        rollouts (`list[SessionRollout]`):
            Of it; none if nothing of it is trained.
        rewards (`Sequence[float | None]`):
            Of its turns, in the order in which they were answered, None where there is none; the reward of the whole session is
            a part of the last one.
    """

    rollouts: list[SessionRollout]
    rewards: Sequence[float | None]

    @property
    def reward(self) -> float:
        """The sum of its rewards."""
        return sum(reward for reward in self.rewards if reward is not None)

    @property
    def has_one_advantage(self) -> bool:
        """Whether all its turns have the same one: nothing but the last turn has a reward."""
        return all(reward is None for reward in self.rewards[:-1])


def rollouts_of(turns: Sequence[Turn]) -> list[SessionRollout]:
    """The sequences of a session, in the order of their last turns. Those without a trained token are left out."""
    indices = {turn: index for index, turn in enumerate(turns)}
    trained: set[Turn] = set()
    rollouts = []
    for leaf in [turn for turn in turns if not turn.children]:
        path = leaf.path()
        of_leaf = [turn for turn in path if not turn.why_masked and turn not in trained]
        if of_leaf:
            trained.update(of_leaf)
            rollouts.append(_rollout(path, {turn: indices[turn] for turn in of_leaf}))
    return rollouts


def _rollout(path: Sequence[Turn], trained: Mapping[Turn, int]) -> SessionRollout:
    """The sequence of a path; `trained` are those of its turns that are trained in it, with their indices."""
    tokens: list[int] = []
    masks: list[int] = []
    logprobs: list[float] = []
    turns: list[int] = []
    for turn in path:
        sampled = turn.sampled.tolist()
        tokens += [*turn.added, *sampled]
        masks += [UNTRAINED_LABEL] * len(turn.added)
        logprobs += [UNTRAINED_LOGPROB] * len(turn.added)
        if turn in trained:
            masks += sampled
            logprobs += turn.logprobs.tolist()
        else:
            masks += [UNTRAINED_LABEL] * len(sampled)
            logprobs += [UNTRAINED_LOGPROB] * len(sampled)
        turns += [NO_TURN] * len(turn.added) + [trained.get(turn, NO_TURN)] * len(sampled)
    version = oldest_of_calls(turn.policy_version for turn in trained)
    messages = [*path[-1].messages, path[-1].message]
    return SessionRollout(tokens, masks, logprobs, turns, version, list(map(_shown, messages)))


def _shown(message: dict[str, Any]) -> dict[str, str]:
    """A message as the wire has it: a role that Atropos knows, and text."""
    role = message.get("role")
    text = text_of(message.get("content"))
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        text += f"\n{function.get('name')}({function.get('arguments')})"
    return {"role": role if role in WIRE_ROLES else "system", "content": text.strip("\n")}


def turn_advantages(sessions: Sequence[FinishedSession], scale_rewards: bool = True) -> list[list[float]]:
    """Advantages of the turns of each session of one task, as in the process supervision of
    [DeepSeekMath](https://huggingface.co/papers/2402.03300), section 4.1.3: the rewards of all turns of all sessions are
    normalised together, and the advantage of a turn is the sum of the normalised rewards of it and of those after it.

    Where only whole sessions have rewards, all turns of a session have the advantage of its reward among those of the others.

    Deviations from the paper:

    1. The standard deviation is the unbiased one, and 1e-4 is added to it, as in the trainer's
       [`~loss.advantages.group_advantages`].
    2. A step is a turn: an answer of the policy with all its tokens. The turns of a session follow each other in the order in
       which they were answered, also where its history was rewritten, or several agents asked side by side.
    3. A turn may have no reward: it takes no part in mean and deviation, and adds nothing to a sum.
    4. The reward of a whole session is added to that of its last turn before anything is normalised, so that both kinds can be
       given at once.
    5. Without `scale_rewards` nothing is divided ([Dr. GRPO](https://huggingface.co/papers/2503.20783)). Rewards that are one
       alone, or all equal, give 0.

    Args:
        sessions (`Sequence[FinishedSession]`):
            Of the same task.
        scale_rewards (`bool`, *optional*, defaults to `True`):
            Whether to divide by the standard deviation.

    Returns:
        `list[list[float]]`: one entry for each turn of each session.
    """
    rewards = [reward for session in sessions for reward in session.rewards if reward is not None]
    # Rounded once, unlike `fmean`: rewards that are equal are their mean.
    mean = statistics.mean(rewards)
    scale = statistics.stdev(rewards) + STD_EPSILON if scale_rewards and len(rewards) > 1 else 1.0
    advantages = []
    for session in sessions:
        normalized = [0.0 if reward is None else (reward - mean) / scale for reward in session.rewards]
        advantages.append(list(accumulate(reversed(normalized)))[::-1])
    return advantages


class GroupMaker:
    """Makes groups of exactly `group_size` rollouts out of the sessions of one task after another.

    Where every session is one rollout with one reward, they are one group with their rewards as scores, whose advantages the
    trainer computes. Where a session branched, so that there are more rollouts than sessions, or turns have rewards of their
    own, every token carries the advantage of its turn ([`turn_advantages`]): a session does not count more often in the mean
    because it branched. Such rollouts need no group, and are sent in groups of the usual size, across tasks: Atropos' queue makes
    no batch of uneven ones. What is too little for a group waits for the next.

    Args:
        group_size (`int`):
            Sessions of a task, and rollouts of a group.
        temperature (`float`):
            At which they were sampled.
        scale_rewards (`bool`, *optional*, defaults to `True`):
            Whether explicit advantages are divided by the standard deviation of the rewards, as the trainer's
            `--scale_rewards group` does.
    """

    def __init__(self, group_size: int, temperature: float, scale_rewards: bool = True):
        self.group_size = group_size
        self.temperature = temperature
        self.scale_rewards = scale_rewards
        self._waiting: list[tuple[SessionRollout, float, list[float]]] = []

    @property
    def num_waiting_rollouts(self) -> int:
        """Rollouts that wait for others to make a group."""
        return len(self._waiting)

    def add(self, sessions: Sequence[FinishedSession]) -> list[dict[str, Any]]:
        """Return the groups that are ready, with the `group_size` sessions of one task."""
        if all(len(session.rollouts) == 1 and session.has_one_advantage for session in sessions):
            scored = [(session.rollouts[0], session.reward) for session in sessions]
            return [self._group(scored)]
        for session, of_turns in zip(sessions, turn_advantages(sessions, self.scale_rewards), strict=True):
            for rollout in session.rollouts:
                advantages = [0.0 if turn == NO_TURN else of_turns[turn] for turn in rollout.turns]
                self._waiting.append((rollout, session.reward, advantages))
        groups = []
        while len(self._waiting) >= self.group_size:
            taken, self._waiting = self._waiting[: self.group_size], self._waiting[self.group_size :]
            group = self._group([(rollout, reward) for rollout, reward, _ in taken])
            group["advantages"] = [advantages for _, _, advantages in taken]
            groups.append(group)
        return groups

    def _group(self, scored: Sequence[tuple[SessionRollout, float]]) -> dict[str, Any]:
        rollouts = [rollout for rollout, _ in scored]
        return {
            "tokens": [rollout.tokens for rollout in rollouts],
            "masks": [rollout.masks for rollout in rollouts],
            "scores": [reward for _, reward in scored],
            "inference_logprobs": [rollout.inference_logprobs for rollout in rollouts],
            "messages": [rollout.messages for rollout in rollouts],
            "generation_params": {"temperature": self.temperature},
            "group_overrides": {"policy_version": [rollout.policy_version for rollout in rollouts]},
        }
