"""The advantage-weighted cross entropy of a batch of tensors, for those who bring their own.

Shape letters: B rows, T tokens, V vocabulary, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..policy.logprobs import (
    align_with_targets,
    next_token_targets,
    select_positions_before,
    token_logprobs_and_entropy,
)
from ..types import IGNORE_INDEX
from .advantages import clip_advantages, normalize_advantages
from .options import StepOptions


def advantage_weighted_sft_loss(
    logits: Tensor,
    input_ids: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    num_trained_tokens: int | None = None,
) -> Tensor:
    """Advantage-weighted cross entropy: the sum of `-A * logprob` over the trained tokens, divided by their number.

    With all advantages 1 it is the loss of supervised finetuning. It has no lower bound where A < 0: it keeps pushing
    the probability of such a token towards 0. Its gradient is that of [PPO](https://huggingface.co/papers/1707.06347)
    at importance ratio 1, so on policy the two train alike; off policy, use a clipped loss.

    Args:
        logits (`torch.Tensor` of shape `(B, T, V)`, floating):
            Entry t predicts token t + 1, as a causal language model returns them.
        input_ids (`torch.Tensor` of shape `(B, T)`, int64):
            Token ids.
        advantages (`torch.Tensor` of shape `(B, T)`, `(B, 1)` or `(B,)`, floating):
            Entry t belongs to token t. Finite where trained; anything, also NaN, elsewhere.
        loss_mask (`torch.Tensor` of shape `(B, T)`, bool, int or float):
            1 where token t is trained, 0 elsewhere. Token 0, which nothing predicts, never counts.
        num_trained_tokens (`int`, *optional*):
            The denominator. The trained tokens of `loss_mask` if not given; of the whole optimizer step if this is one
            of several micro-batches.

    Returns:
        `torch.Tensor` of shape `()`: 0 with a graph if no token is trained.

    Raises:
        ValueError: shapes that do not fit, a mask with other values than 0 and 1, or an advantage that is not finite at
            a trained position.
    """
    if logits.dim() != 3 or input_ids.shape != logits.shape[:2]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, input_ids has shape {tuple(input_ids.shape)}, expected (B, T, V) and "
            "(B, T). Each token needs the logits that predict it. Pass the logits of exactly these tokens."
        )
    positions, targets, trained_advantages = select_trained(input_ids, advantages, loss_mask)
    logprobs, _ = token_logprobs_and_entropy(logits.flatten(0, 1)[positions], targets)
    return weighted_cross_entropy(logprobs, trained_advantages, num_trained_tokens)


def select_trained(input_ids: Tensor, advantages: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Selects what [`advantage_weighted_sft_loss`] needs of each trained token, with its checks.

    Returns (N,) each: prediction positions counted over all rows, targets, and advantages.
    """
    if input_ids.dim() != 2 or loss_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, loss_mask has shape {tuple(loss_mask.shape)}, expected (B, T) "
            "for both. Each token is trained or not. Pass one mask entry per token."
        )
    is_trained = loss_mask.bool()
    if not (loss_mask == is_trained).all():
        raise ValueError(
            "loss_mask has values other than 0 and 1. It says whether a token is trained; what it weighs is its "
            "advantage. Pass a boolean mask, and multiply the advantages."
        )
    targets = next_token_targets(input_ids.masked_fill(~is_trained, IGNORE_INDEX))
    positions = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(-1)
    trained_advantages = align_with_targets(expand_advantages(advantages, input_ids.shape)).flatten()[positions]
    is_finite = trained_advantages.isfinite()
    if not is_finite.all():
        raise ValueError(
            f"{int((~is_finite).sum())} of {is_finite.numel()} trained advantages are not finite. One of them makes every "
            "weight NaN. Drop the rollout, or take its tokens out of loss_mask."
        )
    return positions, targets.flatten()[positions], trained_advantages


def weighted_cross_entropy(logprobs: Tensor, advantages: Tensor, num_trained_tokens: int | None = None) -> Tensor:
    """`-sum(A * logprob) / num_trained_tokens` for (N,) tensors; N is the denominator if none is given."""
    denominator = logprobs.numel() if num_trained_tokens is None else num_trained_tokens
    return -(advantages * logprobs).sum() / max(denominator, 1)


def expand_advantages(advantages: Tensor, shape: torch.Size) -> Tensor:
    """Gives every token the advantage of its rollout.

    Advantages of shape (B, T), (B, 1) or (B,) become `shape`, which is (B, T), in float32.

    Raises:
        ValueError: any other shape.
    """
    if advantages.shape == shape[:1]:
        advantages = advantages[:, None]
    if advantages.shape not in (shape, (shape[0], 1)):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}, expected {tuple(shape)}, {(shape[0], 1)} or "
            f"{(shape[0],)}. Other shapes would weigh tokens with the advantages of others. Give one per token, or one "
            "per rollout."
        )
    return advantages.to(torch.float32).expand(shape)


def weighted_sft_loss_of_model(
    model: nn.Module,
    head: nn.Module,
    inputs: Mapping[str, Tensor],
    advantages: Tensor,
    loss_mask: Tensor,
    options: StepOptions,
    *,
    temperature: float,
) -> Tensor:
    """[`advantage_weighted_sft_loss`] of a model, with logits at trained positions only.

    `model` is called with `inputs`: `input_ids` of shape `(B, T)` and what else it takes; `head` is its output embeddings. The
    advantages are normalised and clipped as `options` say; logits are divided by `temperature`, above 0.
    """
    positions, targets, trained_advantages = select_trained(inputs["input_ids"], advantages, loss_mask)
    is_trained = torch.ones_like(targets, dtype=torch.bool)
    normalized = normalize_advantages(trained_advantages, is_trained, options.advantage_normalization)
    with select_positions_before(head, positions):
        logits = model(**inputs, use_cache=False).logits.squeeze(0)
    logprobs, _ = token_logprobs_and_entropy(logits, targets, temperature)
    return weighted_cross_entropy(logprobs, clip_advantages(normalized, options.advantage_clipping))
