"""Metrics of rollouts, of a whole step or of one environment's part of it.

Shape letters: B rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..loss.metrics import Metric, maximum_of, mean_of, minimum_of
from ..types import IGNORE_INDEX, Rollout, RolloutGroup


def rollout_metrics(
    groups: Sequence[RolloutGroup], policy_version: int, eos_token_ids: frozenset[int] | None
) -> dict[str, Metric]:
    """What is known of rollouts before they are trained: rewards, lengths, logprobs and age.

    `groups` are what is trained in one optimizer step, or one environment's part of it, as validation left it; without
    any, the metrics have no data. `policy_version` is the trainer's when the step begins. `eos_token_ids` are the
    tokens that end a completion; None: `completions/clipped_ratio` is left out. `report/metric_help.py` explains the
    names.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = {
        **_reward_metrics(groups),
        **_length_metrics(rollouts),
        **_staleness_metrics(rollouts, policy_version),
        "inference_logprobs/missing_frac": mean_of(
            _flags([rollout.inference_logprobs is None for rollout in rollouts])
        ),
        "sampling/other_distribution_frac": mean_of(
            _flags([bool(rollout.sampling_parameters) for rollout in rollouts])
        ),
    }
    if eos_token_ids is not None:
        metrics["completions/clipped_ratio"] = mean_of(are_truncated(rollouts, eos_token_ids))
    return metrics


def dropped_metrics(stale: Sequence[RolloutGroup]) -> dict[str, Metric]:
    """How many rollouts of an optimizer step were dropped as too old, and how long they were in trained tokens.

    Long ones take longer to sample, and are stale more often.
    """
    lengths = [float(rollout.num_trained_tokens) for group in stale for rollout in group.rollouts]
    return {
        "staleness/num_dropped": mean_of(float(len(lengths))),
        "staleness/dropped_mean_length": mean_of(torch.tensor(lengths)),
    }


def are_truncated(rollouts: Sequence[Rollout], eos_token_ids: frozenset[int]) -> Tensor:
    """Which rollouts end in the middle of a completion, (B,) bool: with a trained token that ends none.

    `eos_token_ids` are the tokens that end a completion. The wire does not say why one ended: a completion that a stop
    string ended looks like one that was cut off.
    """
    last = torch.tensor([int(rollout.labels[-1]) for rollout in rollouts], dtype=torch.int64)
    return (last != IGNORE_INDEX) & ~torch.isin(last, torch.tensor(sorted(eos_token_ids), dtype=torch.int64))


def _reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    rewards = [torch.tensor([rollout.reward for rollout in group.rollouts], dtype=torch.float64) for group in groups]
    stds = [group.std().item() if group.numel() > 1 else 0.0 for group in rewards]
    return {
        "reward": mean_of(torch.cat([torch.zeros(0, dtype=torch.float64), *rewards])),
        "reward_std": mean_of(torch.tensor(stds, dtype=torch.float64)),
        # Compared, not computed: the standard deviation of equal numbers need not round to 0.
        "frac_reward_zero_std": mean_of(_flags([bool((group == group[0]).all()) for group in rewards])),
    }


def _length_metrics(rollouts: Sequence[Rollout]) -> dict[str, Metric]:
    lengths = torch.tensor([float(rollout.num_trained_tokens) for rollout in rollouts])
    return {
        "completions/mean_length": mean_of(lengths),
        "completions/min_length": minimum_of(lengths),
        "completions/max_length": maximum_of(lengths),
    }


def _staleness_metrics(rollouts: Sequence[Rollout], policy_version: int) -> dict[str, Metric]:
    staleness = [rollout.staleness(policy_version) for rollout in rollouts]
    known = torch.tensor([float(value) for value in staleness if value is not None])
    return {
        "staleness/mean": mean_of(known),
        "staleness/max": maximum_of(known),
        "staleness/unknown_frac": mean_of(_flags([value is None for value in staleness])),
    }


def _flags(values: list[bool]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)
