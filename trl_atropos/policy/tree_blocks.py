"""Which pairs of tokens of a tree attention has to multiply: blocks of queries, and the keys that each of them sees.

In a tree that is stored depth first, each sequence adds one chain: tokens of which each is the child of the one before.
All tokens of a chain see the same tokens before it, which is most of what they see: no mask is needed there, nor for
what they see of each other, which is causal. So attention over the blocks of a tree multiplies no more pairs than
attention over each sequence alone, and a mask is left where chains are short, or where a window ends.

Shape letters: L positions of a row, Q queries of a block, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


MIN_CHAIN = 64
"""Chains shorter than this many tokens share a block: one masked call costs less than many short ones."""

MAX_BLOCK = 256
"""Most queries of a block whose pairs need a mask: of short chains, or where a window ends."""

Positions = slice | Tensor
"""Positions of a row: a slice where they follow one another, else (K,) int64, ascending."""


@dataclass(frozen=True)
class TreeBlock:
    """Queries that attention computes together, and their keys.

    Every query of `queries` attends to every key of `common`, which is None if there is none. `others` are the rest of
    the keys and end with the queries themselves; `mask` (Q, K) float32 is 0 where a query attends to one of them and -inf
    elsewhere, or None if `others` are just the queries, and each attends to those up to itself.
    """

    queries: slice
    common: Positions | None
    others: Positions
    mask: Tensor | None


def tree_blocks(subtree_end: Tensor, depth: Tensor, window: int | None = None) -> list[TreeBlock]:
    """Cuts one row of a tree layout into blocks of queries.

    `subtree_end` (L,) int64 and `depth` (L,) int64 are those of [`~policy.layouts.Layout`] (`position_ids` is the
    depth). With `window`, at least 1, a token attends to itself and to the `window - 1` tokens before it on its path.

    The blocks come in the order of the row, and each token is in one of them.
    """
    return [_block(subtree_end, depth, start, end, window) for start, end in _spans(depth, window)]


def _spans(depth: Tensor, window: int | None) -> Iterator[tuple[int, int]]:
    """First position of each block of queries and the one behind its last."""
    length = depth.numel()
    is_start = torch.ones(length, dtype=torch.bool)
    is_start[1:] = depth[1:] != depth[:-1] + 1
    starts = [*is_start.nonzero().squeeze(-1).tolist(), length]
    pending: int | None = None
    for start, end in pairwise(starts):
        is_short = end - start < MIN_CHAIN
        if pending is not None and not (is_short and end - pending <= MAX_BLOCK):
            yield pending, start
            pending = None
        if is_short:
            pending = start if pending is None else pending
        elif window is not None and int(depth[end - 1]) >= window:
            yield from ((piece, min(piece + MAX_BLOCK, end)) for piece in range(start, end, MAX_BLOCK))
        else:
            yield start, end
    if pending is not None:
        yield pending, length


def _block(subtree_end: Tensor, depth: Tensor, start: int, end: int, window: int | None) -> TreeBlock:
    before = subtree_end[:start]
    is_common, is_seen = before >= end, before > start
    shallowest, deepest = depth[start:end].min(), depth[start:end].max()
    if window is not None:
        is_common &= depth[:start] > deepest - window
        is_seen &= depth[:start] > shallowest - window
    common = is_common.nonzero().squeeze(-1)
    others = torch.cat([(is_seen & ~is_common).nonzero().squeeze(-1), torch.arange(start, end)])
    is_chain = int(deepest - shallowest) == end - start - 1 and int(depth[start]) == int(shallowest)
    is_causal = is_chain and others.numel() == end - start and (window is None or end - start <= window)
    mask = None if is_causal else _mask(subtree_end, depth, torch.arange(start, end), others, window)
    return TreeBlock(slice(start, end), _as_slice(common) if common.numel() else None, _as_slice(others), mask)


def _mask(subtree_end: Tensor, depth: Tensor, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    query = queries[:, None]
    attends = (keys <= query) & (query < subtree_end[keys])
    if window is not None:
        attends &= depth[queries][:, None] - depth[keys] < window
    return torch.zeros(attends.shape).masked_fill_(~attends, -torch.inf)


def _as_slice(positions: Tensor) -> Positions:
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == positions.numel() else positions
