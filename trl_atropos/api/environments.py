"""What an environment is told of the queue, by which it makes out how far it may run ahead; the rules are atroposlib's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .group_queue import GroupQueue


MIN_ENV_WEIGHT = 0.01
"""Least share of an environment in the concurrency of all."""


def allocations_of(environments: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The shares of a batch, 0 to 1, that connected environments are promised, by environment."""
    return {
        environment["registered_id"]: environment["min_batch_allocation"]
        for environment in environments
        if environment["connected"] and environment["min_batch_allocation"] is not None
    }


def shares_of(
    environment: Mapping[str, Any], environments: Sequence[Mapping[str, Any]], queue: GroupQueue, batch_size: int
) -> dict[str, Any]:
    """The answer of `/status-env` but for the step: the shares of one environment in the queue and in the concurrency.

    `queue_size` and `self_queue_size` are in groups of the size of the environment. The rollouts of others count in whole
    packs of the largest group, without what these others are promised of a batch of `batch_size` rollouts.
    """
    env_id, group_size = environment["registered_id"], environment["group_size"]
    total = sum(other["max_context_len"] * max(0.0, other["weight"]) for other in environments if other["connected"])
    weight = environment["max_context_len"] * environment["weight"] / total if total else 0.0
    allocations = allocations_of(environments)
    largest = queue.max_group_size
    of_itself = queue.num_rollouts_of[env_id]
    of_others = 0
    if largest > 1:
        for other, num_rollouts in queue.num_rollouts_of.items():
            if other != env_id:
                promised = 0 if other is None else int(batch_size * allocations.get(other, 0.0))
                of_others += max(0, math.ceil(num_rollouts / largest) * largest - promised)
    return {
        "queue_size": (of_itself + of_others) // group_size,
        "unallocated_fraction": 1.0 - min(sum(allocations.values()), 1.0),
        "self_queue_size": of_itself // group_size,
        "max_group_size": largest,
        "env_weight": max(MIN_ENV_WEIGHT, weight),
    }
