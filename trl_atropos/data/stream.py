"""From fetched batches to this rank's micro-batches.

    source -> validate -> policy versions          one ahead, on a thread of rank 0
    -> staleness -> quarantine -> advantages -> deal -> this rank's share

Shape letters: B rollouts of a batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import IterableDataset

from ..distributed import run_on_main_process
from ..errors import AtroposProtocolError
from ..loss.advantages import group_advantages
from ..loss.metrics import Metric, mean_of
from ..types import IGNORE_INDEX, RejectedGroup, Rollout, RolloutBatch, RolloutGroup
from ..wire.journal import Journal
from ..wire.parse import WireLimits, parse_batch
from .environment_metrics import EnvironmentMetrics
from .history import TrainerHistory
from .micro_batches import MicroBatch, deal_by_count, deal_by_tokens
from .policy_versions import PolicyVersionLookup, set_policy_versions, with_policy_versions
from .prefetch import Prefetcher
from .quarantine import Quarantine
from .rollout_metrics import are_truncated, dropped_metrics, rollout_metrics
from .sources import FetchedBatch
from .staleness import StalenessResult, limit_staleness


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamSettings:
    """What the stream needs to know of the run.

    Args:
        batch_size (`int`):
            Rollouts of one optimizer step, over all ranks.
        micro_batch_size (`int`):
            Rollouts of one forward pass on one rank, if there is no token budget.
        rank (`int`):
            This data-parallel rank.
        world_size (`int`):
            Number of data-parallel ranks.
        scale_rewards (`str`):
            See `AtroposConfig`.
        required_logprobs (`tuple[str, ...]`):
            Names of the logprobs without which a rollout stops the run.
        max_tokens_per_micro_batch (`int`, *optional*):
            See `AtroposConfig`.
        eos_token_ids (`frozenset[int]`, *optional*):
            Tokens that end a completion, if they are known.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            See `AtroposConfig`. Needs `eos_token_ids`.
        max_staleness (`int`, *optional*):
            See `AtroposConfig`.
        stale_rollouts (`str`, *optional*, defaults to `"drop"`):
            See `AtroposConfig`.
        num_prefetched_batches (`int`, *optional*, defaults to `0`):
            See `AtroposConfig`.
    """

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    scale_rewards: str
    required_logprobs: tuple[str, ...]
    max_tokens_per_micro_batch: int | None = None
    eos_token_ids: frozenset[int] | None = None
    mask_truncated_completions: bool = False
    max_staleness: int | None = None
    stale_rollouts: str = "drop"
    num_prefetched_batches: int = 0


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that is checked and whose policies are looked up.

    Args:
        fetched ([`~data.sources.FetchedBatch`]):
            As it came.
        batch ([`RolloutBatch`]):
            Its good groups, with policy versions, and the refused ones.
        fetched_version (`int`, *optional*):
            The trainer's policy version when it came; None if that is not known any more.
        fetched_at (`float`):
            When it came, by `time.monotonic`.
        fetch_s (`float`):
            Seconds that fetching and checking took.
    """

    fetched: FetchedBatch
    batch: RolloutBatch
    fetched_version: int | None
    fetched_at: float
    fetch_s: float


@dataclass(frozen=True)
class BatchPreparer:
    """Checks batches and looks up which policies sampled them. Runs on rank 0, on the prefetching thread.

    Args:
        limits ([`WireLimits`]):
            Vocabulary and length that validation enforces.
        policy_version (`Callable[[], int]`):
            Version of the trainer's policy.
        lookup (`PolicyVersionLookup`, *optional*):
            Maps rollout keys to the versions that sampled them. None: unknown.
        journal ([`Journal`], *optional*):
            Where the versions are noted, for a resume: the server remembers them for a while only.
    """

    limits: WireLimits
    policy_version: Callable[[], int]
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
        fetched_version = None if fetched.is_replayed else self.policy_version()
        found = list(groups) if self.lookup is None else with_policy_versions(groups, self.lookup)
        if self.journal is not None:
            versions = [[rollout.policy_version for rollout in group.rollouts] for group in found]
            self.journal.mark("versions", fetched.number, fetched_version=fetched_version, policy_versions=versions)
        return found, fetched_version


@dataclass(frozen=True)
class _Step:
    """One optimizer step as rank 0 hands it out: for each rank its micro-batches. None: the data is at its end."""

    micro_batches: list[list[MicroBatch]] | None
    num_tokens: int = 0
    num_trained: int = 0
    num_dropped: int = 0
    metrics: dict[str, Metric] | None = None


class RolloutStream(IterableDataset):
    """A stream of this rank's micro-batches.

    Per optimizer step, rank 0 takes one batch and deals it (`micro_batches.py`). Every rank gets the same number of
    micro-batches; some may be empty. An item of the stream is a list of micro-batches: one, or with a token budget all of
    the step; a micro-batch is a list of rollouts with token-level advantages.

    Args:
        settings ([`StreamSettings`]):
            The run.
        batches (`Callable[[], Iterator[PreparedBatch]]`, *optional*):
            Opens the source; called once, on rank 0. None on the others.
        quarantine ([`Quarantine`], *optional*):
            Takes refused groups, on rank 0.
        policy_version (`Callable[[], int]`):
            Version of the trainer's policy, asked when a batch is consumed.
        num_steps (`Callable[[], int]`):
            Optimizer steps that are left, asked at the start: no batch is fetched beyond them.
        layout (`Callable[[], str]`):
            The layout of micro-batches, asked when a batch is dealt; decides what a rollout costs of the token budget.
        environment_metrics ([`~data.environment_metrics.EnvironmentMetrics`], *optional*):
            Makes the metrics of each environment, on rank 0.
        on_drop (`Callable[[int, list[int]], None]`, *optional*):
            Called with the number of a batch and the groups of it that are dropped as too stale, on rank 0.

    Attributes:
        num_tokens (`int`):
            Tokens handed out since the start, prompts included.
        num_rollouts_trained (`int`):
            Rollouts handed out since the start.
        num_rollouts_dropped (`int`):
            Rollouts refused or dropped since the start.
        next_batch (`int`):
            On rank 0, number of the first batch that was not handed out.
        step_groups (`tuple[RolloutGroup, ...]`):
            On rank 0, the groups of the step that was handed out last.
    """

    def __init__(
        self,
        settings: StreamSettings,
        batches: Callable[[], Iterator[PreparedBatch]] | None,
        quarantine: Quarantine | None,
        policy_version: Callable[[], int],
        num_steps: Callable[[], int],
        layout: Callable[[], str],
        environment_metrics: EnvironmentMetrics | None = None,
        on_drop: Callable[[int, list[int]], None] | None = None,
    ):
        self.settings = settings
        self.open_batches = batches
        self.quarantine = quarantine
        self.policy_version = policy_version
        self.num_steps = num_steps
        self.layout = layout
        self.environment_metrics = environment_metrics
        self.on_drop = on_drop
        self.num_tokens = 0
        self.num_rollouts_trained = 0
        self.num_rollouts_dropped = 0
        self.next_batch = 0
        self.step_groups: tuple[RolloutGroup, ...] = ()
        self._metrics: dict[str, Metric] = {}
        self._history = TrainerHistory(settings.max_staleness)
        self._prefetcher: Prefetcher[PreparedBatch] | None = None

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        settings = self.settings
        run_on_main_process(self._open)
        num_left = self.num_steps()
        while True:
            num_left -= 1
            prefetches = settings.num_prefetched_batches > 0 and num_left > 0
            step = run_on_main_process(lambda prefetches=prefetches: self._next_step(prefetches))  # type: ignore[misc]
            if step.micro_batches is None:
                return
            self.num_tokens += step.num_tokens
            self.num_rollouts_trained += step.num_trained
            self.num_rollouts_dropped += step.num_dropped
            # Rank 0 saw the whole batch: its numbers are those of all ranks, and counted once.
            self._metrics = step.metrics or {} if settings.rank == 0 else {}
            micro_batches = step.micro_batches[settings.rank]
            if settings.max_tokens_per_micro_batch is None:
                yield from ([micro_batch] for micro_batch in micro_batches)
            else:
                yield micro_batches

    def pop_metrics(self) -> dict[str, Metric]:
        """Return the metrics of the step that was handed out last, once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _open(self) -> None:
        assert self.open_batches is not None, "rank 0 has a source"
        self._prefetcher = Prefetcher(self.open_batches())

    def _next_step(self, prefetches: bool) -> _Step:
        assert self._prefetcher is not None and self.quarantine is not None
        settings = self.settings
        rejected: list[RejectedGroup] = []
        stale: list[RolloutGroup] = []
        start = time.perf_counter()
        while True:
            prepared = self._prefetcher.take()
            if prepared is None:
                return _Step(None)
            fetched, batch = prepared.fetched, prepared.batch
            if fetched.loss is not None:
                self.quarantine.add_lost_batch(fetched.loss)
                continue
            self.next_batch = fetched.number + 1
            self.quarantine.add(fetched.number, fetched.raw_groups, batch.rejected)
            self._check_size(batch)
            rejected += batch.rejected
            version = self.policy_version()
            for finding in self._history.add(batch.groups, batch.rejected, version):
                logger.warning(f"{finding} See `{finding.name}` in docs/troubleshooting.md.")
            result = limit_staleness(
                batch.groups, version, prepared.fetched_version, settings.max_staleness, settings.stale_rollouts
            )
            if result.dropped:
                self._report_stale(fetched.number, batch.groups, result.dropped)
                stale += result.dropped
            if result.kept:
                break
        wait_s = time.perf_counter() - start
        if prefetches:
            self._prefetcher.start()
        groups = result.kept
        self.step_groups = tuple(groups)
        for name in settings.required_logprobs:
            _check_logprobs(groups, name)
        metrics = self._step_metrics(prepared, result, rejected, stale, version)
        metrics["perf/batch_wait_s"] = mean_of(wait_s)
        rollouts = with_advantages(groups, settings.scale_rewards)
        if settings.mask_truncated_completions:
            assert settings.eos_token_ids is not None
            rollouts = _untrain_truncated(rollouts, settings.eos_token_ids)
        num_dropped = sum(group.num_rollouts for group in rejected) + sum(len(group.rollouts) for group in stale)
        num_tokens = sum(rollout.num_tokens for rollout in rollouts)
        return _Step(self._deal(rollouts), num_tokens, len(rollouts), num_dropped, metrics)

    def _step_metrics(
        self,
        prepared: PreparedBatch,
        result: StalenessResult,
        rejected: Sequence[RejectedGroup],
        stale: Sequence[RolloutGroup],
        version: int,
    ) -> dict[str, Metric]:
        groups, eos_token_ids = result.kept, self.settings.eos_token_ids
        metrics = {
            **rollout_metrics(groups, version, eos_token_ids),
            **dropped_metrics(stale),
            "staleness/downweighted_frac": mean_of(result.num_downweighted / len(groups)),
            "data/replayed": mean_of(float(prepared.fetched.is_replayed)),
            "data/num_unknown_fields": mean_of(float(sum(len(group.unknown_fields) for group in groups))),
            "perf/fetch_s": mean_of(prepared.fetch_s),
        }
        if self.environment_metrics is not None:
            metrics |= self.environment_metrics.of_step(
                groups,
                rejected,
                stale,
                policy_version=version,
                eos_token_ids=eos_token_ids,
                fetched_ago_s=time.monotonic() - prepared.fetched_at,
            )
        return metrics

    def _report_stale(self, number: int, groups: Sequence[RolloutGroup], dropped: Sequence[RolloutGroup]) -> None:
        logger.warning(
            f"Dropped {len(dropped)} of {len(groups)} groups of batch {number}: staler than max_staleness "
            f"({self.settings.max_staleness})."
        )
        if self.on_drop is not None:
            origins = [group.rollouts[0].origin for group in dropped]
            self.on_drop(number, [origin.group for origin in origins if origin is not None])

    def _check_size(self, batch: RolloutBatch) -> None:
        size = len(batch.rollouts) + sum(rejected.num_rollouts for rejected in batch.rejected)
        if size > self.settings.batch_size:
            raise AtroposProtocolError(
                f"The API handed out a batch of {size} rollouts, this run trains {self.settings.batch_size} a step.",
                "The API is registered with another batch_size, by another trainer or an earlier run.",
                "Restart run-api and the environments, or set --per_device_train_batch_size and "
                "--gradient_accumulation_steps to its batch size (GET /info).",
            )

    def _deal(self, rollouts: list[Rollout]) -> list[list[MicroBatch]]:
        settings = self.settings
        if settings.max_tokens_per_micro_batch is not None:
            return deal_by_tokens(
                rollouts,
                max_tokens=settings.max_tokens_per_micro_batch,
                layout=self.layout(),
                world_size=settings.world_size,
            )
        return deal_by_count(
            rollouts,
            micro_batch_size=settings.micro_batch_size,
            num_micro_batches=settings.batch_size // (settings.micro_batch_size * settings.world_size),
            world_size=settings.world_size,
        )


def with_advantages(groups: Sequence[RolloutGroup], scale_rewards: str) -> list[Rollout]:
    """Give every rollout of a batch token-level advantages.

    Those that the environment sent are kept. A rollout without them gets the advantage of its reward within the group,
    the same at every trained token.

    Args:
        groups (sequence of [`RolloutGroup`]):
            Of one optimizer step.
        scale_rewards (`str`):
            See [`~trl_atropos.loss.advantages.group_advantages`].

    Returns:
        `list[Rollout]`: group after group.
    """
    rewards = [torch.tensor([rollout.reward for rollout in group.rollouts], dtype=torch.float32) for group in groups]
    of_batch = torch.cat(rewards).double() if rewards else torch.zeros(0)
    batch_std = of_batch.std().item() if of_batch.numel() > 1 else 0.0
    return [
        rollout
        if rollout.advantages is not None
        else replace(rollout, advantages=torch.where(rollout.labels != IGNORE_INDEX, advantage, 0.0))
        for group, group_rewards in zip(groups, rewards, strict=True)
        for rollout, advantage in zip(
            group.rollouts, group_advantages(group_rewards, scale_rewards, batch_std), strict=True
        )
    ]


def _untrain_truncated(rollouts: Sequence[Rollout], eos_token_ids: frozenset[int]) -> list[Rollout]:
    """Take every token of the rollouts that end in the middle of a completion out of the loss."""
    is_truncated = are_truncated(rollouts, eos_token_ids)
    if is_truncated.all():
        logger.warning(
            "mask_truncated_completions: no rollout of this batch ends with an end-of-sequence token, so none is "
            "trained. If the environment stops completions at a string, set --mask_truncated_completions false."
        )
    return [
        replace(rollout, labels=torch.full_like(rollout.labels, IGNORE_INDEX)) if truncated else rollout
        for rollout, truncated in zip(rollouts, is_truncated.tolist(), strict=True)
    ]


def _check_logprobs(groups: Sequence[RolloutGroup], name: str) -> None:
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        if getattr(rollout, name) is not None:
            continue
        what = f"The rollout of {rollout.origin} has no complete `{name}`."
        if name == "ref_logprobs":
            raise AtroposProtocolError(
                what,
                "ref_logprobs=require takes the reference of the KL term from the environment, for every trained token.",
                "Let the environment send them, or set --ref_logprobs recompute.",
            )
        raise AtroposProtocolError(
            what,
            "The importance ratio needs the logprob of every trained token.",
            "In the environment, build rollouts with ManagedServer in collect_trajectories; or set "
            "--inference_logprobs use (such rollouts count as on-policy) or --loss_type weighted_sft.",
        )
