"""Rank 0 makes an optimizer step of each batch that has something to train.

    prepared batch -> quarantine -> staleness -> advantages -> a step, dealt to the ranks

The other ranks get their share through `stream.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import AtroposProtocolError
from ..loss.advantages import group_advantages
from ..loss.metrics import Metric, mean_of
from ..loss.options import StepOptions
from ..types import IGNORE_INDEX, START, Position, RejectedGroup, Rollout, RolloutBatch, RolloutGroup
from ..wire.journal import Journal
from .environment_metrics import EnvironmentMetrics
from .history import TrainerHistory
from .micro_batches import Dealer, MicroBatch
from .options import DataOptions
from .prefetch import Prefetcher
from .prepare import PreparedBatch, Progress
from .quarantine import Quarantine
from .rollout_metrics import are_truncated, dropped_metrics, rollout_metrics
from .sources import FetchedBatch
from .staleness import StalenessResult, limit_staleness


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One optimizer step as rank 0 hands it out.

    `micro_batches` are those of each rank. `num_tokens` and `num_trained` count the tokens and the rollouts that are
    handed out, `num_dropped` the rollouts that were refused or dropped since the step before.
    """

    micro_batches: list[list[MicroBatch]]
    num_tokens: int
    num_trained: int
    num_dropped: int
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class _TakenBatch:
    """A batch with something to train, and what was not trained since the one before it."""

    prepared: PreparedBatch
    policy_version: int
    kept: list[RolloutGroup]
    num_downweighted: int
    rejected: list[RejectedGroup]
    stale: list[RolloutGroup]


class StepMaker:
    """Takes batches until one has something to train, and deals it. Exists on rank 0 only.

    `progress` is asked when a batch is consumed. `data_options` say which batches are trained, `step_options` what
    becomes of their rewards and which logprobs they must have. `quarantine` takes refused groups; dropped groups are noted in
    `journal`, if there is one. `eos_token_ids` are the tokens that end a completion, None if they are unknown.

    `position` is the place of the first group that was not handed out; `groups` are those of the step that was handed out
    last, empty before the first.
    """

    def __init__(
        self,
        batches: Iterator[PreparedBatch],
        dealer: Dealer,
        progress: Progress,
        data_options: DataOptions,
        step_options: StepOptions,
        *,
        quarantine: Quarantine,
        journal: Journal | None = None,
        eos_token_ids: frozenset[int] | None = None,
        position: Position = START,
    ):
        self.position = position
        self.groups: tuple[RolloutGroup, ...] = ()
        self._data_options = data_options
        self._step_options = step_options
        self._dealer = dealer
        self._progress = progress
        self._quarantine = quarantine
        self._journal = journal
        self._eos_token_ids = eos_token_ids
        self._environment_metrics = EnvironmentMetrics(data_options.env_names)
        self._history = TrainerHistory(data_options.max_staleness, step_options.advantage_baseline)
        self._handed_out: FetchedBatch | None = None
        self._prefetcher = Prefetcher(batches)

    def take(self, *, prefetches: bool) -> Step | None:
        """Make the next step; None at the end of the data.

        With `prefetches`, begin to fetch the batch of the step after it.
        """
        start = time.perf_counter()
        taken = self._take_batch()
        if taken is None:
            return None
        wait_s = time.perf_counter() - start
        if prefetches:
            self._prefetcher.start()
        self.groups, self._handed_out = tuple(taken.kept), taken.prepared.fetched
        for name in self._step_options.required_logprobs:
            _check_logprobs(taken.kept, name)
        metrics = {**self._metrics(taken), "perf/batch_wait_s": mean_of(wait_s)}
        rollouts = with_advantages(taken.kept, self._step_options.scale_rewards, self._step_options.advantage_baseline)
        if self._step_options.mask_truncated_completions:
            assert self._eos_token_ids is not None, "eos_token_ids() refuses a run without any"
            rollouts = _untrain_truncated(rollouts, self._eos_token_ids)
        return Step(
            self._dealer.deal(rollouts),
            num_tokens=sum(rollout.num_tokens for rollout in rollouts),
            num_trained=len(rollouts),
            num_dropped=sum(group.num_rollouts for group in taken.rejected)
            + sum(len(group.rollouts) for group in taken.stale),
            metrics=metrics,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold of the data, if everything that was handed out is trained."""
        return {
            "next_batch": self.position.batch,
            "next_group": self.position.group,
            **self._quarantine.state_dict(),
        }

    def mark_trained(self, step: int) -> None:
        """Note in the journal that the optimizer step `step` trained what was handed out last."""
        if self._journal is not None and self._handed_out is not None:
            here = self._handed_out.position
            self._journal.mark(
                "trained", here.batch, step=step, first_group=here.group, num_groups=len(self._handed_out.raw_groups)
            )

    def _take_batch(self) -> _TakenBatch | None:
        """Take batches until one has something to train; None at the end of the data."""
        rejected: list[RejectedGroup] = []
        stale: list[RolloutGroup] = []
        while True:
            prepared = self._prefetcher.take()
            if prepared is None:
                return None
            if prepared.fetched.loss is not None:
                self._quarantine.add_lost_batch(prepared.fetched.loss)
                continue
            version = self._progress.policy_version
            result = self._sift(prepared, version)
            rejected += prepared.batch.rejected
            stale += result.dropped
            if result.kept:
                return _TakenBatch(prepared, version, result.kept, result.num_downweighted, rejected, stale)

    def _sift(self, prepared: PreparedBatch, version: int) -> StalenessResult:
        """Quarantine what was refused, and drop or down-weight what is too old for the policy `version`."""
        fetched, batch, options = prepared.fetched, prepared.batch, self._data_options
        self.position = fetched.next_position
        self._quarantine.add(fetched.position, fetched.raw_groups, batch.rejected)
        self._check_size(batch)
        for finding in self._history.add(batch.groups, batch.rejected, version):
            logger.warning(f"{finding} See `{finding.name}` in docs/troubleshooting.md.")
        result = limit_staleness(
            batch.groups, version, prepared.fetched_version, options.max_staleness, options.stale_rollouts
        )
        if result.dropped:
            self._report_stale(fetched.position.batch, batch.groups, result.dropped)
        return result

    def _metrics(self, taken: _TakenBatch) -> dict[str, Metric]:
        prepared, groups = taken.prepared, taken.kept
        metrics = {
            **rollout_metrics(groups, taken.policy_version, self._eos_token_ids),
            **dropped_metrics(taken.stale),
            "staleness/downweighted_frac": mean_of(taken.num_downweighted / len(groups)),
            "data/replayed": mean_of(float(prepared.fetched.is_replayed)),
            "data/num_unknown_fields": mean_of(float(sum(len(group.unknown_fields) for group in groups))),
            "perf/fetch_s": mean_of(prepared.fetch_s),
        }
        return metrics | self._environment_metrics.of_step(
            groups,
            taken.rejected,
            taken.stale,
            policy_version=taken.policy_version,
            eos_token_ids=self._eos_token_ids,
            fetched_ago_s=time.monotonic() - prepared.fetched_at,
        )

    def _report_stale(self, number: int, groups: Sequence[RolloutGroup], dropped: Sequence[RolloutGroup]) -> None:
        logger.warning(
            f"Dropped {len(dropped)} of {len(groups)} groups of batch {number}: staler than max_staleness "
            f"({self._data_options.max_staleness})."
        )
        if self._journal is not None:
            origins = [group.rollouts[0].origin for group in dropped]
            indices = [origin.group for origin in origins if origin is not None]
            self._journal.mark("dropped", number, groups=indices, reason="stale")

    def _check_size(self, batch: RolloutBatch) -> None:
        size = len(batch.rollouts) + sum(rejected.num_rollouts for rejected in batch.rejected)
        if size > self._dealer.batch_size:
            raise AtroposProtocolError(
                f"The API handed out a batch of {size} rollouts, this run trains {self._dealer.batch_size} a step.",
                "The API is registered with another batch_size, by another trainer or an earlier run; or one group is larger "
                "than a step, and groups are not split.",
                "Restart run-api and the environments, or set --per_device_train_batch_size and "
                "--gradient_accumulation_steps to its batch size (GET /info).",
            )


def with_advantages(groups: Sequence[RolloutGroup], scale_rewards: str, baseline: str = "group") -> list[Rollout]:
    """Give every rollout of an optimizer step token-level advantages, group after group.

    Those that the environment sent are kept. A rollout without them gets the advantage of its reward, the same at every
    trained token; `scale_rewards` and `baseline` are those of [`~loss.advantages.group_advantages`].
    """
    rewards = [torch.tensor([rollout.reward for rollout in group.rollouts], dtype=torch.float32) for group in groups]
    of_batch = torch.cat(rewards).double() if rewards else torch.zeros(0)
    batch_std = of_batch.std().item() if of_batch.numel() > 1 else 0.0
    batch_mean = of_batch.mean().item() if of_batch.numel() > 0 else 0.0
    return [
        rollout
        if rollout.advantages is not None
        else replace(rollout, advantages=torch.where(rollout.labels != IGNORE_INDEX, advantage, 0.0))
        for group, group_rewards in zip(groups, rewards, strict=True)
        for rollout, advantage in zip(
            group.rollouts,
            group_advantages(group_rewards, scale_rewards, batch_std, baseline=baseline, batch_mean=batch_mean),
            strict=True,
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
