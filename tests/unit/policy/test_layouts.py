"""Layouts of a micro-batch: prefix trees against a naive trie, and real models that must not notice the layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trl_atropos.policy.layouts import (
    LAYOUTS,
    Layout,
    lay_out,
    layout_inputs,
    num_computed_tokens,
    pack_first_fit,
    packed_layout,
    padded_layout,
    prefix_tree,
    tree_attention_mask,
    tree_layout,
)


Tokens = list[int]


def tensors(sequences: Sequence[Tokens]) -> list[Tensor]:
    return [torch.tensor(sequence) for sequence in sequences]


def as_lists(positions: Sequence[Tensor]) -> list[Tokens]:
    return [position.tolist() for position in positions]


@st.composite
def families(draw: st.DrawFn) -> list[Tokens]:
    """Sequences over few tokens; some are cut off, repeat or continue an earlier one."""
    fresh = st.lists(st.integers(0, 2), min_size=1, max_size=8)
    sequences = [draw(fresh)]
    for _ in range(draw(st.integers(0, 6))):
        base = draw(st.sampled_from(sequences))
        kept = base[: draw(st.integers(1, len(base)))]
        sequences.append(draw(st.sampled_from([kept, base])) if draw(st.booleans()) else kept + draw(fresh))
    sequences += draw(st.lists(fresh, max_size=2))
    return draw(st.permutations(sequences))


def prefixes(sequence: Tokens) -> list[tuple[int, ...]]:
    return [tuple(sequence[:length]) for length in range(1, len(sequence) + 1)]


def naive_trie(sequences: Sequence[Tokens]) -> set[tuple[int, ...]]:
    """A node is its root path: the prefix that ends in it."""
    return {prefix for sequence in sequences for prefix in prefixes(sequence)}


def is_on_root_path(node: tuple, descendant: tuple) -> bool:
    return descendant[: len(node)] == node


class TestPrefixTree:
    @settings(deadline=None, max_examples=200)
    @given(families())
    def test_equals_a_naive_trie(self, sequences):
        tree = prefix_tree(tensors(sequences))
        num_nodes = len(naive_trie(sequences))
        assert tree.input_ids.shape == tree.position_ids.shape == tree.subtree_end.shape == (num_nodes,)

        node_at: dict[int, tuple[int, ...]] = {}
        for sequence, positions in zip(sequences, as_lists(tree.token_positions), strict=True):
            assert tree.input_ids[positions].tolist() == sequence
            assert tree.position_ids[positions].tolist() == list(range(len(sequence)))
            for position, prefix in zip(positions, prefixes(sequence), strict=True):
                assert node_at.setdefault(position, prefix) == prefix
        # One position per prefix, one prefix per position.
        assert set(node_at) == set(range(num_nodes))
        assert len(set(node_at.values())) == num_nodes

        end = tree.subtree_end.tolist()
        for k, q in product(range(num_nodes), repeat=2):
            assert (k <= q < end[k]) == is_on_root_path(node_at[k], node_at[q]), (k, q)

    def test_two_turns_that_fork_at_different_depths(self):
        # 1 2 3 4          stored depth first in the order of the token ids:
        # 1 2 3 5 6        index   0 1 2 3 4 5 6
        # 1 7              token   1 2 3 4 5 6 7
        #                  depth   0 1 2 3 3 4 1
        tree = prefix_tree(tensors([[1, 7], [1, 2, 3, 5, 6], [1, 2, 3, 4]]))
        assert tree.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert tree.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 1]
        assert tree.subtree_end.tolist() == [7, 6, 6, 4, 6, 6, 7]
        assert as_lists(tree.token_positions) == [[0, 6], [0, 1, 2, 4, 5], [0, 1, 2, 3]]

    def test_nothing_shared_is_one_path_after_the_other(self):
        tree = prefix_tree(tensors([[3, 1], [2, 1, 1]]))
        assert tree.input_ids.tolist() == [2, 1, 1, 3, 1]
        assert tree.position_ids.tolist() == [0, 1, 2, 0, 1]
        assert tree.subtree_end.tolist() == [3, 3, 3, 5, 5]
        assert as_lists(tree.token_positions) == [[3, 4], [0, 1, 2]]

    def test_duplicates_and_prefixes_add_nothing(self):
        tree = prefix_tree(tensors([[4, 5, 6], [4], [4, 5, 6], [4, 5]]))
        assert tree.input_ids.tolist() == [4, 5, 6]
        assert tree.subtree_end.tolist() == [3, 3, 3]
        assert as_lists(tree.token_positions) == [[0, 1, 2], [0], [0, 1, 2], [0, 1]]

    def test_one_token(self):
        tree = prefix_tree(tensors([[9]]))
        assert (tree.input_ids.tolist(), tree.position_ids.tolist(), tree.subtree_end.tolist()) == ([9], [0], [1])
        assert as_lists(tree.token_positions) == [[0]]

    def test_equal_tokens_after_different_prefixes_are_not_shared(self):
        # The second token of both is 5, but what comes before it differs, and so does its hidden state.
        assert prefix_tree(tensors([[1, 5], [2, 5]])).input_ids.tolist() == [1, 5, 2, 5]


class TestTreeLayout:
    def test_trees_that_fit_share_a_row(self):
        # Trees of 4, 1 and 3 tokens in rows of 4: [first], [third, second].
        layout = tree_layout([tensors(group) for group in ([[1, 2, 3], [1, 2, 4]], [[5]], [[6, 7], [6, 8]])])
        assert layout.input_ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 5]]
        assert layout.position_ids.tolist() == [[0, 1, 2, 2], [0, 1, 1, 0]]
        assert layout.subtree_end.tolist() == [[4, 4, 3, 4], [3, 2, 3, 4]]
        # In the order of the groups, not of the rows.
        assert as_lists(layout.token_positions) == [[0, 1, 2], [0, 1, 3], [7], [4, 5], [4, 6]]
        assert layout.attention_mask is None

    def test_padding_fills_the_rows(self):
        layout = tree_layout([tensors([[1, 2, 3]]), tensors([[4, 5]])], pad_token_id=63)
        assert layout.input_ids.tolist() == [[1, 2, 3], [4, 5, 63]]
        assert layout.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
        assert layout.subtree_end.tolist() == [[3, 3, 3], [2, 2, 3]]
        assert as_lists(layout.token_positions) == [[0, 1, 2], [3, 4]]

    @settings(deadline=None, max_examples=100)
    @given(st.lists(families(), min_size=1, max_size=5))
    def test_tokens_see_their_root_path_and_padding_sees_itself(self, groups):
        layout = tree_layout([tensors(group) for group in groups], pad_token_id=63)
        sizes = [len(naive_trie(group)) for group in groups]
        num_rows, length = layout.input_ids.shape
        assert length == max(sizes)

        # What a flat position holds; nodes of different groups are different though their tokens be equal.
        node_at: dict[int, tuple[int, tuple[int, ...]]] = {}
        positions = iter(as_lists(layout.token_positions))
        for group, sequences in enumerate(groups):
            for sequence in sequences:
                for position, prefix in zip(next(positions), prefixes(sequence), strict=True):
                    assert node_at.setdefault(position, (group, prefix)) == (group, prefix)
                    assert layout.input_ids.flatten()[position] == prefix[-1]
                    assert layout.position_ids.flatten()[position] == len(prefix) - 1
        assert next(positions, None) is None
        assert len(node_at) == sum(sizes)

        mask = tree_attention_mask(layout.subtree_end)
        assert mask.shape == (num_rows, 1, length, length)
        for row, q, k in product(range(num_rows), range(length), range(length)):
            query, key = node_at.get(row * length + q), node_at.get(row * length + k)
            if query is None or key is None:
                expected = q == k
            else:
                expected = query[0] == key[0] and is_on_root_path(key[1], query[1])
            assert mask[row, 0, q, k].item() == expected, (row, q, k)
        is_padding = torch.tensor([position not in node_at for position in range(num_rows * length)])
        assert (layout.input_ids.flatten()[is_padding] == 63).all()
        assert (layout.position_ids.flatten()[is_padding] == 0).all()


class TestTreeAttentionMask:
    def test_fork_by_hand(self):
        # A prompt 1 2 with the continuations 3 and 4, and one token of padding.
        layout = tree_layout([tensors([[1, 2, 3], [1, 2, 4]]), tensors([[5, 6, 7, 8, 9]])])
        row = layout.input_ids.tolist().index([1, 2, 3, 4, 0])
        mask = tree_attention_mask(layout.subtree_end)
        assert mask.dtype == torch.bool
        assert mask[row, 0].long().tolist() == [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 0, 1, 0],
            [0, 0, 0, 0, 1],
        ]

    def test_one_sequence_is_causal(self):
        mask = tree_attention_mask(prefix_tree(tensors([[3, 1, 2]])).subtree_end[None])
        assert torch.equal(mask[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())


class TestPackedAndPaddedLayout:
    def test_packed(self):
        layout = packed_layout(tensors([[1, 2, 3], [4], [1, 2]]))
        assert layout.input_ids.tolist() == [[1, 2, 3, 4, 1, 2]]
        assert layout.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
        assert as_lists(layout.token_positions) == [[0, 1, 2], [3], [4, 5]]
        assert layout.subtree_end is None
        assert layout.attention_mask is None

    def test_padded(self):
        layout = padded_layout(tensors([[1, 2], [3, 4, 5], [6]]), pad_token_id=63)
        assert layout.input_ids.tolist() == [[1, 2, 63], [3, 4, 5], [6, 63, 63]]
        assert layout.position_ids.tolist() == [[0, 1, 0], [0, 1, 2], [0, 0, 0]]
        assert layout.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
        assert as_lists(layout.token_positions) == [[0, 1], [3, 4, 5], [6]]
        assert layout.subtree_end is None

    @settings(deadline=None, max_examples=50)
    @given(families())
    def test_positions_lead_back_to_the_tokens(self, sequences):
        for layout in (packed_layout(tensors(sequences)), padded_layout(tensors(sequences))):
            tokens = [layout.input_ids.flatten()[positions].tolist() for positions in layout.token_positions]
            assert tokens == sequences
            depths = [layout.position_ids.flatten()[positions].tolist() for positions in layout.token_positions]
            assert depths == [list(range(len(sequence))) for sequence in sequences]


class TestNumComputedTokens:
    # One group 1 2 3 / 1 2 4 5 and one of 5 tokens: two trees of 5, 3 + 4 + 5 tokens, 3 rows of 5.
    @pytest.mark.parametrize(("layout", "expected"), [("tree", 10), ("packed", 12), ("padded", 15)])
    def test_by_hand(self, layout, expected):
        groups = [tensors([[1, 2, 3], [1, 2, 4, 5]]), tensors([[6, 7, 8, 9, 6]])]
        assert num_computed_tokens(groups, layout) == expected

    @pytest.mark.parametrize("layout", LAYOUTS)
    @settings(deadline=None, max_examples=50)
    @given(groups=st.lists(families(), min_size=1, max_size=4))
    def test_is_the_size_of_the_layout(self, layout, groups):
        groups = [tensors(group) for group in groups]
        # Trees are counted without what pads their rows, so that the numbers of groups add up.
        size = (
            sum(lay_out(layout, [group]).input_ids.numel() for group in groups)
            if layout == "tree"
            else lay_out(layout, groups).input_ids.numel()
        )
        assert num_computed_tokens(groups, layout) == size

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_nothing_costs_nothing(self, layout):
        assert num_computed_tokens([], layout) == 0


def fewest_bins(sizes: Sequence[int], capacity: int) -> int:
    """By trying every assignment; items above the capacity take a bin each."""
    items = [size for size in sizes if size <= capacity]
    best = len(items)

    def place(item: int, loads: list[int]) -> None:
        nonlocal best
        if len(loads) >= best:
            return
        if item == len(items):
            best = len(loads)
            return
        for number, load in enumerate(loads):
            if load + items[item] <= capacity:
                place(item + 1, [*loads[:number], load + items[item], *loads[number + 1 :]])
        place(item + 1, [*loads, items[item]])

    place(0, [])
    return best + len(sizes) - len(items)


class TestPackFirstFit:
    @settings(deadline=None, max_examples=200)
    @given(
        sizes=st.lists(st.integers(1, 12), max_size=8),
        capacity=st.one_of(st.none(), st.integers(1, 12)),
    )
    def test_every_item_once_in_bins_that_hold_it(self, sizes, capacity):
        bins = pack_first_fit(sizes, capacity)
        assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
        capacity = max(sizes, default=0) if capacity is None else capacity
        for members in bins:
            load = [sizes[item] for item in members]
            assert load == sorted(load, reverse=True)
            assert sum(load) <= capacity or len(load) == 1
        # The bound of first-fit decreasing: 11/9 of the fewest bins, plus one.
        assert 9 * len(bins) <= 11 * fewest_bins(sizes, capacity) + 9

    def test_small_items_go_into_the_first_bin_with_room(self):
        # 6 and 5 open a bin each. 4 fills the first, 3 goes to the second, which leaves 2: the other 3 opens a third,
        # and 1 still goes to the second.
        assert pack_first_fit([3, 5, 1, 6, 3, 4], 10) == [[3, 5], [1, 0, 2], [4]]

    def test_item_above_the_capacity_is_alone(self):
        assert pack_first_fit([2, 9, 1], 4) == [[1], [0, 2]]

    def test_without_capacity_the_largest_item_sets_it(self):
        assert pack_first_fit([2, 5, 3]) == [[1], [2, 0]]

    def test_nothing_takes_no_bins(self):
        assert pack_first_fit([]) == []


VOCAB_SIZE = 64
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    # Larger than usual: attention that is nearly uniform would hide a wrong mask.
    "initializer_range": 0.3,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    # One layer of each kind. The window does not cut the sequences; a tree in a narrower one needs another mask.
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=64, layer_types=["sliding_attention", "full_attention"])
    ),
}


def random_tokens(*lengths: int, seed: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def single_turn() -> list[list[Tokens]]:
    prompt, *continuations = random_tokens(12, 5, 9, 1, 7, seed=1)
    return [[prompt + continuation for continuation in continuations]]


def forks_at_different_depths() -> list[list[Tokens]]:
    prompt, first, second, third, fourth = random_tokens(6, 8, 7, 5, 6, seed=2)
    return [
        [
            prompt + first + second,
            prompt + first + third,
            prompt + first[:3] + third,
            prompt + first + second[:2] + fourth,
            fourth,
        ]
    ]


def prefixes_of_each_other() -> list[list[Tokens]]:
    (tokens,) = random_tokens(16, seed=3)
    return [[tokens[:9], tokens, tokens[:2], tokens, tokens[:1]]]


def rows_of_several_groups_and_padding() -> list[list[Tokens]]:
    # Trees of 13, 8, 4 and 11 tokens in rows of 13: [first], [fourth, padding], [second, third, padding].
    prompt, left, right, small, other, alone = random_tokens(6, 4, 3, 4, 8, 11, seed=4)
    return [[prompt + left, prompt + right], [other], [small, small[:3]], [alone]]


def nothing_shared() -> list[list[Tokens]]:
    return [random_tokens(7, 1, 10, seed=5)]


CASES = [
    single_turn,
    forks_at_different_depths,
    prefixes_of_each_other,
    rows_of_several_groups_and_padding,
    nothing_shared,
]


def make_model(name: str, attn_implementation: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]()
    # Biases and norms start at 0 and 1, where a mistake in them would not show.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    model.set_attn_implementation(attn_implementation)
    return model


def arguments(model: PreTrainedModel, layout: Layout) -> dict[str, Tensor]:
    inputs = layout_inputs(layout)
    if "subtree_end" in inputs:
        mask = tree_attention_mask(inputs.pop("subtree_end"))
        if model.config._attn_implementation == "eager":
            # Eager attention adds the mask to its scores.
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        inputs["attention_mask"] = mask
    return inputs


def logprobs_of_layout(
    model: PreTrainedModel, layout: Layout, sequences: Sequence[Tensor], **overrides: Tensor | None
) -> Tensor:
    """Logprobs of all tokens but the first of each sequence, one sequence after the other."""
    inputs = {**arguments(model, layout), **overrides}
    log_softmax = model(**inputs, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    return torch.cat(
        [
            log_softmax[positions[:-1]].gather(-1, sequence[1:, None]).squeeze(-1)
            for sequence, positions in zip(sequences, layout.token_positions, strict=True)
        ]
    )


def logprobs_alone(model: PreTrainedModel, sequences: Sequence[Tensor]) -> Tensor:
    """Each sequence in a forward of its own, which nothing but transformers lays out."""
    log_softmax = [model(sequence[None], use_cache=False).logits[0].log_softmax(-1) for sequence in sequences]
    return torch.cat(
        [
            scores[:-1].gather(-1, sequence[1:, None]).squeeze(-1)
            for scores, sequence in zip(log_softmax, sequences, strict=True)
        ]
    )


def gradients(model: PreTrainedModel, logprobs: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(6))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((weights * logprobs).sum(), parameters), strict=True))


class TestModelsDoNotNoticeTheLayout:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", MODELS)
    def test_logprobs_and_gradients_equal_those_of_each_sequence_alone(self, name, attn_implementation, layout, case):
        model = make_model(name, attn_implementation)
        groups = [tensors(group) for group in case()]
        sequences = [sequence for group in groups for sequence in group]
        logprobs = logprobs_of_layout(model, lay_out(layout, groups), sequences)
        expected = logprobs_alone(model, sequences)
        assert len(expected) == sum(len(sequence) - 1 for sequence in sequences)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
        expected_gradients = gradients(model, expected)
        for parameter, gradient in gradients(model, logprobs).items():
            atol = 1e-5 * expected_gradients[parameter].abs().max().item()
            assert atol > 0, parameter
            torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=0, atol=atol, msg=parameter)


class TestTheComparisonCanFail:
    """What a wrong layout does to the logprobs: far more than the 1e-5 that a right one is allowed."""

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("left_out", ["position_ids", "attention_mask"])
    def test_tree_without_its_positions_or_its_mask(self, name, left_out):
        # Without a mask the model falls back to a causal one, or takes the restarts of the positions for new sequences.
        self.assert_differs(name, "tree", **{left_out: None})

    @pytest.mark.parametrize("name", MODELS)
    def test_tree_under_a_causal_mask(self, name):
        length = tree_layout([tensors(group) for group in single_turn()]).input_ids.shape[1]
        self.assert_differs(name, "tree", attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool).tril())

    @pytest.mark.parametrize("name", MODELS)
    def test_packed_without_its_positions(self, name):
        self.assert_differs(name, "packed", position_ids=None)

    def assert_differs(self, name: str, layout: str, **overrides: Tensor | None) -> None:
        model = make_model(name)
        groups = [tensors(group) for group in single_turn()]
        with torch.no_grad():
            logprobs = logprobs_of_layout(model, lay_out(layout, groups), groups[0], **overrides)
            expected = logprobs_alone(model, groups[0])
        assert (logprobs - expected).abs().max() > 0.1

    def test_continuation_after_the_fork_does_not_see_its_sibling(self):
        # Another token in one continuation changes that one from there on, and no logprob of the others.
        model = make_model("llama")
        sequences = tensors(single_turn()[0])
        changed = [sequence.clone() for sequence in sequences]
        changed[1][14] = (changed[1][14] + 1) % VOCAB_SIZE
        lengths = [len(sequence) - 1 for sequence in sequences]
        with torch.no_grad():
            before, after = (
                logprobs_of_layout(model, tree_layout([members]), members).split(lengths)
                for members in (sequences, changed)
            )
        for number in (0, 2, 3):
            torch.testing.assert_close(after[number], before[number], rtol=0, atol=1e-5)
        # Entry t - 1 is the logprob of token t.
        torch.testing.assert_close(after[1][:13], before[1][:13], rtol=0, atol=1e-5)
        assert ((after[1][13:] - before[1][13:]).abs() > 1e-3).all()
