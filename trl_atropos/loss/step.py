"""What an optimizer step must know of all its micro-batches before the first forward pass, and of its losses after it.

Shape letters: N trained tokens of a micro-batch, R rollouts of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import gather_over_ranks, is_distributed, sum_over_ranks
from ..errors import NonFiniteGradientError
from .advantages import advantage_statistics, clip_advantages, normalize_advantages, standardize_advantages
from .loss_types import AGGREGATIONS
from .losses import token_weights
from .metrics import Metric, mean_of
from .options import StepOptions


def prepare_step(
    micro_batches: Sequence[dict[str, Any]],
    options: StepOptions,
    max_length: int,
    device: torch.device,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[int, dict[str, Metric]]:
    """Normalise and clip the advantages of a step, and weigh its tokens.

    A collective call: every rank makes it, also one whose micro-batches are empty. Statistics and denominators cover
    all micro-batches of all ranks of `process_group`, which hold every rollout once (None: all ranks), so that any
    split of the same rollouts gives the same gradient. The backend of the group must be able to reduce on `device`.
    `max_length`, the longest rollout in tokens, is the constant of `dr_grpo` if `max_completion_length` is not set.

    The micro-batches come from [`~data.micro_batches.RolloutCollator`] and are changed:

    - `advantages` are normalised, clipped, and scaled: 0 where the environment asked for that, less where a rollout is
      down-weighted;
    - `token_weights` (N,) are added;
    - `token_mean_weight` and `teacher_mean_weight` () are added: 1 / trained tokens of the step, and 1 / those with a
      teacher, with which a sum over such tokens becomes a mean;
    - `num_with_teacher` is added, which counts the tokens with a teacher of the micro-batch.

    Returns the number of trained tokens of the step over all ranks, and metrics of the advantages.
    """
    advantages = [batch["advantages"] for batch in micro_batches]
    masks = [torch.ones_like(values, dtype=torch.bool) for values in advantages]
    statistics = advantage_statistics(advantages, masks, process_group, distributed=is_distributed(), device=device)
    for batch in micro_batches:
        batch["num_with_teacher"] = _num_with_teacher(batch)
    num_with_teacher = sum(batch["num_with_teacher"] for batch in micro_batches)
    num_rollouts = sum(batch["num_rollouts"] for batch in micro_batches)
    num_rollouts, num_with_teacher = map(int, sum_over_ranks([num_rollouts, num_with_teacher], device, process_group))
    metrics = {
        "num_trained_tokens": mean_of(float(statistics.num_trained_tokens)),
        "advantages/zero_std": mean_of(statistics.std == 0),
        "perf/num_micro_batches": mean_of(float(len(micro_batches))),
        "perf/computed_tokens_frac": _computed_tokens_frac(micro_batches),
    }
    clipped_low, clipped_high = [], []
    for batch, mask in zip(micro_batches, masks, strict=True):
        if options.advantage_normalization == "global":
            normalized = standardize_advantages(batch["advantages"], mask, statistics)
        else:
            normalized = normalize_advantages(batch["advantages"], mask, options.advantage_normalization)
        if options.advantage_clipping is not None:
            clipped_low.append(normalized < options.advantage_clipping[0])
            clipped_high.append(normalized > options.advantage_clipping[1])
        clipped = clip_advantages(normalized, options.advantage_clipping)
        batch["advantages"] = clipped * batch["advantage_scale"][batch["rollout_index"]]
        batch["token_weights"] = token_weights(
            batch["rollout_index"],
            batch["num_rollout_tokens"],
            AGGREGATIONS[options.loss_type],
            num_trained_tokens=statistics.num_trained_tokens,
            num_rollouts=num_rollouts,
            max_completion_length=options.max_completion_length or max_length,
        )
        batch["token_mean_weight"] = torch.tensor(1 / max(statistics.num_trained_tokens, 1))
        batch["teacher_mean_weight"] = torch.tensor(1 / max(num_with_teacher, 1))
    if clipped_low:
        metrics["advantages/clipped_frac_low"] = mean_of(torch.cat(clipped_low))
        metrics["advantages/clipped_frac_high"] = mean_of(torch.cat(clipped_high))
    return statistics.num_trained_tokens, metrics


def keep_high_entropy(
    micro_batches: Sequence[dict[str, Any]],
    entropies: Sequence[Tensor],
    quantile: float,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Metric]:
    """Train only those tokens of a step at which the policy is least sure; a collective call.

    [Beyond the 80/20 Rule](https://huggingface.co/papers/2506.01939). Deviations, the first from TRL, too: (1) the threshold is that
    of the whole step, not of a micro-batch; (2) the KL term and the entropy bonus act on all trained tokens.

    `entropies` has (N,) in nats for each micro-batch, and the share `quantile` of all tokens of `process_group`, in [0, 1], is
    kept: the others get an advantage of 0. Returns the metric of the threshold.
    """
    entropies = [entropy.float().cpu() for entropy in entropies]
    of_step = gather_over_ranks(torch.cat([torch.zeros(0), *entropies]), process_group)
    if of_step.numel() == 0:
        return {}
    threshold = torch.quantile(of_step, 1 - quantile)
    for batch, entropy in zip(micro_batches, entropies, strict=True):
        batch["advantages"] = torch.where(entropy >= threshold, batch["advantages"], 0.0)
    return {"entropy_mask/threshold": mean_of(threshold)}


def teacher_cross_entropy(student_logprobs: Tensor, batch: dict[str, Any]) -> Tensor:
    """Sum over the trained tokens with a teacher of `-sum_k p_k log q_k`, over the tokens k that the teacher named.

    The gradient is that of the KL divergence from the teacher p to the student q, cut off at the named tokens
    ([Hinton et al. 2015](https://huggingface.co/papers/1503.02531)). Deviations: p is not normalised over the named
    tokens, so a teacher that named little mass pulls little; the temperature is 1.

    `student_logprobs` (N, K) float32 are log q_k, with gradient; anything where the teacher named no token. The batch
    has `teacher_logprobs` (N, K), log p_k, -inf where there is no token. All are in nats.
    """
    teacher_logprobs: Tensor = batch["teacher_logprobs"]
    is_named = teacher_logprobs > -torch.inf
    # Selected, not multiplied with 0: the logprob of a padded id may be -inf.
    return -(teacher_logprobs[is_named].exp() * student_logprobs[is_named]).sum()


def distillation_loss(student_logprobs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Metric]:
    """A micro-batch's share of the mean cross entropy to the teacher, and its metric; see [`teacher_cross_entropy`]."""
    total = teacher_cross_entropy(student_logprobs, batch)
    metric = Metric("mean", total.detach().double(), batch["num_with_teacher"])
    return total * batch["teacher_mean_weight"], metric


def _computed_tokens_frac(micro_batches: Sequence[dict[str, Any]]) -> Metric:
    computed = sum(batch["input_ids"].numel() for batch in micro_batches)
    num_tokens = sum(batch["num_sequence_tokens"] for batch in micro_batches)
    return Metric("mean", torch.tensor(float(computed), dtype=torch.float64), num_tokens)


def _num_with_teacher(batch: dict[str, Any]) -> int:
    if "teacher_logprobs" not in batch:
        return 0
    return int((batch["teacher_logprobs"] > -torch.inf).any(dim=-1).sum())


MIN_LOSS_SCALE = 1.0
"""Scale of the loss in float16 down to which a gradient that is not finite is an overflow: below, nothing was gained."""


def is_overflow(grad_norm: Tensor | float | None, loss_scale: float | None) -> bool:
    """Whether a gradient is not finite because the loss was scaled up too far for float16.

    A scaler finds the largest scale by going beyond it: it then leaves the optimizer step out and halves the scale.

    `grad_norm` is that over all parameters and ranks, None if nobody computed it, and `loss_scale` the factor of the
    loss, None without a scaler.
    """
    if grad_norm is None or loss_scale is None:
        return False
    return loss_scale > MIN_LOSS_SCALE and not math.isfinite(float(grad_norm))


def check_grad_norm(step: int, grad_norm: Tensor | float | None) -> None:
    """Refuse a gradient with a norm that is not finite.

    `grad_norm` is that of the optimizer step number `step`, over all parameters and ranks; None, if nobody computed
    it, passes.

    Raises:
        NonFiniteGradientError: it is NaN or infinite.
    """
    if grad_norm is not None and not math.isfinite(float(grad_norm)):
        raise NonFiniteGradientError(
            f"The gradient norm of step {step} is {float(grad_norm)}.",
            "The optimizer step was not taken: the model and the server hold the last good policy.",
            "Resume from the last checkpoint with a smaller --learning_rate, or set --max_grad_norm; in half "
            "precision load the model in float32 (--dtype float32), and take --bf16 for --fp16.",
        )


class LossWatch:
    """Remembers which rollouts of a step had a loss that is not finite, without waiting for the accelerator."""

    def __init__(self) -> None:
        self._seen: list[tuple[list[str], Tensor]] = []

    def add(self, names: list[str], rollout_losses: Tensor) -> None:
        """Adds the summed losses (R,) of the rollouts of a micro-batch, and how messages name them."""
        self._seen.append((names, rollout_losses.detach().isfinite()))

    def check(self, step: int, device: torch.device) -> None:
        """Raises on every rank if a loss of any rank since the last call was not finite. A collective call.

        A rank that raised alone would leave the others to take the optimizer step number `step` and wait for it in the
        next one. The backend of the default process group must be able to reduce on `device`.

        Raises:
            NonFiniteGradientError: names the rollouts of this rank.
        """
        seen, self._seen = self._seen, []
        names = [
            name
            for names, is_finite in seen
            for name, finite in zip(names, is_finite.tolist(), strict=True)
            if not finite
        ]
        (num_anywhere,) = sum_over_ranks([float(len(names))], device)
        if num_anywhere == 0:
            return
        shown = "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
        raise NonFiniteGradientError(
            f"The loss of step {step} is not finite, because of {shown or 'a rollout of another rank'}.",
            "The optimizer step was not taken: the model and the server hold the last good policy.",
            "Look these rollouts up in the journal (output_dir/journal). A trained token that the policy holds for impossible "
            "does that, and so does a loss_fn of your own.",
        )
