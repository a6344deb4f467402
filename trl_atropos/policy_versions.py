"""Which policy sampled a rollout, of one call or of many.

The server remembers, for every sequence that it finished, the oldest policy that sampled any of its new tokens, under a digest of
prompt and completion (`rollout_key.py`). A rollout of several turns is several such sequences, each a prefix of the next: the
prefix that ends where a run of trained tokens ends is what one call answered.

Two calls without a masked token between them look like one: then only the last of them is looked up, and the version is that of
its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .rollout_key import prefix_keys
from .types import IGNORE_INDEX, Rollout, RolloutGroup


PolicyVersionLookup = Callable[[Sequence[str]], Sequence["int | None"]]
"""Keys of sequences -> the oldest policy version that sampled any new token of each; None where nobody knows."""


def with_policy_versions(groups: Sequence[RolloutGroup], lookup: PolicyVersionLookup) -> list[RolloutGroup]:
    """Look up which policy sampled every rollout, in one request.

    Args:
        groups (`Sequence[RolloutGroup]`):
            Of one batch.
        lookup (`PolicyVersionLookup`):
            Asks the servers.

    Returns:
        `list[RolloutGroup]`: with the version of the oldest policy that sampled a trained token of each rollout. None where that
        of any run of trained tokens is unknown: never a guess. A version that the environment sent stays.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.policy_version is None]
    keys = [prefix_keys(rollout.input_ids.tolist(), span_ends(rollout)) for rollout in rollouts]
    versions = iter(lookup([key for of_rollout in keys for key in of_rollout]))
    found = {id(rollout): _oldest([next(versions) for _ in row]) for rollout, row in zip(rollouts, keys, strict=True)}
    return [
        replace(
            group,
            rollouts=tuple(
                replace(rollout, policy_version=found[id(rollout)]) if id(rollout) in found else rollout
                for rollout in group.rollouts
            ),
        )
        for group in groups
    ]


def span_ends(rollout: Rollout) -> list[int]:
    """Where runs of trained tokens end: for each the number of tokens up to and including its last one, ascending."""
    is_trained = rollout.labels != IGNORE_INDEX
    goes_on = torch.zeros_like(is_trained)
    goes_on[:-1] = is_trained[1:]
    return ((is_trained & ~goes_on).nonzero().squeeze(-1) + 1).tolist()


def _oldest(versions: Sequence[int | None]) -> int | None:
    known = [version for version in versions if version is not None]
    return min(known) if known and len(known) == len(versions) else None
