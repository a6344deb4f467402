"""Blocks of queries: together they hold each pair of tokens that attend to each other, once, and few others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trl_atropos.policy import tree_blocks as module
from trl_atropos.policy.layouts import Layout, tree_attention_mask, tree_layout
from trl_atropos.policy.tree_blocks import Positions, Reach, TreeBlock, tree_blocks


def layout_of(*groups: list[list[int]]) -> Layout:
    return tree_layout([[torch.tensor(sequence) for sequence in group] for group in groups])


def forked(num_prompt: int, num_completion: int, num_rollouts: int) -> Layout:
    prompt = list(range(num_prompt))
    return layout_of(
        [
            prompt + list(range(start, start + num_completion))
            for start in range(1000, 1000 + 1000 * num_rollouts, 1000)
        ]
    )


def blocks_of(layout: Layout, reach: Reach | None = None) -> list[TreeBlock]:
    assert layout.subtree_end is not None
    (subtree_end,), (depth,) = layout.subtree_end, layout.position_ids
    return tree_blocks(subtree_end, depth, reach)


def as_indices(positions: Positions, length: int) -> Tensor:
    return torch.arange(length)[positions] if isinstance(positions, slice) else positions


def seen_pairs(blocks: list[TreeBlock], length: int) -> Tensor:
    """How often each query sees each key, (L, L) int64."""
    seen = torch.zeros(length, length, dtype=torch.int64)
    for block in blocks:
        queries = as_indices(block.queries, length)
        if block.common is not None:
            keys = as_indices(block.common, length)
            seen[queries[:, None], keys] += 1
        keys = as_indices(block.others, length)
        assert torch.equal(keys[-queries.numel() :], queries), "the queries are the last of their keys"
        if block.mask is None:
            assert torch.equal(keys, queries)
            attends = torch.ones(queries.numel(), queries.numel(), dtype=torch.int64).tril()
        else:
            assert set(block.mask.unique().tolist()) <= {0.0, -torch.inf}
            attends = (block.mask == 0).long()
        seen[queries[:, None], keys] += attends
    return seen


def expected_pairs(layout: Layout, reach: Reach | None) -> Tensor:
    assert layout.subtree_end is not None
    mask = tree_attention_mask(layout.subtree_end)[0, 0]
    (depth,) = layout.position_ids
    if reach is None:
        return mask
    if reach.is_chunk:
        return mask & (depth[:, None] // reach.num_tokens == depth // reach.num_tokens)
    return mask & (depth[:, None] - depth < reach.num_tokens)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Short sequences have blocks of every kind."""
    monkeypatch.setattr(module, "MIN_CHAIN", 3)
    monkeypatch.setattr(module, "MAX_BLOCK", 6)


# Few ids: sequences share prefixes of all lengths, and are prefixes of each other.
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=6)


@given(
    groups=st.lists(sequences, min_size=1, max_size=3),
    reach=st.none() | st.builds(Reach, st.integers(1, 16), is_chunk=st.booleans()),
)
def test_each_pair_is_seen_once(groups, reach):
    # In one row: the longest tree has room for the others behind it only if it is padded, so they are made one tree.
    layout = layout_of([[number, *sequence] for number, group in enumerate(groups) for sequence in group])
    length = layout.input_ids.shape[1]
    blocks = blocks_of(layout, reach)
    assert [token for block in blocks for token in range(block.queries.start, block.queries.stop)] == list(
        range(length)
    )
    assert torch.equal(seen_pairs(blocks, length), expected_pairs(layout, reach).long())


def test_padding_and_a_second_tree_see_nothing_of_the_first():
    layout = layout_of([[1, 2, 3, 4, 5, 6, 7, 8]], [[1, 2, 3]], [[1, 2, 4]])
    assert layout.input_ids.shape == (2, 8)
    assert layout.subtree_end is not None
    for subtree_end, depth in zip(layout.subtree_end, layout.position_ids, strict=True):
        expected = tree_attention_mask(subtree_end[None])[0, 0]
        assert torch.equal(seen_pairs(tree_blocks(subtree_end, depth), 8), expected.long())


def test_a_chain_is_one_block_without_a_mask():
    (block,) = blocks_of(layout_of([list(range(50))]))
    assert block == TreeBlock(slice(0, 50), None, slice(0, 50), None)


def test_a_continuation_sees_the_prompt_whole_and_itself_causally():
    first, second = blocks_of(forked(10, 5, 2))
    assert first == TreeBlock(slice(0, 15), None, slice(0, 15), None)
    assert second == TreeBlock(slice(15, 20), slice(0, 10), slice(15, 20), None)


def test_short_continuations_share_a_block():
    _, second = blocks_of(forked(10, 2, 4))
    assert (second.queries, second.common, second.others) == (slice(12, 18), slice(0, 10), slice(12, 18))
    assert second.mask is not None


def test_a_window_leaves_out_what_is_behind_it():
    blocks = blocks_of(layout_of([list(range(40))]), reach=Reach(8))
    assert [block.queries for block in blocks] == [slice(start, min(start + 6, 40)) for start in range(0, 40, 6)]
    last = blocks[-1]
    # Tokens 36 to 39: all see 32 to 35, some see 29 to 31.
    assert last.common == slice(32, 36)
    assert as_indices(last.others, 40).tolist() == [29, 30, 31, 36, 37, 38, 39]


def test_the_tokens_of_a_chunk_need_no_mask():
    blocks = blocks_of(layout_of([list(range(40))]), reach=Reach(16, is_chunk=True))
    assert blocks == [TreeBlock(chunk, None, chunk, None) for chunk in (slice(0, 16), slice(16, 32), slice(32, 40))]


def num_pairs(block: TreeBlock, length: int) -> int:
    """Pairs that are multiplied for a block, those behind a mask included; of a causal block, those of its triangle."""
    num_queries = as_indices(block.queries, length).numel()
    num_common = 0 if block.common is None else as_indices(block.common, length).numel()
    own = num_queries * (num_queries + 1) // 2 if block.mask is None else block.mask.numel()
    return num_queries * num_common + own


@pytest.mark.parametrize("shape", [(0, 200, 4), (100, 5, 16), (100, 100, 8), (30, 40, 8)])
def test_no_more_pairs_than_each_sequence_alone(monkeypatch, shape):
    monkeypatch.setattr(module, "MIN_CHAIN", 64)
    monkeypatch.setattr(module, "MAX_BLOCK", 256)
    num_prompt, num_completion, num_rollouts = shape
    length = num_prompt + num_completion
    layout = forked(*shape)
    pairs = sum(num_pairs(block, layout.input_ids.shape[1]) for block in blocks_of(layout))
    assert pairs <= max(num_rollouts * length * (length + 1) // 2, 2 * module.MAX_BLOCK**2)
