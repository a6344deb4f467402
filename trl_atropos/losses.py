"""Losses on the trained tokens of a micro-batch: pure functions of logprobs and advantages that return sums.

Shape letters: N trained tokens of a micro-batch.

A loss function knows no model, no ranks and no denominator. The trainer divides the sums by the trained tokens of the
whole optimizer step, so that any split of a batch into micro-batches and ranks gives the same gradient. Your own loss
is any callable with the signature of [`LossFunction`].
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .metrics import Metric, maximum_of, mean_of, minimum_of


LOSS_TYPES = ("weighted_sft", "grpo")

MAX_LOG_IMPORTANCE_RATIO = 20.0
"""exp(20) = 4.9e8. No policy moves that far; it is what a sentinel such as -9999 in inference_logprobs would give."""


@dataclass(frozen=True)
class LossInputs:
    """The trained tokens of a micro-batch, flat; entry n of every tensor belongs to the same token.

    Args:
        trainer_logprobs (`torch.Tensor` of shape `(N,)`, float32):
            Logprobs in nats under the current policy at the sampling temperature, with gradient.
        advantages (`torch.Tensor` of shape `(N,)`, float32):
            Normalised and clipped; finite.
        inference_logprobs (`torch.Tensor` of shape `(N,)`, float32, *optional*):
            Logprobs in nats under the policy that sampled; finite, at most 0.
        entropy (`torch.Tensor` of shape `(N,)`, float32):
            Entropy in nats of the current policy, detached. For the metrics.

    Raises:
        ValueError: the shapes differ.
    """

    trainer_logprobs: Tensor
    advantages: Tensor
    inference_logprobs: Tensor | None
    entropy: Tensor

    def __post_init__(self) -> None:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
        if len(set(shapes.values())) != 1 or self.trainer_logprobs.dim() != 1:
            raise ValueError(
                f"The loss inputs have shapes {shapes}, expected (N,) for all. Other shapes would broadcast and weigh "
                "tokens with the advantages of others. Select all of them with the same mask."
            )


@dataclass(frozen=True)
class LossOutputs:
    """What a loss function returns.

    Args:
        loss_sum (`torch.Tensor` of shape `()`):
            Sum of the per-token losses, with gradient; 0 with a graph when N = 0.
        metrics (`dict[str, Metric]`):
            By name, see `metrics.METRICS`.
    """

    loss_sum: Tensor
    metrics: dict[str, Metric]


class LossFunction(Protocol):
    """Maps the trained tokens of a micro-batch to the sum of their losses. Pure: no state, no collectives."""

    def __call__(self, inputs: LossInputs, /) -> LossOutputs: ...


def weighted_sft_loss(inputs: LossInputs) -> LossOutputs:
    """Advantage-weighted cross entropy: the sum of `-A * logprob` over the trained tokens.

    With all advantages 1 this is supervised finetuning. It has no lower bound where A < 0: it keeps pushing the
    probability of such a token towards 0. Its gradient is that of [PPO](https://huggingface.co/papers/1707.06347) and
    GRPO at importance ratio 1, so on policy, with one optimizer step per batch, the losses train alike; off policy,
    use `grpo`.

    Args:
        inputs ([`LossInputs`]):
            `inference_logprobs` may be None; they only feed metrics.

    Returns:
        [`LossOutputs`]: the sum, entropy, and the sampling metrics if there are inference logprobs.
    """
    loss_sum = -(inputs.advantages * inputs.trainer_logprobs).sum()
    return LossOutputs(loss_sum, {"entropy": mean_of(inputs.entropy), **_sampling_metrics(inputs)})


def clipped_ratio_loss(inputs: LossInputs, epsilon: float = 0.2, epsilon_high: float | None = None) -> LossOutputs:
    """The clipped surrogate of [PPO](https://huggingface.co/papers/1707.06347) with the advantages of
    [GRPO](https://huggingface.co/papers/2402.03300): the sum of `-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`
    over the trained tokens, with `r = exp(trainer_logprobs - inference_logprobs)`.

    The minimum is taken for both signs of A. A token stops moving once its ratio has left the interval in the
    direction of its advantage: above it for A > 0, below it for A < 0.

    Deviations from GRPO:

    1. Tokens are summed and later divided by the trained tokens of the step, not averaged per rollout first: every
       token weighs the same, as in [DAPO](https://huggingface.co/papers/2503.14476).
    2. The upper bound may differ from the lower one, as in DAPO.
    3. The denominator of the ratio is the policy that served, not a recomputation by the trainer: the ratio corrects
       for staleness and for the difference between both engines alike.
    4. There is no KL term.
    5. The log ratio is capped at 20; a token beyond it has no gradient. It stands out in
       `sampling/importance_sampling_ratio/max`.

    Args:
        inputs ([`LossInputs`]):
            With `inference_logprobs`.
        epsilon (`float`, *optional*, defaults to `0.2`):
            The ratio is clipped from below at 1 - epsilon; 0 to 1.
        epsilon_high (`float`, *optional*):
            The ratio is clipped from above at 1 + epsilon_high; at least 0. `epsilon` if not given.

    Returns:
        [`LossOutputs`]: the sum, entropy, clip and sampling metrics.

    Raises:
        ValueError: `inference_logprobs` is None.
    """
    if inputs.inference_logprobs is None:
        raise ValueError(
            "The clipped ratio loss got no inference_logprobs. Without them there is no importance ratio, and taking "
            "it as 1 would silently turn the clipping off. Resolve them first (recompute them with the policy that "
            "sampled, or drop the rollouts), or set `--loss_type weighted_sft`."
        )
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    advantages = inputs.advantages
    importance_ratio = _importance_ratio(inputs.trainer_logprobs, inputs.inference_logprobs)
    clipped_ratio = importance_ratio.clamp(min=1 - epsilon, max=1 + epsilon_high)
    loss_sum = -torch.minimum(importance_ratio * advantages, clipped_ratio * advantages).sum()

    is_low_clipped = (importance_ratio < 1 - epsilon) & (advantages < 0)
    is_high_clipped = (importance_ratio > 1 + epsilon_high) & (advantages > 0)
    metrics = {
        "entropy": mean_of(inputs.entropy),
        "clip_ratio/low_mean": mean_of(is_low_clipped),
        "clip_ratio/high_mean": mean_of(is_high_clipped),
        "clip_ratio/region_mean": mean_of(is_low_clipped | is_high_clipped),
        **_sampling_metrics(inputs),
    }
    return LossOutputs(loss_sum, metrics)


def make_loss_function(loss_type: str, *, epsilon: float, epsilon_high: float | None) -> LossFunction:
    """The loss function of a configuration.

    Args:
        loss_type (`str`):
            One of `LOSS_TYPES`.
        epsilon (`float`):
            For `"grpo"`: the ratio is clipped from below at 1 - epsilon.
        epsilon_high (`float`, *optional*):
            For `"grpo"`: the ratio is clipped from above at 1 + epsilon_high; `epsilon` if None.

    Returns:
        [`LossFunction`]: ready to be called.

    Raises:
        ValueError: unknown `loss_type`, or a negative epsilon.
    """
    if epsilon < 0 or (epsilon_high is not None and epsilon_high < 0):
        raise ValueError(
            f"epsilon is {epsilon} and epsilon_high is {epsilon_high}. They are distances from a ratio of 1, so the "
            "interval would be empty. Set `--epsilon` and `--epsilon_high` to 0 or more."
        )
    if loss_type == "weighted_sft":
        return weighted_sft_loss
    if loss_type == "grpo":
        return partial(clipped_ratio_loss, epsilon=epsilon, epsilon_high=epsilon_high)
    raise ValueError(
        f"Invalid value for loss_type: {loss_type!r}. There is no such loss. Set `--loss_type` to one of "
        f"{', '.join(LOSS_TYPES)}."
    )


def _importance_ratio(trainer_logprobs: Tensor, inference_logprobs: Tensor) -> Tensor:
    log_importance_ratio = trainer_logprobs - inference_logprobs
    return log_importance_ratio.clamp(max=MAX_LOG_IMPORTANCE_RATIO).exp()


def _sampling_metrics(inputs: LossInputs) -> dict[str, Metric]:
    if inputs.inference_logprobs is None:
        return {}
    trainer_logprobs = inputs.trainer_logprobs.detach()
    logprob_difference = (trainer_logprobs - inputs.inference_logprobs).abs()
    importance_ratio = _importance_ratio(trainer_logprobs, inputs.inference_logprobs)
    return {
        "sampling/sampling_logp_difference/mean": mean_of(logprob_difference),
        "sampling/sampling_logp_difference/max": maximum_of(logprob_difference),
        "sampling/importance_sampling_ratio/mean": mean_of(importance_ratio),
        "sampling/importance_sampling_ratio/min": minimum_of(importance_ratio),
        "sampling/importance_sampling_ratio/max": maximum_of(importance_ratio),
    }
