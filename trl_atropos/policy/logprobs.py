"""From hidden states to logprobs and entropy, and the causal shift, which lives here and nowhere else.

Shape letters: B rollouts, T tokens, V vocabulary, H hidden size, N scored tokens of a micro-batch, K teacher tokens.

Labels, advantages and inference logprobs are aligned with the token they describe (label position). The logits that
predict token t stand at position t - 1 (prediction position). `next_token_targets` and `align_with_targets` move
per-token data to prediction positions; from then on, selecting by `targets != -100` yields N entries that all belong
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..types import IGNORE_INDEX
from .log_softmax import check_temperature, chunks, log_softmax_at


MAX_LOGITS = {"cpu": 2**26, "cuda": 2**28}
"""Logits held for the backward pass at a time, by device: 256 MiB in float32, 512 MiB in bfloat16. More are computed
again there instead; each piece reads the head's weight once more, so that larger pieces are faster."""


@dataclass(frozen=True)
class TokenScores:
    """What a forward pass says of N tokens, with gradient.

    `logprobs` (N,) and `entropy` (N,), float32 in nats, are those of the distribution at the sampling temperature.
    `teacher_token_logprobs` (N, K), float32 in nats, are the student's at temperature 1, for the tokens that a teacher
    scored; None without a teacher.
    """

    logprobs: Tensor
    entropy: Tensor
    teacher_token_logprobs: Tensor | None = None


def next_token_targets(labels: Tensor) -> Tensor:
    """Moves labels (..., T), -100 where a token is not trained, to the position that predicts them.

    Entry t becomes `labels[..., t + 1]`. The last position predicts nothing and gets -100; the label of token 0, which
    nothing predicts, is gone.
    """
    return _shift_left(labels, IGNORE_INDEX)


def align_with_targets(values: Tensor) -> Tensor:
    """Moves values (..., T) of tokens to the position that predicts their token.

    As with labels in [`next_token_targets`], entry t becomes `values[..., t + 1]`; the last entry is 0.
    """
    return _shift_left(values, 0)


def score_hidden_states(
    project: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    targets: Tensor,
    temperature: Tensor | float = 1.0,
    *,
    vocab_size: int,
    teacher_token_ids: Tensor | None = None,
    max_logits: int | None = None,
) -> TokenScores:
    """Scores tokens from the hidden states that predict them, without ever holding more than `max_logits` logits.

    Up to `max_logits`, `MAX_LOGITS` of the device if not given, the logits are kept for the backward pass. Beyond, the tokens are worked through in pieces of
    one row or more, and the backward pass projects each piece again: memory no longer grows with N, at the price of
    one more projection.

    `project` maps (n, H) to logits (n, V), row by row: the output head with whatever the model does to its logits.
    `hidden_states` (N, H) are those at the prediction positions of the `targets` (N,) int64, ids from 0 to V - 1.
    `temperature` is that of sampling, above 0, one or (N,). `teacher_token_ids` (N, K) int64 are further tokens to
    score at the same positions, at temperature 1.

    The scores are connected to `hidden_states` also for N = 0.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    num_tokens = hidden_states.shape[:1]
    _check_targets("hidden_states", hidden_states, targets)
    for name, values in (("temperature", temperature), ("teacher_token_ids", teacher_token_ids)):
        if isinstance(values, Tensor) and values.dim() and values.shape[:1] != num_tokens:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}, targets has shape {tuple(targets.shape)}. Each token is scored "
                "with its own. Select both with the same index."
            )

    # Here once, and not in each piece: it waits for the device.
    check_temperature(temperature)
    device_type = hidden_states.device.type
    max_logits = MAX_LOGITS.get(device_type, MAX_LOGITS["cuda"]) if max_logits is None else max_logits

    def score(hidden: Tensor, targets: Tensor, temperature: Tensor | float, ids: Tensor | None) -> tuple[Any, ...]:
        # The pieces must not share autocast's half precision copy of the head's weight: the gradients of the pieces would
        # be added up in half precision.
        with torch.autocast(device_type, enabled=torch.is_autocast_enabled(device_type), cache_enabled=False):
            logits = project(hidden)
        logprobs, entropy = log_softmax_at(logits, targets[:, None], temperature)
        scores = logprobs.squeeze(-1), entropy
        return scores if ids is None else (*scores, log_softmax_at(logits, ids, 1.0)[0])

    rows = max(max_logits // vocab_size, 1)
    if targets.numel() <= rows:
        return TokenScores(*score(hidden_states, targets, temperature, teacher_token_ids))
    pieces = []
    for piece in chunks(targets.numel(), rows):
        pieces.append(
            checkpoint(
                score,
                hidden_states[piece],
                targets[piece],
                temperature[piece] if isinstance(temperature, Tensor) and temperature.dim() else temperature,
                None if teacher_token_ids is None else teacher_token_ids[piece],
                use_reentrant=False,
                # Nothing random happens between hidden states and logprobs.
                preserve_rng_state=False,
            )
        )
    return TokenScores(*(torch.cat(columns) for columns in zip(*pieces, strict=True)))


def token_logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logprobs of the targets under `softmax(logits / temperature)`, and its entropy, both with gradient.

    No float32 tensor of N x V is ever made, and nothing of that size is kept for the backward but the logits themselves.

    `logits` (N, V) are those at the prediction positions of the `targets` (N,) int64, ids from 0 to V - 1.
    `temperature` is that of sampling, above 0, one or (N,).

    Returns (N,) each, in nats, float32, or float64 for float64 logits: half precision is computed with in float32. For
    N = 0 both are empty, and still connected to `logits`.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    _check_targets("logits", logits, targets)
    check_temperature(temperature)
    logprobs, entropy = log_softmax_at(logits, targets[:, None], temperature)
    return logprobs.squeeze(-1), entropy


def _check_targets(name: str, rows: Tensor, targets: Tensor) -> None:
    if rows.dim() != 2 or targets.shape != rows.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}, targets has shape {tuple(targets.shape)}, expected two dimensions and "
            "one, of the same length. Each target needs the position that predicts it. Select both with the same mask."
        )


@dataclass
class CapturedHiddenStates:
    """What [`capture_hidden_states`] saw: the hidden states (B, T, H) that the model gave to its head, None until it
    ran.
    """

    value: Tensor | None = field(default=None)


@contextmanager
def capture_hidden_states(head: nn.Module) -> Iterator[CapturedHiddenStates]:
    """Inside this context, the output head of a causal language model is given no position, and its input is kept.

    `model(...).logits` has shape (B, 0, V): its sum is 0 and ties the model's own output to a loss that is made of the
    hidden states, which is what the hooks of DDP and FSDP wait for. `head` is what `model.get_output_embeddings()`
    returns; with PEFT, its wrapper.

    Raises:
        RuntimeError: the head was not called, or not with hidden states of shape (B, T, H).
    """
    captured = CapturedHiddenStates()

    def take(hidden_states: Tensor) -> Tensor:
        captured.value = hidden_states
        return hidden_states[:, :0]

    with _replace_input_of(head, take):
        yield captured


@contextmanager
def select_positions_before(head: nn.Module, index: Tensor) -> Iterator[None]:
    """Inside this context, the output head of a causal language model sees the positions `index` (N,) int64 only.

    They are counted over all rows, from 0 to B T - 1, and `model(...).logits` has shape (1, N, V). No position at all
    is fine: the logits are then empty, connected to every parameter, and a backward gives zero gradients. `head` is
    what `model.get_output_embeddings()` returns; with PEFT, its wrapper.

    The way for models that change their logits in an unknown way.

    Raises:
        RuntimeError: the head was not called, or not with hidden states of shape (B, T, H).
    """
    with _replace_input_of(head, lambda hidden_states: hidden_states.flatten(0, 1)[index].unsqueeze(0)):
        yield


@contextmanager
def score_inside(head: nn.Module, score: Callable[[Callable[[Tensor], Tensor], Tensor], None]) -> Iterator[None]:
    """Inside this context, the output head of a causal language model calls `score` in the place of making logits.

    `score` gets what the head would have done to hidden states (n, H), and the hidden states (B T, H) of all positions.
    It may keep of them what it likes, with gradient. `model(...).logits` has shape (B, 0, V): its sum is 0 and ties the
    model's own output to a loss of what `score` kept.

    The way for heads whose weight is in pieces outside of the model's forward (ZeRO-3, FSDP2): inside, it is whole, and
    in the backward pass it is whole again from the gradient of the model's output on, so that logits may be made again
    there. That gradient comes first, because autograd takes what was computed last.

    `head` is what `model.get_output_embeddings()` returns; with PEFT, its wrapper.

    Raises:
        RuntimeError: the head was not called, or not with hidden states of shape (B, T, H).
    """
    had_own, project = "forward" in vars(head), head.forward

    def forward(hidden_states: Tensor) -> Tensor:
        score(project, hidden_states.flatten(0, 1))
        empty: Tensor = project(hidden_states[:, :0])
        return empty

    with _replace_input_of(head, lambda hidden_states: hidden_states):
        head.forward = forward
        try:
            yield
        finally:
            if had_own:
                head.forward = project
            else:
                del head.forward


@contextmanager
def _replace_input_of(head: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    num_calls = 0

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal num_calls
        num_calls += 1
        hidden_states = args[0] if args else None
        if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3:
            shape = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else None
            raise RuntimeError(
                f"The output head {type(module).__name__} received an input of shape {shape}, expected the hidden "
                "states of all positions, (B, T, H). The model selects positions itself, or calls its head by keyword. "
                "Call its forward without `logits_to_keep`."
            )
        return (replace(hidden_states), *args[1:])

    handle = head.register_forward_pre_hook(hook)
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


def _shift_left(values: Tensor, fill: float) -> Tensor:
    shifted = torch.full_like(values, fill)
    shifted[..., :-1] = values[..., 1:]
    return shifted


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode that it had before."""
    with keeping_modes(model):
        model.eval()
        yield


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the mode (training or eval) that it had before."""
    were_training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, was_training in were_training.items():
            module.training = was_training
