"""From batches of the Atropos API to this rank's micro-batches.

    fetch (rank 0) -> journal -> validate -> policy versions -> advantages -> deal -> this rank's share

Shape letters: B rollouts of a batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import IterableDataset

from .advantages import group_advantages
from .atropos_client import ApiStatus, AtroposClient
from .distributed import run_on_main_process
from .errors import AtroposProtocolError
from .journal import Journal
from .metrics import Metric, maximum_of, mean_of, minimum_of
from .micro_batches import MicroBatch, deal_by_count, deal_by_tokens
from .rollout_key import rollout_key
from .types import IGNORE_INDEX, Rollout, RolloutBatch, RolloutGroup
from .validation import WireLimits, parse_batch


logger = logging.getLogger(__name__)

PolicyVersionLookup = Callable[[Sequence[str]], Sequence["int | None"]]


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
        limits ([`WireLimits`]):
            Vocabulary and length that validation enforces.
        scale_rewards (`str`):
            See `AtroposConfig`.
        required_logprobs (`tuple[str, ...]`):
            Names of the logprobs without which a rollout stops the run.
        max_tokens_per_micro_batch (`int`, *optional*):
            See `AtroposConfig`.
        eos_token_ids (`frozenset[int]`, *optional*):
            Tokens that end a completion; rollouts that end with another are not trained. None: all are.
        max_dropped_fraction (`float`):
            See `AtroposConfig`.
        batch_timeout_s (`float`):
            See `AtroposConfig`.
        refresh_interval_s (`float`):
            See `AtroposConfig.refresh_interval`.
    """

    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    limits: WireLimits
    scale_rewards: str
    required_logprobs: tuple[str, ...]
    max_dropped_fraction: float
    batch_timeout_s: float
    refresh_interval_s: float
    max_tokens_per_micro_batch: int | None = None
    eos_token_ids: frozenset[int] | None = None


@dataclass(frozen=True)
class _Step:
    """One optimizer step as rank 0 hands it out: for each rank its micro-batches."""

    micro_batches: list[list[MicroBatch]]
    num_tokens: int
    num_trained: int
    num_dropped: int
    metrics: dict[str, Metric]


class RolloutStream(IterableDataset):
    """An endless stream of this rank's micro-batches.

    Per optimizer step, rank 0 fetches one batch of the API and deals it (`micro_batches.py`). Every rank gets the same
    number of micro-batches; some may be empty. An item of the stream is a list of micro-batches: one, or with a token
    budget all of the step; a micro-batch is a list of rollouts with token-level advantages.

    Args:
        client ([`AtroposClient`]):
            The API. Used on rank 0.
        journal ([`Journal`]):
            Where each batch is written before it is used. Used on rank 0.
        settings ([`StreamSettings`]):
            The run.
        register (`Callable[[], None]`):
            Registers with the API; called once on rank 0 before the first fetch.
        policy_version (`Callable[[], int]`):
            Version of the trainer's policy, asked when a batch is consumed.
        lookup_policy_versions (`PolicyVersionLookup`, *optional*):
            Maps rollout keys to the versions that sampled them. None: unknown.
        layout (`Callable[[], str]`):
            The layout of micro-batches, asked when a batch is dealt; decides what a rollout costs of the token budget.

    Attributes:
        num_tokens (`int`):
            Tokens handed out since the start, prompts included.
        num_rollouts_trained (`int`):
            Rollouts handed out since the start.
        num_rollouts_dropped (`int`):
            Rollouts refused since the start.
    """

    def __init__(
        self,
        client: AtroposClient | None,
        journal: Journal | None,
        settings: StreamSettings,
        register: Callable[[], None],
        policy_version: Callable[[], int],
        lookup_policy_versions: PolicyVersionLookup | None,
        layout: Callable[[], str],
    ):
        self.client = client
        self.journal = journal
        self.settings = settings
        self.register = register
        self.policy_version = policy_version
        self.lookup_policy_versions = lookup_policy_versions
        self.layout = layout
        self.num_tokens = 0
        self.num_rollouts_trained = 0
        self.num_rollouts_dropped = 0
        self._metrics: dict[str, Metric] = {}

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        settings = self.settings
        run_on_main_process(self.register)
        while True:
            step = run_on_main_process(self._next_step)
            self.num_tokens += step.num_tokens
            self.num_rollouts_trained += step.num_trained
            self.num_rollouts_dropped += step.num_dropped
            # Rank 0 saw the whole batch: its numbers are those of all ranks, and counted once.
            self._metrics = step.metrics if settings.rank == 0 else {}
            micro_batches = step.micro_batches[settings.rank]
            if settings.max_tokens_per_micro_batch is None:
                yield from ([micro_batch] for micro_batch in micro_batches)
            else:
                yield micro_batches

    def pop_metrics(self) -> dict[str, Metric]:
        """Return the metrics of the step that was handed out last, once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _next_step(self) -> _Step:
        settings = self.settings
        assert self.client is not None, "rank 0 has a client"
        start = time.perf_counter()
        raw_groups = self.client.wait_for_batch(
            settings.batch_timeout_s, refresh_interval_s=settings.refresh_interval_s, on_wait=_report_wait
        )
        wait_s = time.perf_counter() - start
        if self.journal is not None:
            self.journal.append(raw_groups)
        batch = parse_batch(raw_groups, settings.limits)
        self._check_rejected(batch, len(raw_groups))
        self._check_size(batch)
        groups = self._with_policy_versions(batch.groups)
        for name in settings.required_logprobs:
            _check_logprobs(groups, name)
        metrics = {
            **_reward_metrics(groups),
            **_length_metrics(groups),
            **_staleness_metrics(groups, self.policy_version()),
            "perf/batch_wait_s": mean_of(wait_s),
        }
        rollouts = with_advantages(groups, settings.scale_rewards)
        if settings.eos_token_ids is not None:
            rollouts, is_truncated = _untrain_truncated(rollouts, settings.eos_token_ids)
            metrics["completions/clipped_ratio"] = mean_of(is_truncated)
        num_dropped = sum(rejected.num_rollouts for rejected in batch.rejected)
        num_tokens = sum(rollout.num_tokens for rollout in rollouts)
        return _Step(self._deal(rollouts), num_tokens, len(rollouts), num_dropped, metrics)

    def _check_rejected(self, batch: RolloutBatch, num_groups: int) -> None:
        for rejected in batch.rejected:
            logger.warning(f"Dropped a group of environment {rejected.env_id}: {rejected.error}")
        if len(batch.rejected) > self.settings.max_dropped_fraction * num_groups or not batch.groups:
            error = batch.rejected[0].error
            where = f" All {num_groups} raw groups of this batch are in {self.journal.path}." if self.journal else ""
            raise AtroposProtocolError(
                f"{len(batch.rejected)} of {num_groups} groups of a batch cannot be trained; the first: {error.what}",
                f"{error.why}{where}",
                f"{error.fix} Or let such groups be dropped and counted: raise --max_dropped_fraction "
                f"({self.settings.max_dropped_fraction}).",
            ) from error

    def _check_size(self, batch: RolloutBatch) -> None:
        size = len(batch.rollouts) + sum(rejected.num_rollouts for rejected in batch.rejected)
        if size > self.settings.batch_size:
            raise AtroposProtocolError(
                f"The API handed out a batch of {size} rollouts, this run trains {self.settings.batch_size} a step.",
                "The API is registered with another batch_size, by another trainer or an earlier run.",
                "Restart run-api and the environments, or set --per_device_train_batch_size and "
                "--gradient_accumulation_steps to its batch size (GET /info).",
            )

    def _with_policy_versions(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        if self.lookup_policy_versions is None:
            return list(groups)
        keys = [rollout_key(rollout.input_ids.tolist()) for group in groups for rollout in group.rollouts]
        versions = iter(self.lookup_policy_versions(keys))
        return [
            replace(
                group, rollouts=tuple(replace(rollout, policy_version=next(versions)) for rollout in group.rollouts)
            )
            for group in groups
        ]

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
            See [`~trl_atropos.advantages.group_advantages`].

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


def _untrain_truncated(
    rollouts: Sequence[Rollout], eos_token_ids: frozenset[int]
) -> tuple[list[Rollout], torch.Tensor]:
    """Take every token of the rollouts that end in the middle of a completion out of the loss; (B,) says which those are.

    The wire does not say why a completion ended: one that a stop string ended looks like one that was cut off.
    """
    last = torch.tensor([int(rollout.labels[-1]) for rollout in rollouts])
    is_truncated = (last != IGNORE_INDEX) & ~torch.isin(last, torch.tensor(sorted(eos_token_ids)))
    if is_truncated.all():
        logger.warning(
            "mask_truncated_completions: no rollout of this batch ends with an end-of-sequence token, so none is "
            "trained. If the environment stops completions at a string, set --mask_truncated_completions false."
        )
    kept = [
        replace(rollout, labels=torch.full_like(rollout.labels, IGNORE_INDEX)) if truncated else rollout
        for rollout, truncated in zip(rollouts, is_truncated.tolist(), strict=True)
    ]
    return kept, is_truncated


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


def _reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    rewards = [torch.tensor([rollout.reward for rollout in group.rollouts], dtype=torch.float64) for group in groups]
    # Compared, not computed: the standard deviation of equal numbers need not round to 0.
    ties = torch.tensor([bool((group == group[0]).all()) for group in rewards])
    return {
        "reward": mean_of(torch.cat(rewards)),
        "reward_std": mean_of(
            torch.stack([group.std() if group.numel() > 1 else group.sum() * 0 for group in rewards])
        ),
        "frac_reward_zero_std": mean_of(ties),
    }


def _length_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = torch.tensor([rollout.num_trained_tokens for rollout in rollouts])
    missing = torch.tensor([rollout.inference_logprobs is None for rollout in rollouts])
    return {
        "completions/mean_length": mean_of(lengths),
        "completions/min_length": minimum_of(lengths),
        "completions/max_length": maximum_of(lengths),
        "inference_logprobs/missing_frac": mean_of(missing),
    }


def _staleness_metrics(groups: Sequence[RolloutGroup], policy_version: int) -> dict[str, Metric]:
    versions = [rollout.policy_version for group in groups for rollout in group.rollouts]
    staleness = torch.tensor([policy_version - version for version in versions if version is not None])
    return {
        "staleness/mean": mean_of(staleness),
        "staleness/max": maximum_of(staleness),
        "staleness/unknown_frac": mean_of(torch.tensor([version is None for version in versions])),
    }


def _report_wait(elapsed_s: float, status: ApiStatus) -> None:
    logger.info(f"Waiting for a batch: {elapsed_s:.0f} s, {status.queue_size} groups in the API's queue")
