"""A teacher's likeliest tokens on the wire -> padded tensors for distillation.

Shape letters: T tokens of one rollout, K the most tokens that the teacher names for one of them, E tokens that it names
in all.

`distill_token_ids` and `distill_logprobs` hold one list per token of the rollout, ragged: list t is the teacher's
distribution in place of token t, given tokens 0..t-1. The list is empty where there is none, as before token 0.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch

from ..types import NO_TOKEN
from .fields import are_logprobs, bad_field, integers, numbers, refuse_trained, show


TEACHER_FIELDS = ("distill_token_ids", "distill_logprobs")

MAX_TEACHER_PROBABILITY = 1 + 1e-3
"""Largest sum of the probabilities of one position that passes as 1 with rounding errors."""


def parse_teacher(
    token_ids: object, logprobs: object, trained: torch.Tensor, vocab_size: int, where: str
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Checks what a teacher says about one rollout, `distill_token_ids` and `distill_logprobs` as JSON gave them.

    If either is a list at all, it has T entries. `trained` (T,) bool are the tokens that count, ids are in [0,
    `vocab_size`), and `where` is how messages name the rollout. What cannot be used at a trained token is refused; at
    any other token it is left out, because nothing reads it.

    Returns the ids (T, K) int64, -1 where there is no token, and their logprobs (T, K) float32 in nats, -inf there;
    None and None if the teacher names no token.

    Raises:
        AtroposProtocolError: one field without the other, lists of different lengths for one token, a value of the
            wrong type; at a trained token: an id outside of the vocabulary or twice, a logprob that is not finite or
            above 0, probabilities that sum to more than 1.
    """
    if token_ids is None and logprobs is None:
        return None, None
    if token_ids is None or logprobs is None:
        given, missing = TEACHER_FIELDS if logprobs is None else reversed(TEACHER_FIELDS)
        raise bad_field(missing, f"{where}: it has `{given}` and no `{missing}`.")
    flat_ids, widths = _flatten(token_ids, "distill_token_ids", where)
    flat_logprobs, logprob_widths = _flatten(logprobs, "distill_logprobs", where)
    if widths != logprob_widths:
        t = next(i for i, width in enumerate(widths) if width != logprob_widths[i])
        found = (
            f"`distill_logprobs` has {logprob_widths[t]} entries at position {t}, `distill_token_ids` has {widths[t]}"
        )
        raise bad_field("distill_logprobs", f"{where}: {found}.")
    if not flat_ids:
        return None, None

    ids = integers(flat_ids, "distill_token_ids", where, widths)
    values = numbers(flat_logprobs, "distill_logprobs", where, widths).float()
    counts = torch.tensor(widths)
    rows = torch.arange(counts.numel()).repeat_interleave(counts)
    columns = torch.arange(ids.numel()) - (counts.cumsum(0) - counts)[rows]
    known, usable = (ids >= 0) & (ids < vocab_size), are_logprobs(values)
    refuse_trained(trained[rows] & ~known, flat_ids, "distill_token_ids", where, widths)
    refuse_trained(trained[rows] & ~usable, flat_logprobs, "distill_logprobs", where, widths)

    good = known & usable
    padded_ids = torch.full((counts.numel(), max(widths)), NO_TOKEN)
    padded_ids[rows, columns] = torch.where(good, ids, NO_TOKEN)
    padded_logprobs = torch.full(padded_ids.shape, -math.inf)
    padded_logprobs[rows, columns] = torch.where(good, values.clamp(max=0.0), -math.inf)
    _refuse_distributions(padded_ids, padded_logprobs, trained, where)
    return padded_ids, padded_logprobs


def _flatten(lists: object, name: str, where: str) -> tuple[list[Any], list[int]]:
    """The entries of all lists in one, and the length of each; `null` is an empty list."""
    if not isinstance(lists, list):
        raise bad_field(name, f"{where}: `{name}` is {show(lists)}, not a list.")
    lists = [[] if entry is None else entry for entry in lists]
    if set(map(type, lists)) != {list}:
        position = next(i for i, entry in enumerate(lists) if type(entry) is not list)
        raise bad_field(name, f"{where}: `{name}` has {show(lists[position])} at position {position}, not a list.")
    return list(chain.from_iterable(lists)), list(map(len, lists))


def _refuse_distributions(ids: torch.Tensor, logprobs: torch.Tensor, trained: torch.Tensor, where: str) -> None:
    """Raises where the entries of a trained token, each good by itself, are no part of one distribution."""
    ordered = ids.sort(dim=1).values
    twice = trained[:, None] & (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_TOKEN)
    if bool(twice.any()):
        position, entry = twice.nonzero()[0].tolist()
        found = f"`distill_token_ids` has {int(ordered[position, entry])} twice at the trained position {position}"
        raise bad_field("distill_token_ids", f"{where}: {found}.")
    totals = logprobs.double().exp().sum(dim=1)
    above = trained & (totals > MAX_TEACHER_PROBABILITY)
    if bool(above.any()):
        position = int(above.nonzero()[0])
        found = f"probabilities that sum to {float(totals[position]):.6g} at the trained position {position}"
        raise bad_field("distill_logprobs", f"{where}: `distill_logprobs` has {found}.")
