"""What travels between the stages of the data plane: typed, validated, immutable.

Shape letters: T tokens of one rollout, K tokens that a teacher names for a position.

Every per-token tensor is aligned with the token it belongs to (label position): entry t describes token t, which the
model predicts from tokens 0..t-1. The causal shift happens once, in `policy/logprobs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    import torch

    from .errors import AtroposProtocolError


IGNORE_INDEX = -100
"""Label of a token that is not trained: on the Atropos wire and in `torch.nn.functional.cross_entropy` alike."""

MISSING_LOGPROB = 1.0
"""What the wire puts into `inference_logprobs` where there is no logprob (prompt tokens, or the server gave none)."""


NO_TOKEN = -1
"""Id in `Rollout.teacher_token_ids` where the teacher named fewer tokens than elsewhere."""


class Position(NamedTuple):
    """A place in the data of a run, before a group: the unit that no resume may skip or train twice.

    Args:
        batch (`int`):
            Number of the batch in the journal, or of the pass over recorded data, from 0.
        group (`int`):
            Number of the group in it, from 0.
    """

    batch: int
    group: int


START = Position(0, 0)
"""Where the data of a run begins."""


class ServedCall(NamedTuple):
    """What a server remembers of a completion that it sampled.

    Args:
        policy_version (`int`):
            Version of the oldest policy that sampled any of its tokens.
        sampling_parameters (`tuple[str, ...]`, *optional*):
            Names of the parameters with which another distribution was sampled than the policy's own, sorted.
    """

    policy_version: int
    sampling_parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class RolloutOrigin:
    """Where a rollout came from; as text, how messages name it.

    Args:
        env_id (`int`, *optional*):
            The API's number of the environment.
        group (`int`):
            Number of the rollout's group in the batch, from 0; in recorded data, in the pass.
        rollout (`int`):
            Number of the rollout in its group, from 0.
    """

    env_id: int | None
    group: int
    rollout: int

    def __str__(self) -> str:
        return f"environment {self.env_id}, group {self.group}, rollout {self.rollout}"


@dataclass(frozen=True)
class Rollout:
    """One sampled sequence with its credit.

    Args:
        input_ids (`torch.Tensor` of shape `(T,)`, int64):
            Prompt and completion, unpadded.
        labels (`torch.Tensor` of shape `(T,)`, int64):
            The token id where the token is trained, -100 elsewhere. May be -100 in the middle (tool and user turns).
        reward (`float`):
            The environment's score of the whole rollout; finite.
        advantages (`torch.Tensor` of shape `(T,)`, float32, *optional*):
            Token-level advantages from the environment; they replace those made from the rewards. 0 where untrained.
        inference_logprobs (`torch.Tensor` of shape `(T,)`, float32, *optional*):
            Logprobs in nats under the policy that sampled; NaN where the wire had none. None if any trained token has none.
        ref_logprobs (`torch.Tensor` of shape `(T,)`, float32, *optional*):
            Logprobs in nats under a reference policy, as the environment sent them.
        set_advantage_to_zero (`bool`):
            The environment asked for this rollout to count in its group's mean but not to push the policy.
        advantage_scale (`float`, *optional*, defaults to 1.0):
            Factor of the advantages after normalisation and clipping, in [0, 1]: below 1 if the rollout is down-weighted.
        temperature (`float`, *optional*):
            Sampling temperature, if the wire says so.
        teacher_token_ids (`torch.Tensor` of shape `(T, K)`, int64, *optional*):
            The likeliest tokens of a teacher for each position, for distillation; -1 where it named fewer.
        teacher_logprobs (`torch.Tensor` of shape `(T, K)`, float32, *optional*):
            Logprobs in nats of these tokens under the teacher; -inf where there is no token.
        origin ([`RolloutOrigin`], *optional*):
            Where the rollout came from; None if it was made by hand.
        messages (`tuple[dict, ...]`, *optional*):
            The turns as the environment shows them, for people; the tokens are what is trained.
        policy_version (`int`, *optional*):
            Version of the oldest policy that sampled any trained token, in whichever turn. None when unknown, never a
            guess.
        sampling_parameters (`tuple[str, ...]`, *optional*):
            Names of the parameters, sorted, with which any call sampled another distribution than the policy's own, as far
            as the server remembers it.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    reward: float
    advantages: torch.Tensor | None = None
    inference_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    set_advantage_to_zero: bool = False
    advantage_scale: float = 1.0
    temperature: float | None = None
    policy_version: int | None = None
    teacher_token_ids: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None
    origin: RolloutOrigin | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    sampling_parameters: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length of the sequence, prompt included."""
        return self.input_ids.numel()

    @property
    def num_trained_tokens(self) -> int:
        """Number of trained tokens: labels that are not -100. Token 0 has no prediction and never counts."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())

    def staleness(self, policy_version: int) -> int | None:
        """How many publishes lie between the policy that sampled it and this one; None if the former is unknown.

        A distance without sign: after a resume from an older checkpoint, rollouts may come from a later policy.

        Args:
            policy_version (`int`):
                Version of the trainer's policy now.
        """
        return None if self.policy_version is None else abs(policy_version - self.policy_version)


@dataclass(frozen=True)
class RolloutGroup:
    """The rollouts of one prompt: the unit of advantage.

    Args:
        rollouts (`tuple[Rollout, ...]`):
            The rollouts, at least one.
        env_id (`int`, *optional*):
            The API's number of the environment that sent the group.
        unknown_fields (`tuple[str, ...]`, *optional*):
            Names of fields that came with the group and that nobody reads.
    """

    rollouts: tuple[Rollout, ...]
    env_id: int | None = None
    unknown_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class RejectedGroup:
    """A group that the wire delivered and validation refused.

    Args:
        index (`int`):
            Number in the batch, from 0; in recorded data, in the pass.
        env_id (`int`, *optional*):
            The environment that sent it.
        num_rollouts (`int`):
            How many rollouts are lost with it, as far as that can be told.
        error (`AtroposProtocolError`):
            Why it was refused.
        reason (`str`, *optional*, defaults to `"invalid"`):
            The same in one word, for counting: mostly the name of the field.
    """

    index: int
    env_id: int | None
    num_rollouts: int
    error: AtroposProtocolError
    reason: str = "invalid"


@dataclass(frozen=True)
class RolloutBatch:
    """One answer of `/batch`, validated.

    Args:
        groups (`tuple[RolloutGroup, ...]`):
            The groups that may be trained, in the order of the wire.
        rejected (`tuple[RejectedGroup, ...]`):
            The groups that may not.
    """

    groups: tuple[RolloutGroup, ...]
    rejected: tuple[RejectedGroup, ...] = ()

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """All rollouts of all accepted groups, in order."""
        return tuple(rollout for group in self.groups for rollout in group.rollouts)
