"""From sessions to the groups of the wire: every sampled token is trained in exactly one rollout.

A session is a tree of turns. Each of its leaves makes a sequence; the turns that several sequences share are trained in the
first of them and are context in the others. A session in which nothing was rewritten is one rollout.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .turns import Turn, text_of


UNTRAINED_LABEL = -100
UNTRAINED_LOGPROB = 1.0
"""Atropos' entry of `inference_logprobs` where a token was not sampled."""

STD_EPSILON = 1e-4
"""Added to the standard deviation of rewards, as the trainer and TRL add it."""

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
        policy_version (`int`, *optional*):
            Of the oldest policy that sampled any trained token; None if any of them is unknown.
        messages (`list[dict]`):
            The conversation as text, for people.
    """

    tokens: list[int]
    masks: list[int]
    inference_logprobs: list[float]
    policy_version: int | None
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class FinishedSession:
    """What a group needs of a session that ended.

    Args:
        rollouts (`list[SessionRollout]`):
            Of it; none if nothing of it is trained.
        reward (`float`):
            Of the whole session.
    """

    rollouts: list[SessionRollout]
    reward: float


def rollouts_of(turns: Iterable[Turn]) -> list[SessionRollout]:
    """The sequences of a session, in the order of their last turns. Those without a trained token are left out."""
    trained: set[Turn] = set()
    rollouts = []
    for leaf in [turn for turn in turns if not turn.children]:
        path = leaf.path()
        of_leaf = [turn for turn in path if not turn.why_masked and turn not in trained]
        if of_leaf:
            trained.update(of_leaf)
            rollouts.append(_rollout(path, set(of_leaf)))
    return rollouts


def _rollout(path: Sequence[Turn], trained: set[Turn]) -> SessionRollout:
    tokens: list[int] = []
    masks: list[int] = []
    logprobs: list[float] = []
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
    versions = [turn.policy_version for turn in trained]
    known = [version for version in versions if version is not None]
    version = min(known) if len(known) == len(versions) else None
    messages = [*path[-1].messages, path[-1].message]
    return SessionRollout(tokens, masks, logprobs, version, list(map(_shown, messages)))


def _shown(message: dict[str, Any]) -> dict[str, str]:
    """A message as the wire has it: a role that Atropos knows, and text."""
    role = message.get("role")
    text = text_of(message.get("content"))
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        text += f"\n{function.get('name')}({function.get('arguments')})"
    return {"role": role if role in WIRE_ROLES else "system", "content": text.strip("\n")}


class GroupMaker:
    """Makes groups of exactly `group_size` rollouts out of the sessions of one task after another.

    Where every session is one rollout, they are one group with their rewards as scores, whose advantages the trainer
    computes. Where a session branched, so that there are more rollouts than sessions, every rollout carries the advantage of
    its session, in comparison with the other sessions: a session does not count more often in the mean because it
    branched. Such rollouts need no group, and are sent in groups of the usual size, across tasks: Atropos' queue makes
    no batch of uneven ones. What is too little for a group waits for the next.

    Args:
        group_size (`int`):
            Sessions of a task, and rollouts of a group.
        temperature (`float`):
            At which they were sampled.
        scale_rewards (`bool`, *optional*, defaults to `True`):
            Whether explicit advantages are divided by the standard deviation of the sessions' rewards, as the trainer's
            `--scale_rewards group` does.
    """

    def __init__(self, group_size: int, temperature: float, scale_rewards: bool = True):
        self.group_size = group_size
        self.temperature = temperature
        self.scale_rewards = scale_rewards
        self._waiting: list[tuple[SessionRollout, float, float]] = []

    @property
    def num_waiting_rollouts(self) -> int:
        """Rollouts that wait for others to make a group."""
        return len(self._waiting)

    def add(self, sessions: Sequence[FinishedSession]) -> list[dict[str, Any]]:
        """Return the groups that are ready, with the `group_size` sessions of one task."""
        if all(len(session.rollouts) == 1 for session in sessions):
            scored = [(session.rollouts[0], session.reward) for session in sessions]
            return [self._group(scored)]
        rewards = [session.reward for session in sessions]
        for session, advantage in zip(sessions, self._advantages(rewards), strict=True):
            self._waiting += [(rollout, session.reward, advantage) for rollout in session.rollouts]
        groups = []
        while len(self._waiting) >= self.group_size:
            taken, self._waiting = self._waiting[: self.group_size], self._waiting[self.group_size :]
            group = self._group([(rollout, reward) for rollout, reward, _ in taken])
            group["advantages"] = [
                [0.0 if label == UNTRAINED_LABEL else advantage for label in rollout.masks]
                for rollout, _, advantage in taken
            ]
            groups.append(group)
        return groups

    def _advantages(self, rewards: Sequence[float]) -> list[float]:
        mean = statistics.fmean(rewards)
        scale = statistics.stdev(rewards) + STD_EPSILON if self.scale_rewards and len(rewards) > 1 else 1.0
        return [(reward - mean) / scale for reward in rewards]

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
