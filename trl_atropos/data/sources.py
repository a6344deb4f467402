"""Where batches come from: the Atropos API, the journal after a resume, or recorded data.

A batch of the API is in the journal before anybody else sees it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..checks.api import data_timeout, describe_wait, inspect_api
from ..errors import (
    AtroposAnswerLost,
    AtroposBatchLost,
    AtroposConnectionError,
    AtroposProtocolError,
    AtroposRegistrationError,
)
from ..wire.client import FIRST_DELAY_S, PROGRESS_INTERVAL_S, UNREGISTERED, AtroposClient
from ..wire.journal import Journal
from ..wire.recorded import OfflineData
from .options import DataOptions


logger = logging.getLogger(__name__)

DELAY_GROWTH = 1.25
"""From one poll to the next. A batch that is ready waits for a fifth of the time waited so far, at most."""


@dataclass(frozen=True)
class FetchedBatch:
    """A batch as it came.

    `number` counts the batches of the run from 0, as the journal does. `raw_groups` are its groups as JSON gave them.
    A batch that the API took from its queue and could not hand out has no groups, `loss` says why, and its `number` is
    that of the next batch: it does not count. `is_replayed` says that the batch was fetched before a resume, and
    `versions` is the mark of that name in the journal, if a replayed batch has one.
    """

    number: int
    raw_groups: list[dict[str, Any]]
    is_replayed: bool = False
    versions: dict[str, Any] | None = None
    loss: AtroposBatchLost | None = None


class ApiBatches:
    """The batches of a live API, each on the disk before it is handed on. Iterate once.

    An API that goes away is waited for; one that was restarted is registered with again, by calling `register`.

    `num_restarts` counts the restarts of the API, `num_batches_maybe_lost` the requests for a batch that were sent and
    whose answer did not arrive, `num_batches_lost` the batches that the API could not write as JSON.
    """

    def __init__(self, client: AtroposClient, journal: Journal, options: DataOptions, register: Callable[[], None]):
        self.client = client
        self.journal = journal
        self.options = options
        self.register = register
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
                yield FetchedBatch(self.journal.next_batch, [], loss=exc)
                continue
            if raw_groups is None:
                return
            yield FetchedBatch(self.journal.append(raw_groups), raw_groups)

    def stop(self) -> None:
        """Do not ask for another batch."""
        self._stop.set()

    def _wait(self) -> list[dict[str, Any]] | None:
        """Poll until there is a batch; None if stopped."""
        options = self.options
        start = time.monotonic()
        delay, next_report = FIRST_DELAY_S, PROGRESS_INTERVAL_S
        while not self._stop.is_set():
            elapsed = time.monotonic() - start
            try:
                raw_groups = self.client.fetch_batch()
                if raw_groups is not None:
                    return _checked(raw_groups)
                if elapsed >= options.batch_timeout_s:
                    raise data_timeout(elapsed, inspect_api(self.client, has_waiting_trainer=True))
                if elapsed >= next_report:
                    logger.info(describe_wait(elapsed, inspect_api(self.client, has_waiting_trainer=True)))
                    next_report = time.monotonic() - start + PROGRESS_INTERVAL_S
            except (AtroposConnectionError, AtroposRegistrationError) as exc:
                self._recover(exc)
                start, delay, next_report = time.monotonic(), FIRST_DELAY_S, PROGRESS_INTERVAL_S
                continue
            self._stop.wait(min(delay, options.refresh_interval, max(options.batch_timeout_s - elapsed, 0.0)))
            delay *= DELAY_GROWTH
        return None

    def _recover(self, exc: AtroposConnectionError | AtroposRegistrationError) -> None:
        """Wait for the API and register with it again if it forgot this trainer."""
        self.num_batches_maybe_lost += isinstance(exc, AtroposAnswerLost)
        logger.error(
            f"{exc.what} {exc.why} Waiting up to {self.options.api_timeout_s:g} s for the API (--api_timeout_s). Every batch "
            "that it handed out is in the journal; what it still held is gone if it was restarted."
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


def replayed_batches(journal: Journal, first: int) -> Iterator[FetchedBatch]:
    """The batches of a journal from number `first` on: fetched before a resume, and not trained in what the checkpoint
    holds.
    """
    versions = {mark["batch"]: mark for mark in journal.marks("versions")}
    for batch in journal.batches(first):
        yield FetchedBatch(batch.number, batch.raw_groups, is_replayed=True, versions=versions.get(batch.number))


def offline_batches(data: OfflineData, first: int, num_batches: int) -> Iterator[FetchedBatch]:
    """The batches from number `first` up to, not including, number `num_batches` of recorded data, one pass after the
    other.
    """
    for batch in itertools.islice(data.batches(first), num_batches - first):
        yield FetchedBatch(batch.number, batch.raw_groups)


def _checked(raw_groups: list[Any]) -> list[dict[str, Any]]:
    for index, group in enumerate(raw_groups):
        if not isinstance(group, dict):
            raise AtroposProtocolError(
                f"Group {index} of a batch is a {type(group).__name__}, not an object.",
                'Atropos answers /batch with `{"batch": [ScoredData, ...]}`.',
                "Check that --atropos_api_url is the URL of `run-api`.",
            )
    return raw_groups
