"""What becomes of rollouts that an old policy sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..types import RolloutGroup


STALE_ROLLOUTS = ("drop", "downweight")


@dataclass(frozen=True)
class StalenessResult:
    """The groups of a batch, sorted by age.

    `kept` is trained, in order; `num_downweighted` of these groups are above the limit and have a smaller
    `advantage_scale`. `dropped` is not trained.
    """

    kept: list[RolloutGroup]
    dropped: list[RolloutGroup]
    num_downweighted: int = 0


def group_staleness(group: RolloutGroup, policy_version: int, fetched_version: int | None) -> int | None:
    """The staleness of a group, in publishes: that of its stalest rollout ([`Rollout.staleness`]).

    `policy_version` is the trainer's now. `fetched_version` is what it was when the group was fetched, None if that is
    unknown: no rollout is from a later policy, so for rollouts of unknown version it gives the least that the
    staleness can be. The staleness is None if nothing is known.
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
    """Drop or down-weight the groups of a batch that are staler than `max_staleness`.

    A group is dropped whole, because half a group has another mean reward. The versions are those of
    [`group_staleness`]. `max_staleness` is the largest staleness, in publishes, that is trained as it is; None: no
    limit. `stale_rollouts` is `"drop"`, or `"downweight"`: the advantages of a group of staleness s count
    `(max_staleness + 1) / (s + 1)`.
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
