"""Losses on the trained tokens of a micro-batch: pure functions of logprobs and advantages that return one loss a token.

Shape letters: N trained tokens of a micro-batch, R rollouts of a micro-batch.

A loss function knows no model, no ranks and no denominator. What a token's loss is multiplied with before all are summed
depends on counts of the whole optimizer step; `token_weights` turns these counts into one weight per token. So any
split of a batch into micro-batches and ranks gives the same gradient. Your own loss is any callable with the signature
of [`LossFunction`].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .loss_types import AGGREGATIONS
from .metrics import Metric, maximum_of, mean_of, minimum_of
from .options import LossOptions


MAX_LOG_IMPORTANCE_RATIO = 20.0
"""exp(20) = 4.9e8. No policy moves that far; it is what a sentinel such as -9999 in inference_logprobs would give."""


MIN_LOG_ROLLOUT_RATIO = math.log(1e-8)
"""Of the ratio of a whole rollout, as in TRL's VESPO."""


@dataclass(frozen=True)
class LossInputs:
    """The trained tokens of a micro-batch, flat; entry n of every tensor belongs to the same token.

    Args:
        trainer_logprobs (`torch.Tensor` of shape `(N,)`, float32):
            Logprobs in nats under the current policy at the sampling temperature, with gradient.
        advantages (`torch.Tensor` of shape `(N,)`, float32):
            Normalised and clipped; finite.
        entropy (`torch.Tensor` of shape `(N,)`, float32):
            Entropy in nats of the current policy. For the metrics.
        rollout_index (`torch.Tensor` of shape `(N,)`, int64):
            Which rollout of the micro-batch a token belongs to, 0 to R - 1. A rollout is never split.
        num_rollouts (`int`):
            R; some rollouts may have no trained token.
        inference_logprobs (`torch.Tensor` of shape `(N,)`, float32, *optional*):
            Logprobs in nats under the policy that sampled, at most 0. NaN where unknown: such a token counts as
            sampled by the current policy (ratio 1). None: all unknown.
        ref_logprobs (`torch.Tensor` of shape `(N,)`, float32, *optional*):
            Logprobs in nats under the reference policy; finite.

    Raises:
        ValueError: the shapes differ.
    """

    trainer_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor
    rollout_index: Tensor
    num_rollouts: int
    inference_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shapes = {name: tuple(value.shape) for name, value in values.items() if isinstance(value, Tensor)}
        if len(set(shapes.values())) != 1 or self.trainer_logprobs.dim() != 1:
            raise ValueError(
                f"The loss inputs have shapes {shapes}, expected (N,) for all. Other shapes would broadcast and weigh "
                "tokens with the advantages of others. Select all of them with the same mask."
            )

    def sum_per_rollout(self, values: Tensor) -> Tensor:
        """Sums `values` (N,) over the tokens of each rollout: (R,)."""
        return values.new_zeros(self.num_rollouts).index_add(0, self.rollout_index, values)

    def mean_per_rollout(self, values: Tensor) -> Tensor:
        """Mean of `values` (N,) over the trained tokens of each rollout: (R,); 0 for a rollout without any."""
        return self.sum_per_rollout(values) / self.sum_per_rollout(torch.ones_like(values)).clamp(min=1)


@dataclass(frozen=True)
class LossOutputs:
    """What a loss function returns.

    Args:
        token_losses (`torch.Tensor` of shape `(N,)`):
            The loss of each token, with gradient, before [`token_weights`]. The loss of a whole rollout is given to
            each of its tokens.
        metrics (`dict[str, Metric]`):
            By name, see `report/metric_help.py`.
    """

    token_losses: Tensor
    metrics: dict[str, Metric]


class LossFunction(Protocol):
    """Maps the trained tokens of a micro-batch to their losses. Pure: no state, no collectives, no denominator."""

    def __call__(self, inputs: LossInputs, /) -> LossOutputs:
        """The losses of the trained tokens of a micro-batch."""
        ...


def make_loss_function(options: LossOptions) -> LossFunction:
    """The loss function of a configuration: [`policy_loss`] with its options."""
    return partial(policy_loss, options=options)


def policy_loss(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """All losses of this file: surrogate, then off-policy mask, then importance sampling correction, then KL.

    The order and the formulas are those of TRL's `GRPOTrainer`; docs/losses.md has one screen per `loss_type`, with
    its paper. Two ratios must be told apart:

    - without `vllm_importance_sampling_correction`, the surrogate's ratio is current policy / policy that sampled. Its
      clipping corrects for staleness and for the difference between both engines alike (TRL's `AsyncGRPOTrainer`).
    - with it, the surrogate's ratio is current policy / policy at the start of the step, which is 1 here, because a
      batch is trained in one optimizer step; the truncated or masked weight policy at the start / policy that sampled
      multiplies the loss (TRL's `GRPOTrainer` with vLLM).

    The metrics are entropy, clipping, and the difference to the policy that sampled.

    Raises:
        ValueError: `options.beta` is not 0 and there are no `ref_logprobs`.
    """
    metrics = {"entropy": mean_of(inputs.entropy), **_sampling_metrics(inputs)}
    sampling_difference = _difference_to_sampling(inputs)
    importance_ratio = _importance_ratio(inputs, options, sampling_difference)
    weights = None
    if options.vllm_importance_sampling_correction:
        weights = _importance_sampling_correction(inputs, sampling_difference, options)
        metrics["sampling/correction_weight/mean"] = mean_of(weights)
        metrics["sampling/correction_weight/zero_frac"] = mean_of(weights == 0)
    if options.loss_type == "vespo":
        token_losses, surrogate_metrics = _vespo(inputs, options, sampling_difference, weights)
        # They are a part of the ratio of the rollout.
        weights = None
    else:
        token_losses, surrogate_metrics = _surrogate(inputs, options, importance_ratio)
    metrics.update(surrogate_metrics)

    if options.off_policy_mask_threshold is not None:
        is_kept = _off_policy_mask(inputs, sampling_difference, options.off_policy_mask_threshold)
        token_losses = token_losses * is_kept
        metrics["off_policy_mask/masked_frac"] = mean_of(~is_kept)
    if weights is not None:
        token_losses = token_losses * weights
    if options.beta != 0.0:
        kl = _kl_to_reference(inputs)
        if options.use_bias_correction_kl:
            kl = kl * importance_ratio
        token_losses = token_losses + options.beta * kl
        metrics["kl"] = mean_of(kl)
    return LossOutputs(token_losses, metrics)


def token_weights(
    rollout_index: Tensor,
    num_rollout_tokens: Tensor,
    aggregation: str,
    *,
    num_trained_tokens: int,
    num_rollouts: int,
    max_completion_length: int,
) -> Tensor:
    """What the loss of each token is multiplied with before all are summed over the optimizer step, (N,) float32.

    | aggregation | weight | the loss is |
    |---|---|---|
    | `token` | 1 / trained tokens of the step | a mean over tokens |
    | `rollout` | 1 / (rollouts of the step x trained tokens of its rollout) | a mean over rollouts of means over tokens |
    | `constant` | 1 / (rollouts of the step x max_completion_length) | a sum over tokens, at a constant scale |
    | `rollout_sum` | 1 / rollouts of the step | a mean over rollouts of sums over tokens |

    `rollout_index` (N,) int64 says which rollout of the micro-batch a token belongs to, and `num_rollout_tokens` (R,)
    int64 how many trained tokens each has. `num_trained_tokens` and `num_rollouts` count the whole optimizer step, all
    micro-batches and ranks, rollouts without a trained token included. `max_completion_length`, in tokens, is the
    constant of `constant`.

    Raises:
        ValueError: unknown `aggregation`.
    """
    if aggregation == "token":
        scale = 1 / max(num_trained_tokens, 1)
    elif aggregation == "constant":
        scale = 1 / (max(num_rollouts, 1) * max_completion_length)
    elif aggregation in ("rollout", "rollout_sum"):
        scale = 1 / max(num_rollouts, 1)
    else:
        raise ValueError(
            f"Invalid value for aggregation: {aggregation!r}. It says what a token's loss is divided by. Use one of "
            f"{', '.join(sorted(set(AGGREGATIONS.values())))}."
        )
    weights = torch.full(rollout_index.shape, scale, dtype=torch.float32, device=rollout_index.device)
    return weights / num_rollout_tokens[rollout_index] if aggregation == "rollout" else weights


def _importance_ratio(inputs: LossInputs, options: LossOptions, sampling_difference: Tensor) -> Tensor:
    """Ratio (N,) of the surrogate, with gradient. Capped at exp(20), where it has none."""
    # The value is that of current - denominator; the gradient goes through the current policy only.
    log_ratio = inputs.trainer_logprobs - inputs.trainer_logprobs.detach()
    if not options.vllm_importance_sampling_correction:
        log_ratio = log_ratio + sampling_difference
    if options.importance_sampling_level == "sequence":
        log_ratio = inputs.mean_per_rollout(log_ratio)[inputs.rollout_index]
    return log_ratio.clamp(max=MAX_LOG_IMPORTANCE_RATIO).exp()


def _surrogate(inputs: LossInputs, options: LossOptions, importance_ratio: Tensor) -> tuple[Tensor, dict[str, Metric]]:
    advantages, trainer_logprobs = inputs.advantages, inputs.trainer_logprobs
    if options.loss_type == "weighted_sft":
        return -advantages * trainer_logprobs, {}
    if options.loss_type == "cispo":
        cap = options.upper_epsilon
        token_losses = -importance_ratio.clamp(max=cap).detach() * advantages * trainer_logprobs
        return token_losses, {"cispo_clip_ratio": mean_of((importance_ratio > cap) & (advantages > 0))}
    if options.loss_type == "sapo":
        temperature = torch.where(advantages > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        gate = torch.sigmoid(temperature * (importance_ratio - 1)) * 4 / temperature
        return -gate * advantages, {}
    low, high = 1 - options.epsilon, 1 + options.upper_epsilon
    clipped_ratio = importance_ratio.clamp(min=low, max=high)
    bounded_ratio = importance_ratio if options.delta is None else importance_ratio.clamp(max=options.delta)
    token_losses = -torch.minimum(bounded_ratio * advantages, clipped_ratio * advantages)
    return token_losses, _clip_metrics(inputs, importance_ratio, low, high)


def _vespo(
    inputs: LossInputs, options: LossOptions, sampling_difference: Tensor, weights: Tensor | None
) -> tuple[Tensor, dict[str, Metric]]:
    """The loss of [VESPO](https://huggingface.co/papers/2602.10693): a weight without gradient, 1 at a ratio of 1.

    The ratio w of a rollout is the product of those of its tokens, or of the `weights` (N,) of the correction; its weight
    is e^lambda w^k e^(-lambda w).
    """
    log_ratio = sampling_difference if weights is None else weights.log()
    low = -MAX_LOG_IMPORTANCE_RATIO if weights is None else MIN_LOG_ROLLOUT_RATIO
    of_tokens = log_ratio.clamp(min=low, max=MAX_LOG_IMPORTANCE_RATIO)
    log_w = inputs.sum_per_rollout(of_tokens).clamp(min=MIN_LOG_ROLLOUT_RATIO, max=MAX_LOG_IMPORTANCE_RATIO)
    log_w = log_w[inputs.rollout_index]
    is_good = inputs.advantages >= 0
    power = torch.where(is_good, options.vespo_k_pos, options.vespo_k_neg)
    decay = torch.where(is_good, options.vespo_lambda_pos, options.vespo_lambda_neg)
    phi = (decay + power * log_w - decay * log_w.exp()).exp()
    return -phi * inputs.advantages * inputs.trainer_logprobs, {"vespo/phi_seq_mean": mean_of(phi)}


def _difference_to_sampling(inputs: LossInputs) -> Tensor:
    """trainer_logprobs - inference_logprobs, detached; 0 where the latter are unknown."""
    if inputs.inference_logprobs is None:
        return torch.zeros_like(inputs.trainer_logprobs)
    return (inputs.trainer_logprobs.detach() - inputs.inference_logprobs).nan_to_num(nan=0.0)


def _off_policy_mask(inputs: LossInputs, sampling_difference: Tensor, threshold: float) -> Tensor:
    """Off-policy sequence masking of [DeepSeek-V3.2](https://huggingface.co/papers/2512.02556): drops the tokens with a
    negative advantage of rollouts whose mean KL (policy that sampled, current policy) exceeds the threshold."""
    kl = inputs.mean_per_rollout(-sampling_difference)[inputs.rollout_index]
    return (inputs.advantages >= 0) | (kl <= threshold)


def _importance_sampling_correction(inputs: LossInputs, sampling_difference: Tensor, options: LossOptions) -> Tensor:
    """Weights (N,) of truncated (TIS) or masked (MIS) importance sampling; 1 where the logprob is unknown."""
    log_ratio = sampling_difference
    if options.vllm_importance_sampling_mode.startswith("sequence"):
        log_ratio = inputs.sum_per_rollout(log_ratio)[inputs.rollout_index]
    ratio = log_ratio.clamp(max=MAX_LOG_IMPORTANCE_RATIO).exp()
    low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
    if options.vllm_importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high) if (low, high) != (None, None) else ratio
    is_outside = torch.zeros_like(ratio, dtype=torch.bool)
    if low is not None:
        is_outside |= ratio < low
    if high is not None:
        is_outside |= ratio > high
    return ratio.masked_fill(is_outside, 0.0)


def _kl_to_reference(inputs: LossInputs) -> Tensor:
    """The k3 estimator of [Schulman](http://joschu.net/blog/kl-approx.html): unbiased, at least 0, (N,)."""
    if inputs.ref_logprobs is None:
        raise ValueError(
            "beta is not 0 and the loss got no ref_logprobs. The KL term needs the logprobs of the reference policy. "
            "Give them, or set `--beta 0`."
        )
    log_ratio = inputs.ref_logprobs - inputs.trainer_logprobs
    return log_ratio.exp() - log_ratio - 1


def _clip_metrics(inputs: LossInputs, importance_ratio: Tensor, low: float, high: float) -> dict[str, Metric]:
    is_low_clipped = (importance_ratio < low) & (inputs.advantages < 0)
    is_high_clipped = (importance_ratio > high) & (inputs.advantages > 0)
    # Rollouts without a trained token have no fraction.
    has_tokens = inputs.sum_per_rollout(torch.ones_like(inputs.advantages)) > 0
    return {
        "clip_ratio/low_mean": mean_of(is_low_clipped),
        "clip_ratio/low_min": minimum_of(inputs.mean_per_rollout(is_low_clipped.float())[has_tokens]),
        "clip_ratio/high_mean": mean_of(is_high_clipped),
        "clip_ratio/high_max": maximum_of(inputs.mean_per_rollout(is_high_clipped.float())[has_tokens]),
        "clip_ratio/region_mean": mean_of(is_low_clipped | is_high_clipped),
    }


def _sampling_metrics(inputs: LossInputs) -> dict[str, Metric]:
    """Metrics of the tokens whose inference logprob is known: made-up ratios of 1 must not hide that the others are
    off.
    """
    if inputs.inference_logprobs is None:
        return {}
    is_known = ~inputs.inference_logprobs.isnan()
    difference = (inputs.trainer_logprobs.detach() - inputs.inference_logprobs)[is_known]
    importance_ratio = difference.clamp(max=MAX_LOG_IMPORTANCE_RATIO).exp()
    return {
        "sampling/sampling_logp_difference/mean": mean_of(difference.abs()),
        "sampling/sampling_logp_difference/max": maximum_of(difference.abs()),
        "sampling/importance_sampling_ratio/mean": mean_of(importance_ratio),
        "sampling/importance_sampling_ratio/min": minimum_of(importance_ratio),
        "sampling/importance_sampling_ratio/max": maximum_of(importance_ratio),
    }
