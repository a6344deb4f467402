"""Gathered log-softmax and entropy of many logits, with gradient, without a float32 tensor of N x V.

On a CPU a few rows are worked on at a time, in place. On a GPU that would be thousands of launches: there torch.compile
makes one pass over the logits forward and one backward, in which nothing of N x V is written but the gradient.

Shape letters: N scored tokens, V vocabulary, K tokens looked up at each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


MAX_TEMPORARY_LOGITS = {"cpu": 2**22, "cuda": 2**26}
"""Logits that are worked on at a time where nothing is compiled, by device: 16 and 256 MiB for each float32 temporary."""


def log_softmax_at(logits: Tensor, token_ids: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """Logprobs (N, K) of `token_ids` (N, K) int64, and entropies (N,), in nats, under `softmax(logits / temperature)`.

    `logits` (N, V) are any floating dtype, and computed with in float32 or float64. `temperature` is above 0, one or
    (N,).

    Raises:
        ValueError: temperatures of another shape, or not positive.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    temperatures = torch.as_tensor(temperature, dtype=dtype, device=logits.device)
    if temperatures.dim() == 0:
        temperatures = temperatures.expand(logits.shape[:1])
    if temperatures.shape != logits.shape[:1]:
        raise ValueError(
            f"temperature has shape {tuple(temperatures.shape)}, targets has shape {tuple(logits.shape[:1])}. Each "
            "token is scored at the temperature it was sampled with. Pass one number, or one per target."
        )
    # torch declares no types for `Function.apply`.
    apply: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = _LogSoftmaxAt.apply
    return apply(logits, token_ids, temperatures)


def check_temperature(temperature: Tensor | float) -> None:
    """Refuse a sampling temperature that is not positive and finite. Waits for the device that holds it.

    Raises:
        ValueError: names the first such temperature.
    """
    temperatures = torch.as_tensor(temperature)
    is_positive = (temperatures > 0) & temperatures.isfinite()
    if not is_positive.all():
        raise ValueError(
            f"The sampling temperature of a token is {temperatures[~is_positive].flatten()[0].item()}. Under greedy "
            "sampling (temperature 0) a token has no logprob. Set `--temperature` to that of the environment, above 0."
        )


def chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    """Slices of at most `chunk_rows` rows, in order, that cover `num_rows` rows."""
    for start in range(0, num_rows, chunk_rows):
        yield slice(start, start + chunk_rows)


@cache
def why_not_compiled(device_type: str) -> str | None:
    """Why the passes over the logits are not compiled on a kind of device; None if they are.

    On a GPU a small function is compiled, once in the life of the process: that needs Triton and a C compiler.
    """
    if device_type != "cuda":
        return f"{device_type} works on a few rows at a time"
    try:
        torch.compile(lambda rows: rows.exp().sum(dim=-1), dynamic=True)(torch.zeros(3, 5, device=device_type))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError, OSError) as exc:
        return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0] if str(exc).strip() else 'no reason given'}"
    return None


class _LogSoftmaxAt(torch.autograd.Function):
    """The backward makes the softmax again from the saved logits.

    A custom function instead of one checkpoint per chunk: the gradients of the chunks go straight into one buffer of
    the dtype of the logits, where autograd would add up one padded one per chunk.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        if _compiles(logits):
            scored = _compiled(_score_rows)(logits, token_ids, temperatures)
        else:
            pieces = [
                _score_rows(logits[rows], token_ids[rows], temperatures[rows]) for rows in _few_rows_at_a_time(logits)
            ]
            scored = tuple(torch.cat(columns) for columns in zip(*pieces, strict=True))
        logprobs, row_max, log_normalizer, entropy = scored
        ctx.save_for_backward(logits, token_ids, temperatures, row_max, log_normalizer, entropy)
        # An entropy that no loss uses costs nothing in the backward.
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        logits, token_ids, temperatures, row_max, log_normalizer, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = temperatures.new_zeros(token_ids.shape)
        grad_scaled = grad_logprobs / temperatures[:, None]
        grad_entropy = None if grad_entropy is None else grad_entropy / temperatures
        columns = (logits, token_ids, temperatures, row_max, log_normalizer, entropy, grad_scaled, grad_entropy)
        # Compiled, each token that was looked up is compared with the whole vocabulary.
        if _compiles(logits) and token_ids.shape[1] == 1:
            return _compiled(_grad_rows)(*columns), None, None
        grad_rows: Callable[..., Tensor] = _grad_rows
        grad_logits = torch.empty_like(logits)
        for rows in _few_rows_at_a_time(logits):
            grad_logits[rows] = grad_rows(*(None if column is None else column[rows] for column in columns))
        return grad_logits, None, None


def _score_rows(logits: Tensor, token_ids: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprobs (n, K); maximum, log normaliser and entropy (n,) of some rows, as `_LogSoftmaxAt` keeps them."""
    row_max = logits.amax(dim=-1).to(temperatures.dtype)
    shifted = _shift_and_scale(logits, row_max, temperatures)
    log_normalizer = shifted.exp().sum(dim=-1).log()
    # Looked up in the logits: a lookup in `shifted` would have a compiler write all of it.
    chosen = _shift_and_scale(logits.gather(-1, token_ids), row_max, temperatures)
    # entr(0) is 0, where p * log p is NaN for a token whose logit is -inf.
    entropy = torch.special.entr(shifted.sub_(log_normalizer[:, None]).exp_()).sum(dim=-1)
    return chosen - log_normalizer[:, None], row_max, log_normalizer, entropy


def _grad_rows(
    logits: Tensor,
    token_ids: Tensor,
    temperatures: Tensor,
    row_max: Tensor,
    log_normalizer: Tensor,
    entropy: Tensor,
    grad_scaled: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient (n, V) of some rows of logits, in their dtype.

    `grad_scaled` (n, K) and `grad_entropy` (n,) are the gradients of logprobs and entropy over the temperature; the
    rest is what `_score_rows` took and gave. Compiled, K is 1.
    """
    total_grad = grad_scaled.sum(dim=-1)
    log_softmax = _shift_and_scale(logits, row_max, temperatures).sub_(log_normalizer[:, None])
    if grad_entropy is None:
        # d logprob / d scaled = onehot(token) - softmax
        grad = log_softmax.exp_().mul_(-total_grad[:, None])
    else:
        softmax = log_softmax.exp()
        # d entropy / d scaled = -softmax * (log softmax + entropy), 0 where the softmax is 0
        surprise = (log_softmax + entropy[:, None]).masked_fill_(softmax == 0, 0.0)
        grad = softmax.mul_(-(surprise.mul_(grad_entropy[:, None]).add_(total_grad[:, None])))
    if torch.compiler.is_compiling():
        # For `scatter_add_` a compiler would write all of the rows in float32.
        vocabulary = torch.arange(logits.shape[1], device=logits.device)
        grad = grad + torch.where(vocabulary == token_ids, grad_scaled, 0.0)
    else:
        grad.scatter_add_(-1, token_ids, grad_scaled)
    return grad.to(logits.dtype)


def _shift_and_scale(logits: Tensor, row_max: Tensor, temperatures: Tensor) -> Tensor:
    # The maximum goes before the division: what is rounded then is the distance to it, and a logprob near 0 keeps its
    # digits however large the logits are.
    return (logits.to(temperatures.dtype) - row_max[:, None]).div_(temperatures[:, None])


def _compiles(logits: Tensor) -> bool:
    return logits.numel() > 0 and why_not_compiled(logits.device.type) is None


def _few_rows_at_a_time(logits: Tensor) -> Iterator[slice]:
    most = MAX_TEMPORARY_LOGITS.get(logits.device.type, MAX_TEMPORARY_LOGITS["cuda"])
    # At least one piece, which may be empty.
    return chunks(max(logits.shape[0], 1), max(most // max(logits.shape[1], 1), 1))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
