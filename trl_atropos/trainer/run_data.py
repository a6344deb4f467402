"""The data of one run, as the trainer holds it: source, journal, quarantine, and what a checkpoint says of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.environment_metrics import EnvironmentMetrics
from ..data.policy_versions import PolicyVersionLookup
from ..data.quarantine import Quarantine
from ..data.sources import ApiBatches, ApiPatience, offline_batches, replayed_batches
from ..data.stream import BatchPreparer, PreparedBatch, RolloutStream, StreamSettings
from ..distributed import run_on_main_process
from ..loss.metrics import Metric, mean_of
from ..types import RolloutGroup
from ..wire.journal import Journal, segments
from ..wire.parse import WireLimits
from ..wire.recorded import OfflineData
from .atropos_config import AtroposConfig
from .checkpoints import STATE_KEY, forget_checkpoint
from .config_checks import sequence_parallel_size


if TYPE_CHECKING:
    from transformers import TrainerState

    from .servers import Connections


logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal"
QUARANTINE_NAME = "quarantine.jsonl"


class TrainerData:
    """Opens the source of batches and keeps count of what was trained.

    Args:
        args ([`AtroposConfig`]):
            Options of the run. `max_steps` is lowered to what recorded data makes.
        is_main_process (`bool`):
            Whether this is rank 0.
        connections ([`~trainer.servers.Connections`], *optional*):
            On rank 0 of a live run.
        resumes (`bool`):
            Whether an earlier run in `output_dir` is continued. If not, its journal is moved aside.
        state (`dict`):
            What the checkpoint says (`before_save`); empty at step 0.

    Attributes:
        num_offline_steps (`int`, *optional*):
            Batches of recorded data, over all passes. None for a live run.

    Raises:
        [`TrlAtroposError`]: on every rank, if journal or data cannot be opened.
    """

    def __init__(
        self,
        args: AtroposConfig,
        *,
        is_main_process: bool,
        connections: Connections | None,
        resumes: bool,
        state: dict[str, Any],
    ):
        self.args = args
        self.stream: RolloutStream | None = None
        self._is_main_process = is_main_process
        self._connections = connections
        self._state = state
        self._journal: Journal | None = None
        self._offline: OfflineData | None = None
        self._quarantine: Quarantine | None = None
        self._api_batches: ApiBatches | None = None
        self.num_offline_steps: int | None = run_on_main_process(lambda: self._open(resumes))
        if self.num_offline_steps is not None:
            args.max_steps = min(args.max_steps, self.num_offline_steps)

    @property
    def next_batch(self) -> int:
        """Number of the first batch that was not handed out."""
        return self._state.get("next_batch", 0) if self.stream is None else self.stream.next_batch

    @property
    def step_groups(self) -> tuple[RolloutGroup, ...]:
        """On rank 0, the groups of the step that was handed out last."""
        return () if self.stream is None else self.stream.step_groups

    def make_stream(
        self,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int] | None,
        policy_version: Callable[[], int],
        global_step: Callable[[], int],
        layout: Callable[[], str],
    ) -> RolloutStream:
        """Make the stream of this rank's micro-batches.

        Args:
            vocab_size (`int`):
                Rows of the model's embedding.
            eos_token_ids (`frozenset[int]`, *optional*):
                Tokens that end a completion, if they are known.
            policy_version (`Callable[[], int]`):
                Version of the trainer's policy.
            global_step (`Callable[[], int]`):
                Optimizer steps done so far.
            layout (`Callable[[], str]`):
                See [`~data.stream.RolloutStream`].
        """
        args, connections = self.args, self._connections
        lookup: PolicyVersionLookup | None = None
        if connections is not None and connections.facts.knows_policy_versions:
            lookup = connections.get_policy_versions
        limits = WireLimits(
            vocab_size=vocab_size, max_length=args.max_length, reads_teacher=args.distillation_coef > 0
        )
        prepare = BatchPreparer(limits, policy_version, lookup, self._journal)

        def open_batches() -> Iterator[PreparedBatch]:
            if self._offline is not None:
                assert self.num_offline_steps is not None
                return prepare(offline_batches(self._offline, self.next_batch, self.num_offline_steps))
            assert connections is not None and self._journal is not None

            def register() -> None:
                connections.register(args, starting_step=global_step())

            # After the first publish: the first request for a batch lets environments begin.
            register()
            patience = ApiPatience(args.batch_timeout_s, args.refresh_interval, args.api_timeout_s)
            self._api_batches = ApiBatches(connections.atropos_client, self._journal, patience, register)
            return prepare(itertools.chain(replayed_batches(self._journal, self.next_batch), iter(self._api_batches)))

        self.stream = RolloutStream(
            _stream_settings(args, eos_token_ids),
            open_batches if self._is_main_process else None,
            self._quarantine,
            policy_version,
            lambda: args.max_steps - global_step(),
            layout,
            EnvironmentMetrics(args.env_names),
            self._mark_dropped,
        )
        for name in ("next_batch", "num_tokens", "num_rollouts_trained", "num_rollouts_dropped"):
            setattr(self.stream, name, self._state.get(name, 0))
        return self.stream

    def mark_trained(self, step: int) -> None:
        """Note that an optimizer step trained the batch that was handed out last."""
        if self._journal is not None and self.stream is not None:
            self._journal.mark("trained", self.stream.next_batch - 1, step=step)

    def before_save(self, state: TrainerState, policy_version: int) -> None:
        """Put what a checkpoint must say of the data into the state that is about to be saved; acts on rank 0.

        Args:
            state (`TrainerState`):
                Saved with the checkpoint, as its last file.
            policy_version (`int`):
                Of the last publish.
        """
        if not self._is_main_process:
            return
        assert self.stream is not None and self._quarantine is not None
        forget_checkpoint(self.args.output_dir, state.global_step)
        state.stateful_callbacks[STATE_KEY] = {
            "next_batch": self.stream.next_batch,
            "policy_version": policy_version,
            "num_tokens": self.stream.num_tokens,
            "num_rollouts_trained": self.stream.num_rollouts_trained,
            "num_rollouts_dropped": self.stream.num_rollouts_dropped,
            "num_quarantined": self._quarantine.num_groups,
            "rejected_fractions": list(self._quarantine.fractions),
        }

    def after_save(self) -> None:
        """The checkpoint is whole: a resume needs no batch before it."""
        if self._journal is not None:
            self._journal.release(self.next_batch)

    def pop_metrics(self) -> dict[str, Metric]:
        """Return what is known of the data since the last step; empty on the other ranks."""
        if self.stream is None or not self._is_main_process:
            return {}
        assert self._quarantine is not None
        metrics = self.stream.pop_metrics()
        metrics["data/num_quarantined"] = mean_of(float(self._quarantine.num_groups))
        if self._api_batches is not None:
            metrics["data/num_api_restarts"] = mean_of(float(self._api_batches.num_restarts))
            maybe_lost = self._api_batches.num_batches_maybe_lost + self._api_batches.num_batches_lost
            metrics["data/num_batches_maybe_lost"] = mean_of(float(maybe_lost))
        return metrics

    def total_metrics(self) -> dict[str, float]:
        """Totals since the start of the run."""
        if self.stream is None:
            return {}
        return {
            "num_tokens": float(self.stream.num_tokens),
            "num_rollouts_trained": float(self.stream.num_rollouts_trained),
            "num_rollouts_dropped": float(self.stream.num_rollouts_dropped),
        }

    def close(self) -> None:
        """Fetch nothing more."""
        if self._api_batches is not None:
            self._api_batches.stop()
        if self._journal is not None and self._journal.next_batch > self.next_batch:
            logger.warning(
                f"{self._journal.next_batch - self.next_batch} batches were fetched and not trained. They are in "
                f"{self._journal.directory} and are trained first by a run that resumes (`resume_from_checkpoint=True`)."
            )

    def _open(self, resumes: bool) -> int | None:
        """Open everything on rank 0; returns how many optimizer steps recorded data makes."""
        args = self.args
        output_dir = Path(args.output_dir)
        if not resumes:
            _move_aside(output_dir)
        self._quarantine = Quarantine(output_dir / QUARANTINE_NAME, args.max_dropped_fraction)
        self._quarantine.num_groups = self._state.get("num_quarantined", 0)
        self._quarantine.fractions.extend(self._state.get("rejected_fractions", []))
        assert args.atropos_batch_size is not None
        if args.data_path is not None:
            self._offline = OfflineData(args.data_path, args.atropos_batch_size)
            summary = self._offline.summarize()
            logger.info(
                f"{args.data_path}: {summary.num_groups} groups, {summary.num_rollouts} rollouts, {summary.num_batches} "
                "optimizer steps a pass."
            )
            return int(summary.num_batches * args.num_train_epochs)
        self._journal = Journal(
            output_dir / JOURNAL_NAME, segment_bytes=args.journal_segment_bytes, max_bytes=args.journal_max_bytes
        )
        # Somebody may have deleted the journal since: its batches must not get the numbers of trained ones.
        self._journal.next_batch = max(self._journal.next_batch, self.next_batch)
        num_replayed = self._journal.next_batch - self.next_batch
        if num_replayed:
            logger.info(f"{num_replayed} batches of the journal were not trained yet and come first.")
        return None

    def _mark_dropped(self, batch: int, groups: list[int]) -> None:
        if self._journal is not None:
            self._journal.mark("dropped", batch, groups=groups, reason="stale")


def _move_aside(output_dir: Path) -> None:
    """A run that starts anew begins its own journal; what an earlier one recorded is kept."""
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


def _stream_settings(args: AtroposConfig, eos_token_ids: frozenset[int] | None) -> StreamSettings:
    assert args.atropos_batch_size is not None
    required = ["inference_logprobs"] if args.needs_inference_logprobs else []
    required += ["ref_logprobs"] if args.ref_logprobs == "require" else []
    num_sharing = sequence_parallel_size(args)
    return StreamSettings(
        batch_size=args.atropos_batch_size,
        micro_batch_size=args.per_device_train_batch_size,
        # Ranks that share sequences are dealt the same rollouts.
        rank=args.process_index // num_sharing,
        world_size=args.world_size // num_sharing,
        scale_rewards=args.scale_rewards,
        required_logprobs=tuple(required),
        max_tokens_per_micro_batch=args.max_tokens_per_micro_batch,
        eos_token_ids=eos_token_ids,
        mask_truncated_completions=args.mask_truncated_completions,
        max_staleness=args.max_staleness,
        stale_rollouts=args.stale_rollouts,
        num_prefetched_batches=0 if args.max_staleness == 0 else args.num_prefetched_batches,
    )
