"""Where batches come from: the Atropos API, the journal after a resume, or recorded data.

A batch of the API is in the journal before anybody else sees it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..checks.api import data_timeout, describe_wait, inspect_api
from ..errors import (
    AtroposAnswerLost,
    AtroposBatchGivenAway,
    AtroposBatchLost,
    AtroposConnectionError,
    AtroposProtocolError,
    AtroposRegistrationError,
)
from ..progress import Reminder
from ..types import Position
from ..wire.api_watch import ApiWatch
from ..wire.client import FIRST_DELAY_S, UNREGISTERED, AtroposClient
from ..wire.journal import Journal
from ..wire.recorded import OfflineData, num_rollouts, pack
from .options import DataOptions


logger = logging.getLogger(__name__)

DELAY_GROWTH = 1.25
"""From one poll to the next. A batch that is ready waits for a fifth of the time waited so far, at most."""


@dataclass(frozen=True)
class NotedVersions:
    """What the journal knows of the policies that sampled the groups of a batch.

    `rows` has one entry per group: a policy version or None per rollout, or None if the group was refused.
    `fetched_version` is the trainer's policy version when the batch came, None if that was not known.
    """

    rows: list[list[int | None] | None]
    fetched_version: int | None


@dataclass(frozen=True)
class FetchedBatch:
    """Groups that are trained in one step, as they came.

    `raw_groups` are the groups as JSON gave them, `position` is the place of the first one, and `next_position` that of
    what follows. A batch that the API took from its queue and could not hand out has no groups, `loss` says why, and
    its place is that of the next batch: it does not count. `is_replayed` says that the groups were fetched before a
    resume, and `versions` what the journal knows of the policies behind a replayed batch, if it knows them all.
    """

    position: Position
    raw_groups: list[dict[str, Any]]
    next_position: Position
    is_replayed: bool = False
    versions: NotedVersions | None = None
    loss: AtroposBatchLost | None = None


class ApiBatches:
    """The batches of a live API, each on the disk before it is handed on. Iterate once.

    An API that goes away is waited for; one that was restarted is registered with again, by calling `register`. An API that
    keeps batches (`trl-atropos api`) is asked for them by the numbers of the journal, and told when they are in it: a batch
    that did not get there comes again, after a restart of either side, too.

    `num_restarts` counts the restarts of the API, `num_batches_maybe_lost` the requests for a batch that were sent and
    whose answer did not arrive, `num_batches_lost` the batches that the API could not write as JSON. `watch` has what the API
    shows of itself, looked at with every batch.
    """

    def __init__(self, client: AtroposClient, journal: Journal, options: DataOptions, register: Callable[[], None]):
        self.client = client
        self.journal = journal
        self.options = options
        self.register = register
        self.watch = ApiWatch(client)
        self.num_restarts = 0
        self.num_batches_maybe_lost = 0
        self.num_batches_lost = 0
        self._stop = threading.Event()

    def __iter__(self) -> Iterator[FetchedBatch]:
        while not self._stop.is_set():
            self.journal.make_room()
            try:
                raw_groups = self._wait()
            except AtroposBatchLost as exc:
                self.num_batches_lost += 1
                here = Position(self.journal.next_batch, 0)
                yield FetchedBatch(here, [], here, loss=exc)
                continue
            if raw_groups is None:
                return
            number = self.journal.append(raw_groups)
            if not self._acknowledge_last():
                continue
            self.watch.look()
            yield FetchedBatch(Position(number, 0), raw_groups, Position(number + 1, 0))

    def begin(self) -> None:
        """Register with the API, and confirm the journal.

        An API that keeps everything may be on its way back; of another one it would not be known what it lost.
        """
        deadline = time.monotonic() + self.options.api_timeout_s
        while True:
            try:
                self.register()
                break
            except AtroposConnectionError as exc:
                if not self.client.keeps_batches or time.monotonic() >= deadline:
                    raise
                logger.warning(f"{exc.what} Waiting for the API (--api_timeout_s).")
                self.client.wait_until_reachable(self.options.api_timeout_s)
        self.confirm_journal()
        self.watch.look()

    def confirm_journal(self) -> None:
        """Give the receipt of the last batch of a journal that an earlier run wrote, before any of it is used.

        If that run was killed while it wrote the batch, the API still has the whole of it, and the half is taken out.
        """
        if self.journal.num_groups_of_last:
            self._acknowledge_last()

    def stop(self) -> None:
        """Do not ask for another batch."""
        self._stop.set()

    def _wait(self) -> list[dict[str, Any]] | None:
        """Poll until there is a batch; None if stopped."""
        options = self.options
        reminder, delay = Reminder(), FIRST_DELAY_S
        while not self._stop.is_set():
            elapsed = reminder.elapsed_s
            try:
                raw_groups = self._fetch()
                if raw_groups is not None:
                    return _checked(raw_groups)
                if elapsed >= options.batch_timeout_s:
                    raise data_timeout(elapsed, inspect_api(self.client, has_waiting_trainer=True))
                if reminder.is_due():
                    logger.info(describe_wait(elapsed, inspect_api(self.client, has_waiting_trainer=True)))
            except (AtroposConnectionError, AtroposRegistrationError) as exc:
                if not self.client.keeps_batches:
                    self._recover(exc)
                    # Environments have to be started again, too.
                    reminder, delay = Reminder(), FIRST_DELAY_S
                    continue
                if elapsed >= options.batch_timeout_s:
                    raise
                self._recover(exc)
            self._stop.wait(min(delay, options.refresh_interval, max(options.batch_timeout_s - elapsed, 0.0)))
            delay *= DELAY_GROWTH
        return None

    def _fetch(self) -> list[Any] | None:
        if not self.client.keeps_batches:
            return self.client.fetch_batch()
        return self.client.fetch_batch(self.journal.trainer_id(), self.journal.next_batch)

    def _acknowledge_last(self) -> bool:
        """Tell the API that the last batch of the journal is in it; False if it must not be used, and was taken out."""
        number, num_groups = self.journal.next_batch - 1, self.journal.num_groups_of_last
        deadline = time.monotonic() + self.options.api_timeout_s
        while self.client.keeps_batches:
            try:
                if self.client.acknowledge(self.journal.trainer_id(), number, num_groups):
                    return True
                logger.warning(
                    f"Batch {number} of the journal was not written whole ({num_groups} groups); it is fetched again."
                )
            except AtroposBatchGivenAway as exc:
                logger.error(f"{exc} It is taken out of the journal and not trained here.")
            except AtroposConnectionError as exc:
                if time.monotonic() >= deadline:
                    raise
                self._recover(exc)
                self._stop.wait(FIRST_DELAY_S)
                continue
            self.journal.drop_last()
            return False
        return True

    def _recover(self, exc: AtroposConnectionError | AtroposRegistrationError) -> None:
        """Wait for the API and register with it again if it forgot this trainer."""
        keeps_batches = self.client.keeps_batches
        self.num_batches_maybe_lost += isinstance(exc, AtroposAnswerLost) and not keeps_batches
        held = "it keeps what it holds" if keeps_batches else "what it still held is gone if it was restarted"
        logger.error(
            f"{exc.what} {exc.why} Waiting up to {self.options.api_timeout_s:g} s for the API (--api_timeout_s). Every batch "
            f"that it handed out is in the journal; {held}."
        )
        timeout_s = self.options.api_timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            self.client.wait_until_reachable(timeout_s)
            try:
                self._register_again(exc)
                return
            except AtroposConnectionError:
                # It answered once and went away again, as one does that is killed and started in a loop.
                timeout_s = deadline - time.monotonic()
                if timeout_s <= 0:
                    raise

    def _register_again(self, exc: AtroposConnectionError | AtroposRegistrationError) -> None:
        if self.client.info()[0] != UNREGISTERED:
            if isinstance(exc, AtroposRegistrationError):
                raise exc
            if self.client.keeps_batches:
                logger.warning("The trajectory API answers again. Registration, queue and environments are as before.")
                return
            # Compares the sizes, too: another trainer may have been the first after a restart.
            self.register()
            logger.warning("The Atropos API answers again, and a registration with this trainer's sizes holds.")
            return
        try:
            self.register()
        except AtroposRegistrationError as refused:
            if self.client.info()[0] != UNREGISTERED:
                raise
            logger.warning(f"{refused.what} {refused.why} Emptying it with /reset_data and registering again.")
            self.client.reset_data()
            self.register()
        self.num_restarts += 1
        logger.warning(
            f"The Atropos API at {self.client.base_url} was restarted and this trainer is registered again. Environments "
            "end when the API does not know them any more: start them again, with the commands that started them."
        )


def replayed_batches(journal: Journal, first: Position, batch_size: int) -> Iterator[FetchedBatch]:
    """The groups of a journal from `first` on: fetched before a resume, and not trained in what the checkpoint holds.

    A batch that has more rollouts than a step trains now, `batch_size`, is cut between its groups.
    """
    noted = _noted_versions(journal, first)
    for batch in journal.batches(first.batch):
        index = first.group if batch.number == first.batch else 0
        for groups in pack(batch.raw_groups[index:], batch_size, num_rollouts):
            here, index = Position(batch.number, index), index + len(groups)
            is_last = index == len(batch.raw_groups)
            versions = [noted.get(Position(batch.number, group)) for group in range(here.group, index)]
            known = [version for version in versions if version is not None]
            yield FetchedBatch(
                here,
                groups,
                Position(batch.number + 1, 0) if is_last else Position(batch.number, index),
                is_replayed=True,
                versions=NotedVersions([row for row, _ in known], known[0][1])
                if len(known) == len(versions)
                else None,
            )


def _noted_versions(journal: Journal, first: Position) -> dict[Position, tuple[list[int | None] | None, int | None]]:
    """Read the marks of versions from `first` on: the row of each group, and the version when its batch came."""
    noted = {}
    for mark in journal.marks("versions"):
        if mark["batch"] >= first.batch:
            for group, row in enumerate(mark["policy_versions"], start=mark["first_group"]):
                noted[Position(mark["batch"], group)] = (row, mark["fetched_version"])
    return noted


def offline_batches(data: OfflineData, first: Position, end: Position) -> Iterator[FetchedBatch]:
    """The batches of recorded data from `first` up to `end`, one pass after the other."""
    for here, groups in data.batches(end, first):
        yield FetchedBatch(here, groups, Position(here.batch, here.group + len(groups)))


def _checked(raw_groups: list[Any]) -> list[dict[str, Any]]:
    for index, group in enumerate(raw_groups):
        if not isinstance(group, dict):
            raise AtroposProtocolError(
                f"Group {index} of a batch is a {type(group).__name__}, not an object.",
                'Atropos answers /batch with `{"batch": [ScoredData, ...]}`.',
                "Check that --atropos_api_url is the URL of `run-api`.",
            )
    return raw_groups
