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

    Args:
        input_ids (`torch.Tensor` of shape `(R, L)`, int64):
            Token ids; padding behind the last token of a row.
        position_ids (`torch.Tensor` of shape `(R, L)`, int64):
            Position of each token in its own sequence; 0 at padding.
        subtree_end (`torch.Tensor` of shape `(R, L)`, int64, *optional*):
            For `tree`: the position of the row behind the last token that attends to this one.
        attention_mask (`torch.Tensor` of shape `(R, L)`, int64, *optional*):
            For `padded`: 1 at tokens, 0 at padding.
        token_positions (`tuple` of `torch.Tensor` of shape `(T,)`, int64):
            For each sequence, where its tokens are, counted over all rows: row * L + position.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor | None
    attention_mask: Tensor | None
    token_positions: tuple[Tensor, ...]


@dataclass(frozen=True)
class PrefixTree:
    """Sequences folded into a trie, stored depth first.

    Args:
        input_ids (`torch.Tensor` of shape `(L,)`, int64):
            The tokens of the trie.
        position_ids (`torch.Tensor` of shape `(L,)`, int64):
            Depth of each token.
        subtree_end (`torch.Tensor` of shape `(L,)`, int64):
            Position behind the last descendant of each token.
        token_positions (`tuple` of `torch.Tensor` of shape `(T,)`, int64):
            For each sequence, in the order given, where its tokens are.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    token_positions: tuple[Tensor, ...]


def prefix_tree(sequences: Sequence[Tensor]) -> PrefixTree:
    """Folds sequences into a trie in which every common prefix is stored once.

    In lexicographic order, the longest prefix that a sequence shares with any earlier one is the one it shares with the
    sequence just before it. So each sequence adds its own suffix to the path of its predecessor, and depth-first order
    comes by itself.

    Args:
        sequences (sequence of `torch.Tensor` of shape `(T,)`, int64):
            Token ids; at least one sequence. They may be equal, or prefixes of each other, or share nothing.

    Returns:
        [`PrefixTree`]: L is the number of different prefixes.
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
    """Lays groups of sequences out as prefix trees, one per group, several in a row where they fit.

    Args:
        groups (sequence of sequences of `torch.Tensor` of shape `(T,)`, int64):
            The sequences of each group; prefixes are shared inside of a group.
        pad_token_id (`int`, *optional*, defaults to `0`):
            Id of the padding behind the trees of a row. It attends to itself only.

    Returns:
        [`Layout`]: L is the size of the largest tree; `token_positions` in the order of the sequences, group after
        group.
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
    """Lays sequences out one after the other in one row, without padding.

    Args:
        sequences (sequence of `torch.Tensor` of shape `(T,)`, int64):
            Token ids; at least one sequence.

    Returns:
        [`Layout`]: without a mask: attention implementations for packed rows tell the sequences apart by
        `position_ids`, which start at 0 for each.
    """
    lengths = [sequence.numel() for sequence in sequences]
    input_ids = torch.cat(list(sequences))[None]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    return Layout(input_ids, position_ids, None, None, torch.arange(sum(lengths)).split(lengths))


def padded_layout(sequences: Sequence[Tensor], pad_token_id: int = 0) -> Layout:
    """Lays sequences out one a row, padded on the right to the longest.

    Args:
        sequences (sequence of `torch.Tensor` of shape `(T,)`, int64):
            Token ids; at least one sequence.
        pad_token_id (`int`, *optional*, defaults to `0`):
            Id of the padding, which is not attended to.

    Returns:
        [`Layout`]: with an `attention_mask`.
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


def lay_out(layout: str, groups: Sequence[Sequence[Tensor]], pad_token_id: int = 0) -> Layout:
    """Lays the sequences of groups out.

    Args:
        layout (`str`):
            One of `layouts.LAYOUTS`.
        groups (sequence of sequences of `torch.Tensor` of shape `(T,)`, int64):
            The sequences of each group.
        pad_token_id (`int`, *optional*, defaults to `0`):
            Id of the padding.
    """
    if layout == "tree":
        return tree_layout(groups, pad_token_id)
    sequences = [sequence for group in groups for sequence in group]
    return packed_layout(sequences) if layout == "packed" else padded_layout(sequences, pad_token_id)


def tree_attention_mask(subtree_end: Tensor) -> Tensor:
    """Who attends to whom in a tree layout.

    Args:
        subtree_end (`torch.Tensor` of shape `(R, L)`, int64):
            Of the [`Layout`].

    Returns:
        `torch.Tensor` of shape `(R, 1, L, L)`, bool: entry `[r, 0, q, k]` says whether position q attends to k.
    """
    index = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    mask = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < subtree_end[:, None, :])
    return mask[:, None]


def num_computed_tokens(groups: Sequence[Sequence[Tensor]], layout: str) -> int:
    """Positions that a forward pass over these sequences computes; with `padded` also its padding.

    With `tree` without the padding between trees, so that the numbers of groups add up.

    Args:
        groups (sequence of sequences of `torch.Tensor` of shape `(T,)`, int64):
            The sequences of each group.
        layout (`str`):
            One of `LAYOUTS`.
    """
    lengths = [sequence.numel() for group in groups for sequence in group]
    if layout == "padded":
        return len(lengths) * max(lengths, default=0)
    if layout == "packed":
        return sum(lengths)
    return sum(prefix_tree(group).input_ids.numel() for group in groups)


def pack_first_fit(sizes: Sequence[int], capacity: int | None = None) -> list[list[int]]:
    """Packs items into as few bins as first-fit decreasing finds: at most 11/9 of the fewest possible, plus one.

    Args:
        sizes (sequence of `int`):
            Size of each item.
        capacity (`int`, *optional*):
            What a bin holds; the largest size if not given. An item above it gets a bin of its own.

    Returns:
        `list[list[int]]`: the numbers of the items of each bin, largest first.
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
