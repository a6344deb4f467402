"""From logits to logprobs and entropy, and the causal shift, which lives here and nowhere else.

Shape letters: B rollouts, T tokens, V vocabulary, H hidden size, N trained tokens of a micro-batch.

Labels, advantages and inference logprobs are aligned with the token they describe (label position). The logits that
predict token t stand at position t - 1 (prediction position). `next_token_targets` and `align_with_targets` move
per-token data to prediction positions; from then on, selecting by `targets != -100` yields N entries that all belong
together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .types import IGNORE_INDEX


def next_token_targets(labels: Tensor) -> Tensor:
    """Moves labels to the position that predicts them.

    Args:
        labels (`torch.Tensor` of shape `(B, T)`, int64):
            Token id where the token is trained, -100 elsewhere.

    Returns:
        `torch.Tensor` of shape `(B, T)`, int64: entry t is `labels[:, t + 1]`; the last column, which predicts
        nothing, is -100. The label of token 0, which nothing predicts, is gone.
    """
    return _shift_left(labels, IGNORE_INDEX)


def align_with_targets(values: Tensor) -> Tensor:
    """Moves per-token values to the position that predicts their token, as [`next_token_targets`] does with labels.

    Args:
        values (`torch.Tensor` of shape `(B, T)`, any dtype):
            Entry t belongs to token t: advantages, inference logprobs, temperatures.

    Returns:
        `torch.Tensor` of shape `(B, T)`, same dtype: entry t is `values[:, t + 1]`; the last column is 0.
    """
    return _shift_left(values, 0)


def token_logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0, chunk_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    """Logprobs of the targets under `softmax(logits / temperature)`, with gradient, and its entropy, without.

    Works through `chunk_tokens` rows at a time, forward and backward: no float32 tensor of N x V is ever made, and
    nothing of that size is kept for the backward but the logits themselves.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`, floating):
            At the prediction positions of the targets. Half precision is computed with in float32.
        targets (`torch.Tensor` of shape `(N,)`, int64):
            Token ids, 0 to V - 1.
        temperature (`torch.Tensor` of shape `(N,)` or `float`, *optional*, defaults to `1.0`):
            Sampling temperature of each token; greater than 0.
        chunk_tokens (`int`, *optional*, defaults to `1024`):
            Rows per chunk; at least 1. Bounds the float32 temporaries to a few times `chunk_tokens` x V.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(N,)` and `(N,)`, float32 (float64 for float64 logits): the
        logprobs in nats, and the entropies in nats, detached. For N = 0 both are empty, and the logprobs are still
        connected to `logits`.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, or `chunk_tokens` below 1.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, targets has shape {tuple(targets.shape)}, expected (N, V) and "
            "(N,). Each target needs the logits that predict it. Select both with the same mask."
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}. Zero rows at a time never end. Set it to 1 or more.")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    temperatures = torch.as_tensor(temperature, dtype=dtype, device=logits.device)
    if temperatures.dim() == 0:
        temperatures = temperatures.expand(targets.shape)
    if temperatures.shape != targets.shape:
        raise ValueError(
            f"temperature has shape {tuple(temperatures.shape)}, targets has shape {tuple(targets.shape)}. Each token "
            "is scored at the temperature it was sampled with. Pass one number, or one per target."
        )
    is_positive = (temperatures > 0) & temperatures.isfinite()
    if not is_positive.all():
        raise ValueError(
            f"The sampling temperature of a token is {temperatures[~is_positive][0].item()}. Under greedy sampling "
            "(temperature 0) a token has no logprob. Set `--temperature` to that of the environment, above 0."
        )
    logprobs, entropy = _ChunkedLogSoftmax.apply(logits, targets, temperatures, chunk_tokens)
    return logprobs, entropy


@contextmanager
def select_positions_before(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside this context, the output head of a causal language model sees the selected positions only.

    The logits are by far the largest tensor of a forward pass, and those of the prompt are never used. With
    `positions` selected before the head, `model(...).logits` has shape `(1, N, V)`, in row-major order of
    `positions`: the order of `values[positions]`. Any model works whose forward calls its head with the hidden
    states of all tokens; the hidden states before the head are those of a plain forward.

    ```python
    targets = next_token_targets(labels)
    is_trained = targets != -100
    with select_positions_before(model.get_output_embeddings(), is_trained):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[0]
    logprobs, entropy = token_logprobs_and_entropy(logits, targets[is_trained])
    ```

    Args:
        head (`torch.nn.Module`):
            The output head, such as `model.get_output_embeddings()`; with PEFT, its wrapper.
        positions (`torch.Tensor` of shape `(B, T)`, bool):
            Prediction positions to keep. None at all is fine: the logits are then empty, connected to every
            parameter, and a backward gives zero gradients.

    Raises:
        RuntimeError: the head received something else than hidden states of shape `(B, T, H)`, or was not called.
    """
    num_calls = 0

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal num_calls
        num_calls += 1
        hidden_states = args[0] if args else None
        shape = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else None
        if not isinstance(hidden_states, Tensor) or hidden_states.shape[:-1] != positions.shape:
            raise RuntimeError(
                f"The output head {type(module).__name__} received an input of shape {shape}, expected the hidden "
                f"states of all positions, {(*positions.shape, 'H')}. The model selects positions itself "
                "(`logits_to_keep`, a padding-free or prefix layout), or calls its head by keyword. Call its forward "
                "without `logits_to_keep` and with the `input_ids` that `positions` was made from."
            )
        return (hidden_states[positions.to(hidden_states.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
    if num_calls == 0:
        raise RuntimeError(
            f"The model's forward did not call the output head {type(head).__name__}. A fused kernel that reads the "
            "head's weight does that, and so does a head that belongs to another model. Pass "
            "`model.get_output_embeddings()` of the model that runs, and turn `--use_liger_kernel` off."
        )


class _ChunkedLogSoftmax(torch.autograd.Function):
    """Gathered log-softmax and entropy. The backward recomputes each chunk's softmax from the saved logits.

    A custom function instead of one checkpoint per chunk: the gradients of the chunks go straight into one buffer of
    the dtype of the logits, where autograd would add up N / chunk_tokens padded ones.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperatures: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, row_max, log_normalizer = (torch.empty_like(temperatures) for _ in range(4))
        for rows in _chunks(targets.numel(), chunk_tokens):
            row_max[rows] = logits[rows].amax(dim=-1).to(temperatures.dtype)
            shifted = _shift_and_scale(logits[rows], row_max[rows], temperatures[rows])
            log_normalizer[rows] = shifted.exp().sum(dim=-1).log()
            log_softmax = shifted.sub_(log_normalizer[rows, None])
            logprobs[rows] = log_softmax.gather(-1, targets[rows, None]).squeeze(-1)
            # entr(0) is 0, where p * log p is NaN for a token whose logit is -inf.
            entropy[rows] = torch.special.entr(log_softmax.exp_()).sum(dim=-1)
        ctx.save_for_backward(logits, targets, temperatures, row_max, log_normalizer)
        ctx.chunk_tokens = chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, temperatures, row_max, log_normalizer = ctx.saved_tensors
        grad_scaled = grad_logprobs / temperatures
        grad_logits = torch.empty_like(logits)
        for rows in _chunks(targets.numel(), ctx.chunk_tokens):
            shifted = _shift_and_scale(logits[rows], row_max[rows], temperatures[rows])
            softmax = shifted.sub_(log_normalizer[rows, None]).exp_()
            # d logprob / d scaled = onehot(target) - softmax
            grad = softmax.mul_(-grad_scaled[rows, None])
            grad.scatter_add_(-1, targets[rows, None], grad_scaled[rows, None])
            grad_logits[rows] = grad
        return grad_logits, None, None, None


def _shift_and_scale(logits: Tensor, row_max: Tensor, temperatures: Tensor) -> Tensor:
    # The maximum goes before the division: what is rounded then is the distance to it, and a logprob near 0 keeps its
    # digits however large the logits are.
    return (logits.to(temperatures.dtype) - row_max[:, None]).div_(temperatures[:, None])


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, start + chunk_rows)


def _shift_left(values: Tensor, fill: float) -> Tensor:
    shifted = torch.full_like(values, fill)
    shifted[:, :-1] = values[:, 1:]
    return shifted
