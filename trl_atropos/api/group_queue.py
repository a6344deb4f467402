"""The index of the queue: which groups are stored, without their bodies, and counts of them that cost nothing to ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeVar

from .packing import QueuedGroup


T = TypeVar("T")


class GroupQueue:
    """Groups in the order in which they are handed out.

    `num_bytes` are those of all bodies as stored, `num_rollouts` those of all groups; `num_rollouts_of` counts rollouts by
    environment, None among them for groups without one.
    """

    def __init__(self, groups: Iterable[QueuedGroup] = ()):
        self.num_bytes = 0
        self.num_rollouts = 0
        self.num_rollouts_of: Counter[int | None] = Counter()
        self._groups: dict[int, QueuedGroup] = {}
        self._sizes: Counter[int] = Counter()
        self._sizes_of: dict[int | None, Counter[int]] = {}
        for group in groups:
            self.append(group)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[QueuedGroup]:
        return iter(self._groups.values())

    @property
    def max_group_size(self) -> int:
        """Rollouts of the largest group; 1 if there is none."""
        return max(self._sizes, default=1)

    def max_group_size_of(self, env_id: int) -> int:
        """Rollouts of the largest group of an environment; 0 if it has none."""
        return max(self._sizes_of.get(env_id, ()), default=0)

    def append(self, group: QueuedGroup) -> None:
        """Put a group at the end."""
        self._groups[group.id] = group
        self._count(group, 1)

    def put_back(self, groups: Iterable[QueuedGroup]) -> None:
        """Put groups that were removed at the head again, in their order."""
        head = {group.id: group for group in groups}
        self._groups = {**head, **self._groups}
        for group in head.values():
            self._count(group, 1)

    def remove(self, groups: Iterable[QueuedGroup]) -> None:
        """Take groups out."""
        for group in groups:
            del self._groups[group.id]
            self._count(group, -1)

    def _count(self, group: QueuedGroup, sign: int) -> None:
        self.num_bytes += sign * group.num_bytes
        self.num_rollouts += sign * group.num_rollouts
        sizes_of = self._sizes_of.setdefault(group.env_id, Counter())
        _add(self.num_rollouts_of, group.env_id, sign * group.num_rollouts)
        _add(self._sizes, group.num_rollouts, sign)
        _add(sizes_of, group.num_rollouts, sign)
        if not sizes_of:
            del self._sizes_of[group.env_id]


def _add(counter: Counter[T], key: T, amount: int) -> None:
    """Count, and keep no zeros: the keys are asked for."""
    counter[key] += amount
    if not counter[key]:
        del counter[key]
