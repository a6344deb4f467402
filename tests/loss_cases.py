"""Inputs of the losses for the unit tests, made from ratios and rollout lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl_atropos.loss.losses import LossInputs
from trl_atropos.loss.options import LossOptions


INFERENCE_LOGPROB = -2.0


def options_of(loss_type: str, **others: Any) -> LossOptions:
    """With a cap for cispo, which has no default."""
    return LossOptions(loss_type=loss_type, **({"epsilon_high": 5.0} if loss_type == "cispo" else {}), **others)


def loss_inputs(
    trainer_logprobs: Sequence[float] | Tensor,
    advantages: Sequence[float] | Tensor,
    inference_logprobs: Sequence[float] | Tensor | None = None,
    *,
    lengths: Sequence[int] | None = None,
    **others: Sequence[float] | Tensor,
) -> LossInputs:
    """In float64, so that closed forms hold to its digits. `lengths`: tokens of each rollout; by default one has all."""
    num_tokens = len(trainer_logprobs)
    lengths = [num_tokens] if lengths is None else lengths
    columns = {
        "trainer_logprobs": trainer_logprobs,
        "advantages": advantages,
        "inference_logprobs": inference_logprobs,
        "entropy": [0.0] * num_tokens,
        **others,
    }
    tensors = {
        name: torch.as_tensor(values, dtype=torch.float64) for name, values in columns.items() if values is not None
    }
    tensors["trainer_logprobs"] = tensors["trainer_logprobs"].clone().requires_grad_()
    rollout_index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return LossInputs(**tensors, rollout_index=rollout_index, num_rollouts=len(lengths))


def at_ratios(ratios: Sequence[float], advantages: Sequence[float], **others: Any) -> LossInputs:
    """Tokens with these ratios of current policy / policy that sampled."""
    return loss_inputs(
        [INFERENCE_LOGPROB + math.log(ratio) for ratio in ratios],
        advantages,
        [INFERENCE_LOGPROB] * len(ratios),
        **others,
    )
