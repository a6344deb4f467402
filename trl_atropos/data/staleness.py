"""What becomes of rollouts that an old policy sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..types import RolloutGroup


STALE_ROLLOUTS = ("drop", "downweight")


@dataclass(frozen=True)
class StalenessResult:
    """The groups of a step, sorted by age.

    Args:
        kept (`list[RolloutGroup]`):
            What is trained, in order; those above the limit with a smaller `advantage_scale` if they are down-weighted.
        dropped (`list[RolloutGroup]`):
            What is not.
        num_downweighted (`int`):
            Groups of `kept` that count less.
    """

    kept: list[RolloutGroup]
    dropped: list[RolloutGroup]
    num_downweighted: int = 0


def group_staleness(group: RolloutGroup, policy_version: int, fetched_version: int | None) -> int | None:
    """The staleness of a group: that of its stalest rollout ([`Rollout.staleness`]).

    Args:
        group ([`RolloutGroup`]):
            The group.
        policy_version (`int`):
            The trainer's.
        fetched_version (`int`, *optional*):
            The trainer's when the group was fetched: no rollout is from a later policy. For rollouts of unknown version it
            gives the least that the staleness can be.

    Returns:
        `int`, *optional*: None if nothing is known.
    """
    of_unknown = None if fetched_version is None else abs(policy_version - fetched_version)
    staleness = [rollout.staleness(policy_version) for rollout in group.rollouts]
    known = [of_unknown if value is None else value for value in staleness]
    return max((value for value in known if value is not None), default=None)


def limit_staleness(
    groups: Sequence[RolloutGroup],
    policy_version: int,
    fetched_version: int | None,
    max_staleness: int | None,
    stale_rollouts: str,
) -> StalenessResult:
    """Drop or down-weight the groups that are staler than `max_staleness`, whole: half a group has another mean reward.

    Args:
        groups (`Sequence[RolloutGroup]`):
            Of one batch.
        policy_version (`int`), fetched_version (`int`, *optional*):
            See [`group_staleness`].
        max_staleness (`int`, *optional*):
            Largest staleness that is trained as it is, in publishes. None: no limit.
        stale_rollouts (`str`):
            `"drop"`, or `"downweight"`: the advantages of a group of staleness s count `(max_staleness + 1) / (s + 1)`.
    """
    if max_staleness is None:
        return StalenessResult(list(groups), [])
    kept, dropped, num_downweighted = [], [], 0
    for group in groups:
        staleness = group_staleness(group, policy_version, fetched_version)
        if staleness is None or staleness <= max_staleness:
            kept.append(group)
        elif stale_rollouts == "drop":
            dropped.append(group)
        else:
            scale = (max_staleness + 1) / (staleness + 1)
            kept.append(
                replace(group, rollouts=tuple(replace(rollout, advantage_scale=scale) for rollout in group.rollouts))
            )
            num_downweighted += 1
    return StalenessResult(kept, dropped, num_downweighted)
