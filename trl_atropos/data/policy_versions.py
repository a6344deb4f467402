"""Which policy sampled a rollout, of one call or of many.

The server remembers, for every call that it finished, the oldest policy that sampled any of its completion, under a
digest of prompt and completion and of the border between them (`rollout_key.py`). In a rollout of several turns each run
of trained tokens is one completion, and what lies before it is the prompt of that call. The end of sequence that a chat
template writes after the sampled one is masked, so a run ends where the call ended.

The version is unknown where runs are not completions: two calls without a masked token between them look like one of
another prompt; an environment may cut a completion, mask a part of it, or train tokens of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..types import IGNORE_INDEX, Rollout, RolloutGroup
from ..wire.rollout_key import span_keys


PolicyVersionLookup = Callable[[Sequence[str]], Sequence["int | None"]]
"""Keys of calls -> the oldest policy version that sampled any token of each; None where nobody knows."""


def with_policy_versions(groups: Sequence[RolloutGroup], lookup: PolicyVersionLookup) -> list[RolloutGroup]:
    """Look up which policy sampled every rollout of a batch, in one request.

    A rollout gets the version of the oldest policy that sampled any of its trained tokens; None where that of any run
    of trained tokens is unknown: never a guess. A version that the environment sent stays.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    keys = [
        span_keys(rollout.input_ids.tolist(), trained_spans(rollout)) if rollout.policy_version is None else []
        for rollout in rollouts
    ]
    answers = iter(lookup([key for of_rollout in keys for key in of_rollout]))
    versions = iter(
        [
            _oldest([next(answers) for _ in of_rollout]) if rollout.policy_version is None else rollout.policy_version
            for rollout, of_rollout in zip(rollouts, keys, strict=True)
        ]
    )
    return set_policy_versions(groups, [[next(versions) for _ in group.rollouts] for group in groups])


def set_policy_versions(
    groups: Sequence[RolloutGroup], versions: Sequence[Sequence[int | None]]
) -> list[RolloutGroup]:
    """Give every rollout of every group its version: `versions` has one row per group with one entry per rollout."""
    return [
        replace(
            group,
            rollouts=tuple(
                replace(rollout, policy_version=version) for rollout, version in zip(group.rollouts, row, strict=True)
            ),
        )
        for group, row in zip(groups, versions, strict=True)
    ]


def trained_spans(rollout: Rollout) -> list[tuple[int, int]]:
    """Runs of trained tokens: the first token of each and the one after its last, ascending."""
    is_trained = rollout.labels != IGNORE_INDEX
    changes = torch.diff(torch.nn.functional.pad(is_trained.int(), (1, 1)))
    starts, ends = (changes == 1).nonzero()[:, 0], (changes == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _oldest(versions: Sequence[int | None]) -> int | None:
    known = [version for version in versions if version is not None]
    return min(known) if known and len(known) == len(versions) else None
