"""From a batch as it came to one that is checked and whose policies are known. Runs on rank 0, on the prefetching thread."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..types import RolloutBatch, RolloutGroup
from ..wire.journal import Journal
from ..wire.parse import WireLimits, parse_batch
from .policy_versions import CallLookup, set_policy_versions, with_policy_versions
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

    `lookup` maps rollout keys to what servers remember of the calls; None: versions are unknown unless the environment sent
    them. The versions are noted in `journal` for a resume, because the server remembers them for a while only; None
    for recorded data.
    """

    limits: WireLimits
    progress: Progress
    lookup: CallLookup | None = None
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
            batch = parse_batch(fetched.raw_groups, self.limits, first_index=fetched.position.group)
            groups, fetched_version = self._add_versions(fetched, batch)
            yield PreparedBatch(
                fetched, replace(batch, groups=tuple(groups)), fetched_version, now, time.monotonic() - start
            )

    def _add_versions(self, fetched: FetchedBatch, batch: RolloutBatch) -> tuple[list[RolloutGroup], int | None]:
        noted = fetched.versions
        if noted is not None:
            rows = [row for row in noted.rows if row is not None]
            # Another vocabulary or length than before the resume refuses other groups.
            if [len(row) for row in rows] == [len(group.rollouts) for group in batch.groups]:
                return set_policy_versions(batch.groups, rows), noted.fetched_version
        # Before the lookup: what is fetched now cannot come from a later policy than this.
        fetched_version = None if fetched.is_replayed else self.progress.policy_version
        found = list(batch.groups) if self.lookup is None else with_policy_versions(batch.groups, self.lookup)
        if self.journal is not None:
            self._note_versions(self.journal, fetched, batch, found, fetched_version)
        return found, fetched_version

    def _note_versions(
        self,
        journal: Journal,
        fetched: FetchedBatch,
        batch: RolloutBatch,
        groups: Sequence[RolloutGroup],
        fetched_version: int | None,
    ) -> None:
        """Write down the versions of every group, null for a refused one."""
        first = fetched.position.group
        refused = {group.index for group in batch.rejected}
        rows = iter([[rollout.policy_version for rollout in group.rollouts] for group in groups])
        journal.mark(
            "versions",
            fetched.position.batch,
            first_group=first,
            fetched_version=fetched_version,
            policy_versions=[
                None if index in refused else next(rows) for index in range(first, first + len(fetched.raw_groups))
            ],
        )
