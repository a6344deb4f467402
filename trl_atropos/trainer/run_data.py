"""The data of one run, as the trainer holds it: source, journal, quarantine, and what a checkpoint says of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..data.micro_batches import Dealer
from ..data.policy_versions import CallLookup
from ..data.prepare import BatchPreparer, Progress
from ..data.quarantine import Quarantine
from ..data.sources import ApiBatches, FetchedBatch, offline_batches, replayed_batches
from ..data.steps import StepMaker
from ..data.stream import RolloutStream, position_of
from ..distributed import run_on_main_process
from ..loss.metrics import Metric, mean_of
from ..types import Position
from ..wire.journal import Journal, segments
from ..wire.parse import WireLimits
from ..wire.recorded import OfflineData
from .atropos_config import AtroposConfig
from .checkpoints import STATE_KEY, forget_checkpoint
from .servers import Servers


if TYPE_CHECKING:
    from transformers import TrainerState


logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal"
QUARANTINE_NAME = "quarantine.jsonl"


class RunData:
    """Hands out the micro-batches of this rank and keeps count of what was trained. The same calls on every rank.

    `progress` is the trainer's, `dealer` cuts the rollouts of a step into micro-batches, and `limits` are vocabulary
    and length of the model. `servers` are given on rank 0 of a live run. `resumes` says whether an earlier run in
    `output_dir` is continued; if not, its journal is moved aside. `state` is what `before_save` put into the
    checkpoint, empty at step 0. `eos_token_ids` end a completion; None if they are not known.

    `stream` gives the micro-batches. `num_offline_steps` is the number of optimizer steps that recorded data makes,
    over all passes; None for a live run.

    Raises:
        [`TrlAtroposError`]: on every rank, if journal or data cannot be opened.
    """

    def __init__(
        self,
        args: AtroposConfig,
        progress: Progress,
        dealer: Dealer,
        limits: WireLimits,
        servers: Servers | None,
        *,
        is_main_process: bool,
        resumes: bool,
        state: dict[str, Any],
        eos_token_ids: frozenset[int] | None,
    ):
        self._main: _MainProcessData | None = None

        def open_main() -> int | None:
            source = _open_source(args, servers, progress, resumes=resumes, first=position_of(state))
            self._main = _MainProcessData(args, source, state)
            return None if source.num_steps_left is None else state.get("global_step", 0) + source.num_steps_left

        def open_steps() -> StepMaker:
            main = self._require_main()
            source = main.source
            prepare = BatchPreparer(limits, progress, source.lookup, source.journal)
            return StepMaker(
                prepare(source.open()),
                dealer,
                progress,
                args,
                args,
                quarantine=main.quarantine,
                journal=source.journal,
                eos_token_ids=eos_token_ids,
                position=position_of(state),
            )

        self.num_offline_steps = run_on_main_process(open_main)
        self.stream = RolloutStream(
            dealer,
            progress,
            open_steps if is_main_process else None,
            num_batches_ahead=args.num_batches_ahead,
            state=state,
        )

    def mark_trained(self, step: int) -> None:
        """Note that an optimizer step trained the batch that was handed out last."""
        self.stream.mark_trained(step)

    def before_save(self, state: TrainerState, policy_version: int) -> None:
        """Put what a checkpoint must say of the data into the state that is about to be saved, as its last file.

        `policy_version` is the version under which was published last.
        """
        if self._main is None:
            return
        forget_checkpoint(self._main.args.output_dir, state.global_step)
        state.stateful_callbacks[STATE_KEY] = {
            **self.stream.state_dict(),
            "policy_version": policy_version,
            "global_step": state.global_step,
            "has_optimizer": not self._main.args.save_only_model,
        }

    def after_save(self) -> None:
        """Note that the checkpoint is whole: a resume needs no batch before it."""
        if self._main is not None and self._main.source.journal is not None:
            self._main.source.journal.release(self.stream.position.batch)

    def pop_metrics(self) -> dict[str, Metric]:
        """Return what is known of the data since the last step; empty on the other ranks."""
        return {} if self._main is None else {**self.stream.pop_metrics(), **self._main.metrics()}

    def close(self) -> None:
        """Fetch nothing more, and say what was fetched and not trained."""
        if self._main is not None:
            self._main.source.close(self.stream.position)

    def _require_main(self) -> _MainProcessData:
        assert self._main is not None, "only rank 0 has a source"
        return self._main


class _Source(Protocol):
    """Where the batches of a run come from."""

    @property
    def journal(self) -> Journal | None:
        """Of what was fetched and is not trained yet; None if nothing is fetched."""

    @property
    def lookup(self) -> CallLookup | None:
        """Asks the servers what they remember of a rollout; None where they remember nothing."""

    @property
    def num_steps_left(self) -> int | None:
        """Optimizer steps for which there are data; None if there is no end."""

    def open(self) -> Iterator[FetchedBatch]:
        """Begin to fetch."""

    def metrics(self) -> dict[str, Metric]:
        """What happened since the last step."""

    def close(self, position: Position) -> None:
        """Fetch nothing more; training ends at this position."""


class _MainProcessData:
    """What rank 0 alone has: where batches come from, and the quarantine of those that were refused."""

    def __init__(self, args: AtroposConfig, source: _Source, state: dict[str, Any]):
        self.args = args
        self.source = source
        self.quarantine = Quarantine(Path(args.output_dir) / QUARANTINE_NAME, args.max_dropped_fraction)
        self.quarantine.load_state_dict(state)

    def metrics(self) -> dict[str, Metric]:
        return {"data/num_quarantined": mean_of(float(self.quarantine.num_groups)), **self.source.metrics()}


class _RecordedSource:
    """Recorded data, pass after pass, from `first` on."""

    journal: Journal | None = None
    lookup: CallLookup | None = None

    def __init__(self, args: AtroposConfig, data_path: str, *, first: Position):
        assert args.atropos_batch_size is not None, "set when the options were checked"
        self._data = OfflineData(data_path, args.atropos_batch_size)
        self._first = first
        summary = self._data.summarize()
        logger.info(
            f"{data_path}: {len(summary.group_sizes)} groups, {sum(summary.group_sizes)} rollouts, {summary.num_batches} "
            "optimizer steps a pass."
        )
        self._end = summary.end(args.num_train_epochs)
        self.num_steps_left = summary.count_batches(first, self._end)

    def open(self) -> Iterator[FetchedBatch]:
        return offline_batches(self._data, self._first, self._end)

    def metrics(self) -> dict[str, Metric]:
        return {}

    def close(self, position: Position) -> None:
        """Do nothing: there is nothing to stop."""


class _LiveSource:
    """The Atropos API, after the groups of the journal from `first` on that an earlier run did not train."""

    num_steps_left = None

    def __init__(self, args: AtroposConfig, servers: Servers, progress: Progress, *, first: Position):
        assert args.atropos_batch_size is not None, "set when the options were checked"
        self._batch_size = args.atropos_batch_size
        self.journal = Journal(
            Path(args.output_dir) / JOURNAL_NAME,
            segment_bytes=args.journal_segment_bytes,
            max_bytes=args.journal_max_bytes,
        )
        # Somebody may have deleted the journal since: its batches must not get the numbers of trained ones.
        self.journal.next_batch = max(self.journal.next_batch, first.batch + (first.group > 0))
        num_replayed = self.journal.next_batch - first.batch
        if num_replayed:
            logger.info(f"{num_replayed} batches of the journal were not trained yet and come first.")
        self._first = first
        self._api = ApiBatches(
            servers.atropos_client,
            self.journal,
            args,
            lambda: servers.register(args, starting_step=progress.global_step),
        )
        self.lookup: CallLookup | None = None
        if servers.clients_with_versions:
            self.lookup = servers.find_calls

    def open(self) -> Iterator[FetchedBatch]:
        """Register with the API. After the first publish: the first request for a batch lets environments begin."""
        self._api.begin()
        replayed = replayed_batches(self.journal, self._first, self._batch_size)
        return itertools.chain(replayed, iter(self._api))

    def metrics(self) -> dict[str, Metric]:
        maybe_lost = self._api.num_batches_maybe_lost + self._api.num_batches_lost
        return {
            "data/num_api_restarts": mean_of(float(self._api.num_restarts)),
            "data/num_batches_maybe_lost": mean_of(float(maybe_lost)),
            **{name: mean_of(value) for name, value in self._api.watch.metrics.items()},
        }

    def close(self, position: Position) -> None:
        self._api.stop()
        num_left = self.journal.next_batch - position.batch
        if num_left > 0:
            logger.warning(
                f"{num_left} batches were fetched and not trained. They are in {self.journal.directory} and are trained first "
                "by a run that resumes (`resume_from_checkpoint=True`)."
            )


def _open_source(
    args: AtroposConfig, servers: Servers | None, progress: Progress, *, resumes: bool, first: Position
) -> _Source:
    if not resumes:
        _move_aside(Path(args.output_dir))
    if args.data_path is not None:
        return _RecordedSource(args, args.data_path, first=first)
    assert servers is not None, "a live run is connected first"
    return _LiveSource(args, servers, progress, first=first)


def _move_aside(output_dir: Path) -> None:
    """Move what an earlier run recorded, which is kept: a run that starts anew begins its own journal."""
    if not segments(output_dir / JOURNAL_NAME):
        return
    number = next(n for n in itertools.count(1) if not (output_dir / f"{JOURNAL_NAME}-{n}").exists())
    for name in (JOURNAL_NAME, QUARANTINE_NAME):
        path = output_dir / name
        if path.exists():
            target = output_dir / f"{JOURNAL_NAME}-{number}"
            path.rename(target if name == JOURNAL_NAME else target / QUARANTINE_NAME)
    logger.warning(
        f"{output_dir} holds the journal of an earlier run, which is now {JOURNAL_NAME}-{number}. To continue that run instead, "
        "resume (`resume_from_checkpoint=True`); to train its rollouts again, give it with --data_path."
    )
