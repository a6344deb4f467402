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
from typing import TypeVar

import torch
from torch import Tensor


MIN_CHAIN = 64
"""Chains shorter than this many tokens share a block: one masked call costs less than many short ones."""

MAX_BLOCK = 256
"""Most queries of a block whose pairs need a mask: of short chains, or where a window ends."""

Depth = TypeVar("Depth", int, Tensor)

Positions = slice | Tensor
"""Positions of a row: a slice where they follow one another, else (K,) int64, ascending."""


@dataclass(frozen=True)
class Reach:
    """How far back on its path a token attends: to itself and the `num_tokens - 1` tokens before it (a window), or if
    `is_chunk` to itself and the tokens before it in its chunk of `num_tokens`, counted from the start of the path.
    """

    num_tokens: int
    is_chunk: bool = False

    def first_depth(self, depth: Depth) -> Depth:
        """Depth of the first token that one at this depth attends to; 0 or less: it attends to its whole path."""
        return depth - depth % self.num_tokens if self.is_chunk else depth - (self.num_tokens - 1)


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


def tree_blocks(subtree_end: Tensor, depth: Tensor, reach: Reach | None = None) -> list[TreeBlock]:
    """Cuts one row of a tree layout into blocks of queries.

    `subtree_end` (L,) int64 and `depth` (L,) int64 are those of [`~policy.layouts.Layout`] (`position_ids` is the
    depth). Without a `reach`, a token attends to its whole path.

    The blocks come in the order of the row, and each token is in one of them.
    """
    return [_block(subtree_end, depth, start, end, reach) for start, end in _spans(depth, reach)]


def _spans(depth: Tensor, reach: Reach | None) -> Iterator[tuple[int, int]]:
    """First position of each block of queries and the one behind its last."""
    length = depth.numel()
    is_start = torch.ones(length, dtype=torch.bool)
    is_start[1:] = depth[1:] != depth[:-1] + 1
    if reach is not None and reach.is_chunk:
        # Within a chunk, a chain needs no mask.
        is_start |= depth % reach.num_tokens == 0
    starts = [*is_start.nonzero().squeeze(-1).tolist(), length]
    pending: int | None = None
    for start, end in pairwise(starts):
        is_short = end - start < MIN_CHAIN
        if pending is not None and not (is_short and end - pending <= MAX_BLOCK):
            yield pending, start
            pending = None
        if is_short:
            pending = start if pending is None else pending
        elif reach is not None and not reach.is_chunk and reach.first_depth(int(depth[end - 1])) > 0:
            yield from ((piece, min(piece + MAX_BLOCK, end)) for piece in range(start, end, MAX_BLOCK))
        else:
            yield start, end
    if pending is not None:
        yield pending, length


def _block(subtree_end: Tensor, depth: Tensor, start: int, end: int, reach: Reach | None) -> TreeBlock:
    before = subtree_end[:start]
    is_common, is_seen = before >= end, before > start
    shallowest, deepest = depth[start:end].min(), depth[start:end].max()
    if reach is not None:
        is_common &= depth[:start] >= reach.first_depth(deepest)
        is_seen &= depth[:start] >= reach.first_depth(shallowest)
    common = is_common.nonzero().squeeze(-1)
    others = torch.cat([(is_seen & ~is_common).nonzero().squeeze(-1), torch.arange(start, end)])
    is_chain = int(deepest - shallowest) == end - start - 1 and int(depth[start]) == int(shallowest)
    sees_itself = reach is None or bool(reach.first_depth(deepest) <= shallowest)
    is_causal = is_chain and others.numel() == end - start and sees_itself
    mask = None if is_causal else _mask(subtree_end, depth, torch.arange(start, end), others, reach)
    return TreeBlock(slice(start, end), _as_slice(common) if common.numel() else None, _as_slice(others), mask)


def _mask(subtree_end: Tensor, depth: Tensor, queries: Tensor, keys: Tensor, reach: Reach | None) -> Tensor:
    query = queries[:, None]
    attends = (keys <= query) & (query < subtree_end[keys])
    if reach is not None:
        attends &= depth[keys] >= reach.first_depth(depth[queries])[:, None]
    return torch.zeros(attends.shape).masked_fill_(~attends, -torch.inf)


def _as_slice(positions: Tensor) -> Positions:
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == positions.numel() else positions
