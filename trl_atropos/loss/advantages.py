"""From rewards to the advantage of every trained token: centre in the group, normalise, clip.

Shape letters: G rollouts of a group, T tokens.

The order is normalise (trained tokens only), clip, mask, reduce. Statistics are made in float64 and in two passes:
`E[x^2] - E[x]^2` loses the variance of values whose spread is small against their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


SCALE_REWARDS = ("group", "batch", "none")
ADVANTAGE_BASELINES = ("group", "leave_one_out", "batch")
ADVANTAGE_NORMALIZATIONS = ("none", "batch", "global")

GROUP_STD_EPS = 1e-4
NORMALIZATION_EPS = 1e-8


@dataclass(frozen=True)
class AdvantageStatistics:
    """Mean and unbiased standard deviation of the advantages of `num_trained_tokens` trained tokens.

    With fewer than two tokens the mean is 0.0 and the standard deviation 1.0, so that standardising leaves a single
    token as it is. The standard deviation is 0.0 when all advantages are equal.
    """

    mean: float
    std: float
    num_trained_tokens: int


def group_advantages(
    rewards: Tensor,
    scale_rewards: str,
    batch_std: float | None = None,
    *,
    baseline: str = "group",
    batch_mean: float | None = None,
) -> Tensor:
    """Advantages (G,) float32 of the rollouts of one group, as in [GRPO](https://huggingface.co/papers/2402.03300).

    Deviations from the paper, both shared with TRL:

    1. 1e-4 is added to the standard deviation.
    2. The standard deviation is the unbiased one.

    `rewards` (G,) are finite, and read in float32, so that rewards that are equal give exactly 0. `baseline` says what is
    subtracted from a reward:

    - `"group"`, the mean of its group; a group of one rollout gives 0;
    - `"leave_one_out"`, the mean of the others in its group
      ([RLOO](https://huggingface.co/papers/2402.14740)); a group of one rollout gives 0;
    - `"batch"`, `batch_mean`, the mean of all rewards of the step, so that groups of one are trained
      ([REINFORCE++](https://huggingface.co/papers/2501.03262); without its KL term in the reward, and with the standard
      deviation of rewards in the place of that of the tokens' advantages, for which there is `advantage_normalization`).

    What `scale_rewards` does:

    - `"group"` divides the centred rewards by the standard deviation of the group;
    - `"batch"` divides them by `batch_std`, the unbiased standard deviation of all rewards of the step
      ([PPO Lite](https://huggingface.co/papers/2508.08221));
    - `"none"` does not divide: `"group"` gives questions with a small spread of rewards more weight
      ([Dr. GRPO](https://huggingface.co/papers/2503.20783)).

    Raises:
        ValueError: unknown `scale_rewards` or `baseline`, rewards that are not a vector, or `"batch"` without `batch_std` or
            `batch_mean`.
    """
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(
            f"Invalid value for scale_rewards: {scale_rewards!r}. It decides how advantages of a group are scaled. "
            f"Set `--scale_rewards` to one of {', '.join(SCALE_REWARDS)}."
        )
    if baseline not in ADVANTAGE_BASELINES:
        raise ValueError(
            f"Invalid value for advantage_baseline: {baseline!r}. It is what a reward is compared with. Set "
            f"`--advantage_baseline` to one of {', '.join(ADVANTAGE_BASELINES)}."
        )
    if rewards.dim() != 1:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}, expected (G,). The mean is taken over the rollouts of one "
            "prompt. Call group_advantages once per group."
        )
    values = rewards.to(torch.float32).to(torch.float64)
    if baseline == "batch":
        if batch_mean is None:
            raise ValueError(
                "baseline is 'batch' and batch_mean is None. The rewards of one group do not tell the mean over the batch. Pass "
                "the mean of all rewards of the step."
            )
        advantages = values - batch_mean
    elif rewards.numel() < 2:
        return torch.zeros_like(rewards, dtype=torch.float32)
    else:
        advantages = values - values.mean()
        if baseline == "leave_one_out":
            # r - (sum - r) / (G - 1), and exactly 0 where all rewards are equal.
            advantages = advantages * (rewards.numel() / (rewards.numel() - 1))
    if scale_rewards == "group":
        advantages = advantages / (values.std() + GROUP_STD_EPS)
    elif scale_rewards == "batch":
        if batch_std is None:
            raise ValueError(
                "scale_rewards is 'batch' and batch_std is None. The rewards of one group do not tell the spread over "
                "the batch. Pass the standard deviation of all rewards of the step."
            )
        advantages = advantages / (batch_std + GROUP_STD_EPS)
    return advantages.to(torch.float32)


def advantage_statistics(
    advantages: Sequence[Tensor],
    loss_masks: Sequence[Tensor],
    process_group: dist.ProcessGroup | None = None,
    distributed: bool = False,
    device: torch.device | str = "cpu",
) -> AdvantageStatistics:
    """Statistics of the trained tokens of all micro-batches and, when `distributed`, of all ranks.

    A collective call when `distributed`: every rank of the group must make it, also one that has no data (it passes
    empty lists), and gets the same. The group must hold data-parallel ranks only; ranks that see the same tokens count
    them twice.

    `advantages` has one tensor of any shape per micro-batch, finite where trained; the masks have the same shapes,
    bool, True where a token is trained. The float64 sums are made on `device`, on which the backend of `process_group`
    must be able to reduce; None is the default group.

    Raises:
        ValueError: a mask that does not fit its advantages, or an advantage that is not finite at a trained position.
            The latter is raised on every rank, whichever has it: a rank that raised alone would leave the others
            waiting in the second collective.
    """
    if len(advantages) != len(loss_masks):
        raise ValueError(
            f"Got {len(advantages)} advantage tensors and {len(loss_masks)} loss masks. Each micro-batch has one of "
            "both. Pass two sequences of the same length."
        )
    for tensor, loss_mask in zip(advantages, loss_masks, strict=True):
        _check_mask(tensor, loss_mask)
    trained = [tensor[mask].to(device).to(torch.float64) for tensor, mask in zip(advantages, loss_masks, strict=True)]
    values = torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *trained])

    num_not_finite = (~values.isfinite()).sum()
    totals = torch.stack([values.new_tensor(values.numel()), values.sum(), num_not_finite.to(torch.float64)])
    if distributed:
        dist.all_reduce(totals, group=process_group)
    count, total, num_not_finite_anywhere = totals.tolist()
    if num_not_finite_anywhere > 0:
        raise ValueError(
            f"{int(num_not_finite_anywhere)} of {int(count)} trained advantages are not finite, {int(num_not_finite)} "
            "of them on this rank. One of them makes every weight NaN. Drop the rollout, or untrain its tokens with "
            "label -100."
        )
    # Like the check above, this depends on reduced numbers only: all ranks leave here, or none does.
    if count < 2:
        return AdvantageStatistics(mean=0.0, std=1.0, num_trained_tokens=int(count))

    mean = total / count
    squared_deviations = (values - mean).square().sum()
    if distributed:
        dist.all_reduce(squared_deviations, group=process_group)
    std = math.sqrt(squared_deviations.item() / (count - 1))
    return AdvantageStatistics(mean=mean, std=std, num_trained_tokens=int(count))


def standardize_advantages(advantages: Tensor, loss_mask: Tensor, statistics: AdvantageStatistics) -> Tensor:
    """`(A - mean) / (std + 1e-8)` where trained, 0 elsewhere; in the shape and dtype of `advantages`.

    `advantages` of any shape are finite where `loss_mask`, bool of the same shape, is True; anything, also NaN,
    elsewhere. A standard deviation of 0 gives exactly 0 everywhere; statistics of a single float32 token leave it as
    it is.

    Raises:
        ValueError: the mask does not fit the advantages.
    """
    _check_mask(advantages, loss_mask)
    centred = advantages.to(torch.float64) - statistics.mean
    standardized = (centred / (statistics.std + NORMALIZATION_EPS)).to(advantages.dtype)
    return torch.where(loss_mask, standardized, torch.zeros_like(standardized))


def normalize_advantages(
    advantages: Tensor,
    loss_mask: Tensor,
    mode: str,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Normalises the advantages of one tensor over its trained tokens.

    A trainer that accumulates gradients calls [`advantage_statistics`] over all micro-batches of the step instead:
    `"batch"` makes the result depend on what happens to share a micro-batch.

    Args:
        advantages (`torch.Tensor` of any shape):
            Finite where trained.
        loss_mask (`torch.Tensor` of the same shape, bool):
            True where a token is trained.
        mode (`str`):
            `"none"` keeps the values. `"batch"` takes mean and standard deviation of this tensor. `"global"` takes
            them over this tensor on all ranks of the group, and is then a collective call; without an initialised
            `torch.distributed` this process is all there is.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The data-parallel ranks of `"global"`; the default group if not given. Its backend must support the device
            of `advantages`.

    Returns:
        `torch.Tensor` of the shape and dtype of `advantages`; 0 where untrained, in every mode.

    Raises:
        ValueError: unknown mode, a mask that does not fit, or a trained advantage that is not finite.
    """
    if mode not in ADVANTAGE_NORMALIZATIONS:
        raise ValueError(
            f"Invalid value for advantage_normalization: {mode!r}. It decides over which tokens advantages are "
            f"normalised. Set `--advantage_normalization` to one of {', '.join(ADVANTAGE_NORMALIZATIONS)}."
        )
    distributed = mode == "global" and dist.is_available() and dist.is_initialized()
    statistics = advantage_statistics([advantages], [loss_mask], process_group, distributed, advantages.device)
    if mode == "none":
        return torch.where(loss_mask, advantages, torch.zeros_like(advantages))
    return standardize_advantages(advantages, loss_mask, statistics)


def clip_advantages(advantages: Tensor, clipping: Sequence[float] | None) -> Tensor:
    """Clamps advantages; applied after normalisation, so that the bounds are in the units it left.

    This bounds the weight of one token. It is no trust region: that is the clipped ratio of `losses.py`.

    Args:
        advantages (`torch.Tensor` of any shape):
            Finite.
        clipping (sequence of two `float`, *optional*):
            Smallest and largest value; `None` keeps the advantages as they are.

    Returns:
        `torch.Tensor` of the shape and dtype of `advantages`.

    Raises:
        ValueError: `clipping` is not two finite ascending numbers.
    """
    validate_clipping(clipping)
    if clipping is None:
        return advantages
    low, high = clipping
    return advantages.clamp(min=low, max=high)


def validate_clipping(clipping: Sequence[float] | None) -> None:
    """Refuses bounds that are not two finite ascending numbers. None (no clipping) passes.

    Raises:
        ValueError: `clipping` is something else.
    """
    if clipping is None:
        return
    bounds = tuple(clipping)
    are_numbers = all(isinstance(bound, (int, float)) and math.isfinite(bound) for bound in bounds)
    if len(bounds) != 2 or not are_numbers or bounds[0] >= bounds[1]:
        raise ValueError(
            f"advantage_clipping is {clipping!r}. It must be two finite numbers, the smaller first: the smallest and "
            "the largest advantage. Set `--advantage_clipping -5 5`, or leave it out to clip nothing."
        )


def _check_mask(advantages: Tensor, loss_mask: Tensor) -> None:
    if advantages.shape != loss_mask.shape:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}, loss_mask has shape {tuple(loss_mask.shape)}. Each "
            "token has one of both. Expand an advantage per rollout to its tokens first."
        )
    if loss_mask.dtype != torch.bool:
        # An integer mask would be read as indices, silently.
        raise ValueError(
            f"loss_mask has dtype {loss_mask.dtype}, expected torch.bool. Indexing with it would pick other tokens. "
            "Pass `labels != -100`."
        )
