"""From a batch as it came to one that is checked and whose policies are known. Runs on rank 0, on the prefetching thread."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..types import RolloutBatch, RolloutGroup
from ..wire.journal import Journal
from ..wire.parse import WireLimits, parse_batch
from .policy_versions import PolicyVersionLookup, set_policy_versions, with_policy_versions
from .sources import FetchedBatch


class Progress(Protocol):
    """How far the trainer has come, asked whenever it matters: it moves on while batches are fetched."""

    @property
    def policy_version(self) -> int:
        """Number of the policy that was published last, 0 before the first publish."""
        ...

    @property
    def global_step(self) -> int:
        """Optimizer steps done so far."""
        ...

    @property
    def num_steps_left(self) -> int:
        """Optimizer steps that are still to be made: no batch is fetched beyond them."""
        ...


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that is checked and whose policies are looked up.

    `batch` has the good groups of `fetched`, with policy versions, and the refused ones; it is empty if the batch was
    lost. `fetched_version` is the trainer's policy version when the batch came, None if that is not known any more;
    `fetched_at` is when it came, by `time.monotonic`; `fetch_s` is the number of seconds that fetching and checking
    took.
    """

    fetched: FetchedBatch
    batch: RolloutBatch
    fetched_version: int | None
    fetched_at: float
    fetch_s: float


@dataclass(frozen=True)
class BatchPreparer:
    """Checks batches and looks up which policies sampled them. Runs on rank 0, on the prefetching thread.

    `lookup` maps rollout keys to the versions that sampled them; None: they are unknown unless the environment sent
    them. The versions are noted in `journal` for a resume, because the server remembers them for a while only; None
    for recorded data.
    """

    limits: WireLimits
    progress: Progress
    lookup: PolicyVersionLookup | None = None
    journal: Journal | None = None

    def __call__(self, batches: Iterator[FetchedBatch]) -> Iterator[PreparedBatch]:
        """Prepare one batch after the other."""
        while True:
            start = time.monotonic()
            fetched = next(batches, None)
            if fetched is None:
                return
            now = time.monotonic()
            if fetched.loss is not None:
                yield PreparedBatch(fetched, RolloutBatch(()), None, now, now - start)
                continue
            batch = parse_batch(fetched.raw_groups, self.limits)
            groups, fetched_version = self._add_versions(fetched, batch.groups)
            yield PreparedBatch(
                fetched, replace(batch, groups=tuple(groups)), fetched_version, now, time.monotonic() - start
            )

    def _add_versions(
        self, fetched: FetchedBatch, groups: Sequence[RolloutGroup]
    ) -> tuple[list[RolloutGroup], int | None]:
        mark = fetched.versions
        if mark is not None and [len(row) for row in mark["policy_versions"]] == [len(g.rollouts) for g in groups]:
            return set_policy_versions(groups, mark["policy_versions"]), mark["fetched_version"]
        # Before the lookup: what is fetched now cannot come from a later policy than this.
        fetched_version = None if fetched.is_replayed else self.progress.policy_version
        found = list(groups) if self.lookup is None else with_policy_versions(groups, self.lookup)
        if self.journal is not None:
            versions = [[rollout.policy_version for rollout in group.rollouts] for group in found]
            self.journal.mark("versions", fetched.number, fetched_version=fetched_version, policy_versions=versions)
        return found, fetched_version
