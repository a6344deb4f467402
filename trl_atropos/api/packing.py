"""Which groups of the queue make a batch: the rules of atroposlib 0.4.0, which never splits a group.

Groups of equal size are collected into packs of as many rollouts as the largest group of the queue has, and packs are
taken, oldest first, until they have exactly `batch_size` rollouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple


class QueuedGroup(NamedTuple):
    """What the memory holds of a stored group.

    `num_bytes` are those of its body as it is stored. `missing` has a bit for each optional field that the body does not
    have, in the order of [`~api.scored_data.OPTIONAL_FIELDS`].
    """

    id: int
    num_rollouts: int
    env_id: int | None
    num_bytes: int
    missing: int


def choose_batch(groups: Iterable[QueuedGroup], batch_size: int, max_group_size: int) -> list[QueuedGroup] | None:
    """Choose the groups of the next batch, oldest first; None if they make none.

    `groups` are those of the queue, oldest first, and `max_group_size` the rollouts of the largest of them.
    """
    open_packs: dict[int, list[QueuedGroup]] = defaultdict(list)
    batch: list[QueuedGroup] = []
    num_rollouts = 0
    for group in groups:
        size = group.num_rollouts
        pack = open_packs[size]
        pack.append(group)
        if len(pack) * size != max_group_size:
            continue
        for member in pack:
            batch.append(member)
            num_rollouts += size
            if num_rollouts == batch_size:
                return batch
            if num_rollouts > batch_size:
                return None
        pack.clear()
    return None


def choose_batch_with_allocations(
    groups: Iterable[QueuedGroup], batch_size: int, max_group_size: int, allocations: Mapping[int, float]
) -> list[QueuedGroup] | None:
    """Choose the groups of the next batch where environments are promised a share of it; None if they make none.

    `allocations` are the shares, 0 to 1, by environment, in the order of registration; it is not empty. Groups without an
    environment are not taken. `groups` is gone through more than once.
    """
    packable = _packable_by_environment(groups, max_group_size)
    minimums = _minimums(packable, {group.env_id for group in groups}, batch_size, allocations)
    if minimums is None:
        return None
    batch: list[QueuedGroup] = []
    taken: set[int] = set()
    num_rollouts = 0
    for env_id, minimum in minimums.items():
        num_of_env = 0
        for group in packable[env_id]:
            if num_of_env >= minimum:
                break
            if num_rollouts + group.num_rollouts <= batch_size:
                batch.append(group)
                taken.add(group.id)
                num_of_env += group.num_rollouts
                num_rollouts += group.num_rollouts
    left = {group.id for of_env in packable.values() for group in of_env} - taken
    for group in groups:
        if num_rollouts == batch_size:
            break
        if group.id in left and num_rollouts + group.num_rollouts <= batch_size:
            batch.append(group)
            num_rollouts += group.num_rollouts
    return batch if num_rollouts == batch_size else None


def _packable_by_environment(groups: Iterable[QueuedGroup], max_group_size: int) -> dict[int, list[QueuedGroup]]:
    """The groups of whole packs, each pack of one environment and one size; an environment may have none."""
    open_packs: dict[tuple[int, int], list[QueuedGroup]] = defaultdict(list)
    packable: dict[int, list[QueuedGroup]] = {}
    for group in groups:
        if group.env_id is None:
            continue
        of_env = packable.setdefault(group.env_id, [])
        pack = open_packs[group.env_id, group.num_rollouts]
        pack.append(group)
        if len(pack) * group.num_rollouts == max_group_size:
            of_env.extend(pack)
            pack.clear()
    return packable


def _minimums(
    packable: Mapping[int, list[QueuedGroup]],
    queued_env_ids: Collection[int | None],
    batch_size: int,
    allocations: Mapping[int, float],
) -> dict[int, int] | None:
    """Rollouts that each environment must have in the batch; None if one that is promised some has no whole pack."""
    minimums = {}
    for env_id, share in allocations.items():
        minimum = int(batch_size * share)
        if minimum <= 0:
            continue
        if env_id not in queued_env_ids or not packable[env_id]:
            return None
        minimums[env_id] = minimum
    total = sum(minimums.values())
    if total > batch_size:
        scale = batch_size / total
        for env_id in minimums:
            smallest = min(group.num_rollouts for group in packable[env_id])
            minimums[env_id] = max(smallest, int(minimums[env_id] * scale))
    return minimums


def indices_summing_to(sizes: Sequence[int], target: int) -> list[int]:
    """Indices, ascending, of sizes that sum to `target`, earlier ones first where that is possible; empty if none do."""
    total = 0
    indices = []
    for index, size in enumerate(sizes):
        if total + size <= target:
            indices.append(index)
            total += size
            if total == target:
                return indices
    # Bit s of reachable[i]: some of the first i sizes sum to s.
    reachable = [1]
    within_target = (1 << (target + 1)) - 1
    for size in sizes:
        reachable.append((reachable[-1] | reachable[-1] << size) & within_target)
    if not reachable[-1] >> target & 1:
        return []
    indices, rest = [], target
    for index in range(len(sizes) - 1, -1, -1):
        if rest >= sizes[index] and reachable[index] >> (rest - sizes[index]) & 1:
            indices.append(index)
            rest -= sizes[index]
    return indices[::-1]
