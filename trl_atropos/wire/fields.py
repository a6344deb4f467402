"""Values of the wire -> tensors, and what is said about a value that cannot be one.

Shape letters: T tokens of one rollout, E entries of one list.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import AtroposProtocolError


MAX_POSITIVE_LOGPROB = 1e-3
"""Largest value above 0 that passes as a rounding error of a logprob; it is clamped to 0."""

SCORED_DATA_FIX = "In the env, look at how the `ScoredDataGroup` is filled in `collect_trajectories`."
_MASK_WHY = "Atropos' masks carry token ids: -100 where a token is not trained, the token's own id where it is."
_MASK_FIX = "In the env, send ManagedServer's `masked_tokens`, or `[t if trained else -100 for t in tokens]`."
_LOGPROB_FIX = "In the env, build rollouts with ManagedServer, or leave `{name}` out of the group."
_TEACHER_FIX = (
    "In the env, send what `get_logprobs` returns for a teacher with the model's own tokenizer, or set "
    "`--distillation_coef 0`."
)

# name of a field -> why its shape and its values matter, how to mend them
_HELP = {
    "tokens": ("`tokens` holds one list of token ids per rollout, prompt and completion, unpadded.", SCORED_DATA_FIX),
    "masks": (_MASK_WHY, _MASK_FIX),
    "scores": ("Every rollout needs one finite score: one bad number spoils its whole group.", SCORED_DATA_FIX),
    "advantages": (
        "Token-level advantages need one number per token, for every rollout of the group or for none.",
        "In the env, send a list as long as `tokens` for each rollout, or leave `advantages` out of the group.",
    ),
    "inference_logprobs": (
        "The importance ratio needs one logprob per token, at most 0.",
        _LOGPROB_FIX.format(name="inference_logprobs"),
    ),
    "ref_logprobs": ("The KL term needs one logprob per token, at most 0.", _LOGPROB_FIX.format(name="ref_logprobs")),
    "distill_token_ids": (
        "Distillation needs one list per token: ids from the model's vocabulary, each once, or `[]` for no teacher.",
        _TEACHER_FIX,
    ),
    "distill_logprobs": (
        "Distillation needs one logprob per id, at most 0; the probabilities of one position sum to 1 at most.",
        _TEACHER_FIX,
    ),
}


class GroupRefused(AtroposProtocolError):
    """A group that cannot be trained. `reason` says why in one word, for counting; mostly it is the name of the field."""

    def __init__(self, what: str, why: str, fix: str, reason: str = "invalid"):
        super().__init__(what, why, fix)
        self.reason = reason


def integers(values: object, name: str, where: str, widths: Sequence[int] | None = None) -> torch.Tensor:
    """The list `values` of the field `name` as an int64 tensor (E,).

    `where` is how messages name group and rollout. If `values` is a list of lists made flat, `widths` are their
    lengths.

    Raises:
        AtroposProtocolError: not a list, or a value that is not an integer of 64 bits.
    """
    return _tensor(values, {int}, "q", torch.int64, "an integer", name, where, widths)


def numbers(values: object, name: str, where: str, widths: Sequence[int] | None = None) -> torch.Tensor:
    """A list of numbers as a float64 tensor (E,); arguments and errors are those of [`integers`]."""
    return _tensor(values, {int, float}, "d", torch.float64, "a number", name, where, widths)


def _tensor(
    values: object,
    types: set[type],
    typecode: str,
    dtype: torch.dtype,
    expected: str,
    name: str,
    where: str,
    widths: Sequence[int] | None,
) -> torch.Tensor:
    """`typecode` is that of `array.array`, which is three times as fast as `torch.tensor`."""
    if not isinstance(values, list):
        raise bad_field(name, f"{where}: `{name}` is {show(values)}, not a list.")
    # Exact types, because both constructors take True for 1 in silence.
    if not set(map(type, values)) <= types:
        index = next(i for i, value in enumerate(values) if type(value) not in types)
        found = f"`{name}` has {show(values[index])} at position {_place(index, widths)}"
        raise bad_field(name, f"{where}: {found}, not {expected}.")
    try:
        return torch.frombuffer(array(typecode, values), dtype=dtype)
    except OverflowError as exc:
        index = max(range(len(values)), key=lambda i: abs(values[i]) if type(values[i]) is int else 0)
        found = f"`{name}` has {show(values[index])} at position {_place(index, widths)}"
        raise bad_field(name, f"{where}: {found}.") from exc


def are_logprobs(values: torch.Tensor) -> torch.Tensor:
    """True where a value can be the logarithm of a probability, but for a rounding error."""
    return values.isfinite() & (values <= MAX_POSITIVE_LOGPROB)


def refuse_trained(bad: torch.Tensor, values: Any, name: str, where: str, widths: Sequence[int] | None = None) -> None:
    """Raises with the first of the E values at which `bad`, bool of shape (E,) and False at untrained tokens, is True."""
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        found = f"`{name}` has {show(values[index])} at the trained position {_place(index, widths)}"
        raise bad_field(name, f"{where}: {found}.")


def _place(index: int, widths: Sequence[int] | None) -> str:
    if widths is None:
        return str(index)
    position = 0
    while index >= widths[position]:
        index -= widths[position]
        position += 1
    return f"{position}, entry {index}"


def show(value: object) -> str:
    """A value as the wire wrote it, short enough for a message."""
    if isinstance(value, list):
        return f"a list of {len(value)} entries"
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, int, float)):
        text = json.dumps(value)
        return text if len(text) <= 60 else f"{text[:60]}..."
    return f"a {type(value).__name__}"


def bad_field(name: str, what: str) -> GroupRefused:
    """The error about a field with one entry per rollout; its name is the reason."""
    return GroupRefused(what, *_HELP[name], reason=name)


def bad_group(reason: str, what: str, why: str, fix: str = SCORED_DATA_FIX) -> GroupRefused:
    """The error about anything else in a group."""
    return GroupRefused(what, why, fix, reason=reason)
