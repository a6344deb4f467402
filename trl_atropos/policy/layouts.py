"""How the rollouts of a micro-batch are laid out for one forward pass.

    tree     shared prefixes once; rows of prefix trees, attention over each token's own path
    packed   one row, all rollouts one after the other, positions restart; the model's attention keeps them apart
    padded   one row per rollout, padded on the right

Shape letters: R rows, L positions of a row, T tokens of one rollout, U scored positions.

The rollouts of a group share their prompt, and those of a multi-turn environment often a longer prefix. A token's
hidden state depends on the tokens before it and on nothing else, so equal prefixes have equal hidden states: the tree
layout computes them once. What is shared is found from the token ids; what is trained is what the labels say.

A tree is stored depth first. Then the descendants of a token follow it without a gap, and one number per token says
who may attend to it: token q attends to token k if `k <= q < subtree_end[k]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


LAYOUTS = ("tree", "packed", "padded")


@dataclass(frozen=True)
class Layout:
    """Token sequences as the rows of one forward pass.

    `input_ids` (R, L) int64 have padding behind the last token of a row. `position_ids` (R, L) int64 are the position
    of each token in its own sequence, 0 at padding. `token_positions` say for each sequence where its tokens are, (T,)
    int64, counted over all rows: row * L + position.

    `subtree_end` (R, L) int64 is there for `tree` only: the position of the row behind the last token that attends to
    this one. `attention_mask` (R, L) int64 is there for `padded` only: 1 at tokens, 0 at padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor | None
    attention_mask: Tensor | None
    token_positions: tuple[Tensor, ...]


@dataclass(frozen=True)
class PrefixTree:
    """Sequences folded into a trie of L tokens, stored depth first.

    Each token of the trie has its id in `input_ids`, its depth in `position_ids`, and in `subtree_end` the position
    behind its last descendant, (L,) int64 each. `token_positions` say for each sequence, in the order given, where its
    tokens are, (T,) int64.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    token_positions: tuple[Tensor, ...]


def prefix_tree(sequences: Sequence[Tensor]) -> PrefixTree:
    """Folds sequences of token ids, (T,) int64 each, into a trie in which every common prefix is stored once.

    There is at least one sequence; they may be equal, or prefixes of each other, or share nothing. L is the number of
    different prefixes.

    In lexicographic order, the longest prefix that a sequence shares with any earlier one is the one it shares with
    the sequence just before it. So each sequence adds its own suffix to the path of its predecessor, and depth-first
    order comes by itself.
    """
    order = sorted(range(len(sequences)), key=lambda number: sequences[number].tolist())
    num_tokens = sum(sequence.numel() for sequence in sequences)
    input_ids, position_ids, subtree_end = (torch.zeros(num_tokens, dtype=torch.int64) for _ in range(3))
    token_positions: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * len(sequences)
    previous, path = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    length = 0
    for number in order:
        sequence = sequences[number]
        num_shared = common_prefix_length(previous, sequence)
        end = length + sequence.numel() - num_shared
        input_ids[length:end] = sequence[num_shared:]
        position_ids[length:end] = torch.arange(num_shared, sequence.numel())
        path = torch.cat([path[:num_shared], torch.arange(length, end)])
        # Every token of the path has a descendant up to here; later sequences of its subtree move the end further.
        subtree_end[path] = end
        token_positions[number] = path
        previous, length = sequence, end
    return PrefixTree(input_ids[:length], position_ids[:length], subtree_end[:length], tuple(token_positions))


def tree_layout(groups: Sequence[Sequence[Tensor]], pad_token_id: int = 0) -> Layout:
    """Lays groups of sequences, (T,) int64 each, out as prefix trees, one per group, several in a row where they fit.

    Prefixes are shared inside of a group. L is the size of the largest tree; the padding behind the trees of a row
    attends to itself only. `token_positions` are in the order of the sequences, group after group.
    """
    trees = [prefix_tree(sequences) for sequences in groups]
    rows = pack_first_fit([tree.input_ids.numel() for tree in trees])
    length = max(tree.input_ids.numel() for tree in trees)
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    subtree_end = torch.arange(1, length + 1).repeat(len(rows), 1)
    positions_of_group: dict[int, list[Tensor]] = {}
    for row, members in enumerate(rows):
        start = 0
        for group in members:
            tree = trees[group]
            span = slice(start, start + tree.input_ids.numel())
            input_ids[row, span] = tree.input_ids
            position_ids[row, span] = tree.position_ids
            subtree_end[row, span] = tree.subtree_end + start
            positions_of_group[group] = [row * length + start + positions for positions in tree.token_positions]
            start = span.stop
    token_positions = [positions for group in range(len(trees)) for positions in positions_of_group[group]]
    return Layout(input_ids, position_ids, subtree_end, None, tuple(token_positions))


def packed_layout(sequences: Sequence[Tensor]) -> Layout:
    """Lays one or more sequences, (T,) int64 each, out one after the other in one row, without padding.

    There is no mask: attention implementations for packed rows tell the sequences apart by `position_ids`, which start
    at 0 for each.
    """
    lengths = [sequence.numel() for sequence in sequences]
    input_ids = torch.cat(list(sequences))[None]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return Layout(input_ids, position_ids, None, None, torch.split(torch.arange(sum(lengths)), lengths))


def padded_layout(sequences: Sequence[Tensor], pad_token_id: int = 0) -> Layout:
    """Lays one or more sequences, (T,) int64 each, out one a row, padded on the right to the longest.

    The padding is not attended to: the layout has an `attention_mask`.
    """
    lengths = torch.tensor([sequence.numel() for sequence in sequences])
    input_ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=pad_token_id)
    columns = torch.arange(input_ids.shape[1])
    attention_mask = (columns < lengths[:, None]).long()
    starts = torch.arange(len(sequences)) * input_ids.shape[1]
    token_positions = tuple(start + columns[:length] for start, length in zip(starts, lengths.tolist(), strict=True))
    return Layout(input_ids, columns * attention_mask, None, attention_mask, token_positions)


def layout_inputs(layout: Layout) -> dict[str, Tensor]:
    """The tensors of a layout that a forward pass needs, by name."""
    inputs = {"input_ids": layout.input_ids}
    if layout.attention_mask is not None:
        return {**inputs, "attention_mask": layout.attention_mask}
    inputs["position_ids"] = layout.position_ids
    return inputs if layout.subtree_end is None else {**inputs, "subtree_end": layout.subtree_end}


def lay_out(
    layout: str, groups: Sequence[Sequence[Tensor]], pad_token_id: int = 0, shares_between_groups: bool = False
) -> Layout:
    """Lays the sequences of groups, (T,) int64 each, out in one of `LAYOUTS`.

    With `shares_between_groups`, the trees of all groups are one row without padding, in which they share prefixes.
    """
    sequences = [sequence for group in groups for sequence in group]
    if layout == "tree":
        return tree_layout([sequences] if shares_between_groups else groups, pad_token_id)
    return packed_layout(sequences) if layout == "packed" else padded_layout(sequences, pad_token_id)


def tree_attention_mask(subtree_end: Tensor) -> Tensor:
    """Who attends to whom in a tree layout with the `subtree_end` (R, L) int64.

    Returns (R, 1, L, L) bool: entry `[r, 0, q, k]` says whether position q attends to k.
    """
    index = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    mask = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < subtree_end[:, None, :])
    return mask[:, None]


def num_computed_tokens(groups: Sequence[Sequence[Tensor]], layout: str) -> int:
    """Positions that a forward pass over the sequences of these groups, (T,) int64 each, computes in one of `LAYOUTS`.

    With `padded` the padding counts too; with `tree` the padding between trees does not, so that the numbers of groups
    add up.
    """
    lengths = [sequence.numel() for group in groups for sequence in group]
    if layout == "padded":
        return len(lengths) * max(lengths, default=0)
    if layout == "packed":
        return sum(lengths)
    return sum(prefix_tree(group).input_ids.numel() for group in groups)


def pack_first_fit(sizes: Sequence[int], capacity: int | None = None) -> list[list[int]]:
    """Packs items into as few bins as first-fit decreasing finds: at most 11/9 of the fewest possible, plus one.

    A bin holds `capacity`, or the largest size if that is None; an item above it gets a bin of its own. Returns the
    numbers of the items of each bin, largest first.
    """
    capacity = max(sizes, default=0) if capacity is None else capacity
    bins: list[list[int]] = []
    free: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        number = next((number for number, room in enumerate(free) if room >= sizes[item]), None)
        if number is None:
            bins.append([item])
            free.append(capacity - sizes[item])
        else:
            bins[number].append(item)
            free[number] -= sizes[item]
    return bins


def common_prefix_length(left: Tensor, right: Tensor) -> int:
    """Number of tokens with which two sequences (T,) begin alike."""
    length = min(left.numel(), right.numel())
    differs = (left[:length] != right[:length]).nonzero()
    return int(differs[0]) if differs.numel() else length
