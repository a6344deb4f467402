"""Attention by blocks of queries: the same output and gradient as one call, and where it is used."""

from __future__ import annotations

import math

import pytest
import torch
from scoring_cases import plan, tiny, tiny_llama
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, FalconForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trl_atropos.policy import plan as planning
from trl_atropos.policy import tree_attention, tree_blocks
from trl_atropos.policy.layouts import tree_attention_mask, tree_layout
from trl_atropos.policy.scoring import PolicyScorer
from trl_atropos.policy.tree_attention import (
    MIN_FLEX_LENGTH,
    TREE_FLEX,
    TREE_SDPA,
    flex_gradient_difference,
    tree_block_mask,
    tree_columns,
    tree_flex,
    tree_sdpa,
)
from trl_atropos.policy.tree_blocks import Reach


class Layer(nn.Module):
    """What the attention function reads of an attention layer."""

    num_key_value_groups = 2
    is_causal = True


def inputs(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # 4 heads, 2 key-value heads, 2 rows
    shapes = [(2, heads, length, 8) for heads in (4, 2, 2)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def tree(length: int) -> Tensor:
    """Columns of two rows: a prompt of a third of the row with two continuations, and a chain."""
    third = length // 3
    prompt = torch.arange(third)
    left, right = torch.arange(100, 100 + third), torch.arange(200, 200 + length - 2 * third)
    groups = [[torch.cat([prompt, left]), torch.cat([prompt, right])], [torch.arange(length)]]
    layout = tree_layout(groups)
    return tree_columns(layout.subtree_end, layout.position_ids)


def dense_mask(columns: Tensor, window: int | None = None) -> Tensor:
    subtree_end, depth = columns[:, 0].unbind(dim=1)
    mask = tree_attention_mask(subtree_end)
    return mask if window is None else mask & (depth[:, None, :, None] - depth[:, None, None, :] < window)


@pytest.fixture
def small_blocks(monkeypatch):
    """Short rows have blocks of every kind."""
    monkeypatch.setattr(tree_blocks, "MIN_CHAIN", 3)
    monkeypatch.setattr(tree_blocks, "MAX_BLOCK", 4)
    monkeypatch.setattr(tree_attention, "BLOCK_SIZE", 4)
    monkeypatch.setattr(tree_attention, "MIN_FLEX_LENGTH", 1)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("length", [7, 12, 40])
def test_blocks_give_the_output_and_the_gradient_of_one_call(small_blocks, length, window):
    columns = tree(length)
    assert columns.shape == (2, 1, 2, length)
    weights = torch.randn(2, length, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for attention, mask in ((tree_sdpa, columns), (sdpa_attention_forward, dense_mask(columns, window))):
        tensors = inputs(length)
        options = {"sliding_window": window} if attention is tree_sdpa else {}
        output, no_weights = attention(Layer(), *tensors, mask, scaling=0.3, **options)
        assert output.is_contiguous()
        (output * weights).sum().backward()
        assert no_weights is None
        results.append([output.detach(), *(tensor.grad for tensor in tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_values_may_have_smaller_heads(small_blocks):
    columns = tree(12)
    results = []
    for attention, mask in ((tree_sdpa, columns), (sdpa_attention_forward, dense_mask(columns))):
        query, key, value = inputs(12)
        output, _ = attention(Layer(), query, key, value[..., :5], mask, scaling=0.3)
        assert output.shape == (2, 12, 4, 5)
        output.square().sum().backward()
        results.append([output.detach(), query.grad, key.grad, value.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_one_call(small_blocks, dtype):
    columns = tree(40)
    distances = []
    for attention, mask in ((tree_sdpa, columns), (sdpa_attention_forward, dense_mask(columns))):
        exact, coarse = inputs(40), [tensor.detach().to(dtype).requires_grad_() for tensor in inputs(40)]
        results = []
        for tensors, how, given in ((exact, tree_sdpa, columns), (coarse, attention, mask)):
            output, _ = how(Layer(), *tensors, given, scaling=0.3)
            output.square().sum().backward()
            results.append(torch.cat([output.flatten(), *(tensor.grad.flatten() for tensor in tensors)]).double())
        distances.append(float((results[0] - results[1]).norm() / results[0].norm()))
    assert distances[1] > 0
    assert distances[0] < 1.5 * distances[1]


def test_nothing_of_all_pairs_is_made():
    columns = tree(3000)
    query, key, value = (tensor.detach().float().requires_grad_() for tensor in inputs(3000))
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                each.numel()
                for each in (result if isinstance(result, tuple) else (result,))
                if isinstance(each, Tensor)
            )
            return result

    with Sizes():
        output, _ = tree_sdpa(Layer(), query, key, value, columns)
        output.sum().backward()
    assert max(sizes) == output.numel()


def test_the_blocks_of_a_mask_are_found_once_for_all_layers(monkeypatch):
    found = []
    monkeypatch.setattr(
        tree_attention, "tree_blocks", lambda *row: found.append(row[2]) or tree_blocks.tree_blocks(*row)
    )
    columns = tree(12)
    for window in (None, 4, None, 4):
        tree_sdpa(Layer(), *inputs(12), columns, sliding_window=window)
    # Two rows each.
    assert found == [None, None, Reach(4), Reach(4)]
    del columns
    tree_sdpa(Layer(), *inputs(12), tree(12))
    assert len(found) == 6


@pytest.mark.parametrize("attention", [tree_sdpa, tree_flex])
@pytest.mark.parametrize("case", ["no mask", "cache", "dense mask"])
def test_without_a_tree_it_is_sdpa(attention, case):
    query, key, value = inputs(9)
    mask = dense_mask(tree(9)) if case == "dense mask" else None
    if case == "cache":
        # One new token sees all nine.
        query, mask = query[:, :, -1:], torch.ones(2, 1, 1, 9, dtype=torch.bool)
    ours, _ = attention(Layer(), query, key, value, mask)
    theirs, _ = sdpa_attention_forward(Layer(), query, key, value, mask)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [None, 4])
def test_dropout_multiplies_every_pair(small_blocks, window):
    columns = tree(12)
    outputs = []
    for attention, mask in ((tree_sdpa, columns), (sdpa_attention_forward, dense_mask(columns, window))):
        torch.manual_seed(0)
        options = {"sliding_window": window} if attention is tree_sdpa else {}
        outputs.append(attention(Layer(), *inputs(12), mask, dropout=0.5, **options)[0])
    torch.testing.assert_close(*outputs)


def test_a_model_that_uses_it_still_generates_the_same():
    model = tiny_llama()
    input_ids = torch.arange(1, 9)[None]
    expected = model.generate(input_ids, max_new_tokens=5, do_sample=False)
    tree_attention.register_tree_attention()
    model.set_attn_implementation(TREE_SDPA)
    assert torch.equal(model.generate(input_ids, max_new_tokens=5, do_sample=False), expected)


def test_a_plan_with_trees_uses_it_and_any_other_does_not():
    with_trees, without = tiny_llama(), tiny_llama()
    assert plan(with_trees).layout == "tree"
    assert plan(without, requested="packed").layout == "packed"
    assert (with_trees.config._attn_implementation, without.config._attn_implementation) == (TREE_SDPA, "sdpa")


def test_a_model_that_is_refused_trees_keeps_its_attention():
    # The logprobs of a tree are made wrong: positions go on counting, whatever the layout says.
    model = tiny_llama()

    def forget_positions(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "position_ids" in kwargs and kwargs["position_ids"] is not None:
            kwargs["position_ids"] = torch.arange(kwargs["position_ids"].shape[1])[None]
        return args, kwargs

    model.model.register_forward_pre_hook(forget_positions, with_kwargs=True)
    assert plan(model).layout == "padded"
    assert model.config._attn_implementation == "sdpa"


def dense(mask: BlockMask, length: int) -> torch.Tensor:
    """Who attends to whom as the kernel reads it: full blocks without the function, needed ones with it, others not."""
    index = torch.arange(length)
    size = tree_attention.BLOCK_SIZE
    num_rows, _, num_blocks = mask.kv_num_blocks.shape
    seen = torch.zeros(num_rows, 1, length, length, dtype=torch.bool)
    for row in range(num_rows):
        allowed = mask.mask_mod(torch.tensor(row), torch.tensor(0), index[:, None], index[None, :])
        for block in range(num_blocks):
            queries = slice(block * size, (block + 1) * size)
            for number, indices, is_full in (
                (mask.kv_num_blocks, mask.kv_indices, False),
                (mask.full_kv_num_blocks, mask.full_kv_indices, True),
            ):
                for column in indices[row, 0, block, : number[row, 0, block]].tolist():
                    keys = slice(column * size, (column + 1) * size)
                    assert not seen[row, 0, queries, keys].any(), "a block is computed once"
                    seen[row, 0, queries, keys] = True if is_full else allowed[queries, keys]
    return seen


@pytest.mark.parametrize(
    ("layout", "implementation", "shares"),
    [("auto", "sdpa", True), ("tree", "eager", False), ("packed", "sdpa", False), ("padded", "sdpa", False)],
)
def test_groups_share_a_tree_where_attention_skips_what_nobody_sees(layout, implementation, shares):
    model = tiny_llama(implementation)
    assert PolicyScorer(model, plan(model, layout)).shares_between_groups is shares


def test_a_model_that_takes_no_mask_but_a_dense_one_multiplies_every_pair():
    model = tiny_llama()

    def refuse_columns(module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dtype == torch.int64 and mask.dim() == 4:
            raise TypeError("masks are boolean")

    model.model.register_forward_pre_hook(refuse_columns, with_kwargs=True)
    found = plan(model)
    assert (found.layout, model.config._attn_implementation) == ("tree", "sdpa")
    assert found.fallbacks == (
        "attention multiplies every pair of tokens of a tree: trl_atropos_blocks is not used, the model cannot take it "
        "(TypeError: masks are boolean)",
    )


def test_a_model_with_attention_of_its_own_multiplies_every_pair():
    model = tiny(FalconForCausalLM, FalconConfig)
    found = plan(model)
    assert (found.layout, model.config._attn_implementation) == ("tree", "sdpa")
    assert found.fallbacks == (
        "attention multiplies every pair of tokens of a tree: trl_atropos_blocks is not used, the model has attention of its own",
    )


class TestBlockMask:
    @pytest.mark.parametrize("window", [None, 1, 3, 4, 9])
    @pytest.mark.parametrize("length", [3, 4, 7, 8, 12, 13, 40, 41])
    def test_the_blocks_are_those_of_the_dense_mask(self, small_blocks, length, window):
        columns = tree(length)
        mask = tree_block_mask(*columns[:, 0].unbind(dim=1), None if window is None else Reach(window))
        assert mask.shape == (2, 1, length, length)
        assert torch.equal(dense(mask, length), dense_mask(columns, window))

    @pytest.mark.parametrize("chunk", [1, 3, 4, 9])
    @pytest.mark.parametrize("length", [3, 12, 41])
    def test_chunks_are_those_of_the_path(self, small_blocks, length, chunk):
        columns = tree(length)
        mask = tree_block_mask(*columns[:, 0].unbind(dim=1), Reach(chunk, is_chunk=True))
        number = columns[:, 0, 1] // chunk
        expected = dense_mask(columns) & (number[:, None, :, None] == number[:, None, None, :])
        assert torch.equal(dense(mask, length), expected)

    def test_blocks_that_nobody_attends_to_are_skipped(self, small_blocks):
        # A prompt of one block, and four continuations of one block each.
        prompt = torch.arange(4)
        layout = tree_layout([[torch.cat([prompt, torch.arange(100 * i, 100 * i + 4)]) for i in range(1, 5)]])
        mask = tree_block_mask(layout.subtree_end, layout.position_ids)
        assert mask.kv_num_blocks.squeeze().tolist() == [1, 1, 1, 1, 1]
        # Each continuation sees the prompt without a mask, and none of its sisters.
        assert mask.full_kv_num_blocks.squeeze().tolist() == [0, 1, 1, 1, 1]
        assert mask.full_kv_indices[0, 0, 1:, 0].tolist() == [0, 0, 0, 0]

    def test_blocks_behind_a_window_are_skipped(self, small_blocks):
        mask = tree_block_mask(torch.full((1, 40), 40), torch.arange(40)[None], Reach(8))
        # Of the blocks before it, the first token of a block sees the last one whole, and a part of the one before.
        assert mask.kv_num_blocks.squeeze().tolist() == [1, 1, *[2] * 8]
        assert mask.full_kv_num_blocks.squeeze().tolist() == [0, *[1] * 9]

    @pytest.mark.parametrize("window", [None, 4])
    @pytest.mark.parametrize("num_heads", [4, 6])
    def test_flex_attention_gives_the_output_of_sdpa(self, monkeypatch, small_blocks, num_heads, window):
        monkeypatch.setattr(tree_attention, "_compiled_flex_attention", lambda: flex_attention)
        columns = tree(13)
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(2, heads, 13, 16, generator=generator) for heads in (num_heads, 2, 2))
        layer = Layer()
        layer.num_key_value_groups = num_heads // 2
        expected, _ = sdpa_attention_forward(layer, query, key, value, dense_mask(columns, window), scaling=0.3)
        for shortest in (1, 14):
            monkeypatch.setattr(tree_attention, "MIN_FLEX_LENGTH", shortest)
            output, no_weights = tree_flex(layer, query, key, value, columns, scaling=0.3, sliding_window=window)
            assert no_weights is None
            torch.testing.assert_close(output, expected)

    def test_dropout_is_refused(self, small_blocks):
        states = torch.zeros(2, 4, 13, 16)
        with pytest.raises(ValueError, match=r"The attention dropout is 0\.1\. Flex attention has none"):
            tree_flex(Layer(), states, states[:, :2], states[:, :2], tree(13), dropout=0.1)

    def test_the_check_of_the_gradient_compares_two_ways(self, monkeypatch):
        # Flex attention has no backward on a CPU; the way with a dense mask stands in for it, once right and once wrong.
        def attend(query, key, value, block_mask, scale, enable_gqa, return_aux):
            mask = tree_attention_mask(block_mask.subtree_end)
            output, _ = sdpa_attention_forward(self.layer, query, key, value, mask, scaling=scale * self.factor)
            return output.transpose(1, 2)

        class Mask(BlockMask):
            def __init__(self, subtree_end, depth, reach):
                self.subtree_end = subtree_end

        self.layer = Layer()
        monkeypatch.setattr(tree_attention, "tree_block_mask", Mask)
        monkeypatch.setattr(tree_attention, "_compiled_flex_attention", lambda: attend)
        found = []
        for factor in (1.0, 1.1):
            self.factor = factor
            found.append(flex_gradient_difference(4, 2, 16, dtype=torch.float32, device=torch.device("cpu")))
        assert found[0] < 1e-5
        assert found[1] > 1e-2


class TestChoiceOnAGpu:
    """Which attention a tree gets there; what flex attention would compute is scripted."""

    def choose(
        self, monkeypatch, gradient: float | Exception = 0.0, logprobs: float = 0.0, max_length: int = 4096, **config
    ) -> tuple[str, list[str]]:
        def gradient_difference(*args, **kwargs):
            if isinstance(gradient, Exception):
                raise gradient
            return gradient

        monkeypatch.setattr(planning, "flex_gradient_difference", gradient_difference)
        model = tiny_llama(**config)
        comparison = planning._Comparison(model, model, max_length, torch.bfloat16, torch.device("cuda"))
        # The short sequences, which flex attention does not compute, are right.
        monkeypatch.setattr(
            planning._Comparison, "difference", lambda self, plan, length=0: logprobs if length > 1000 else 0.0
        )
        compared_with: dict[int, str] = {}
        monkeypatch.setattr(
            planning._Comparison,
            "run_alone",
            lambda self, length: compared_with.setdefault(length, model.config._attn_implementation),
        )
        assert comparison.refuses_tree(planning.ForwardPlan("tree", True), 1e-3) is None
        # Its own attention, in sequences of every length that is asked for.
        assert set(compared_with.values()) <= {"sdpa"}
        if model.config._attn_implementation == TREE_FLEX and max_length >= MIN_FLEX_LENGTH:
            assert max(compared_with) >= planning.FLEX_CHECK_LENGTH
        return model.config._attn_implementation, comparison.fallbacks

    def test_long_rows_skip_blocks(self, monkeypatch):
        assert self.choose(monkeypatch) == (TREE_FLEX, [])

    def test_short_rows_compile_nothing(self, monkeypatch):
        unused = AssertionError("compiled")
        assert self.choose(monkeypatch, unused, max_length=MIN_FLEX_LENGTH - 1) == ("sdpa", [])

    @pytest.mark.parametrize(
        ("found", "reason"),
        [
            ({"gradient": 0.5}, "its gradient differs from that of sdpa by 0.5 of its norm"),
            ({"gradient": math.nan}, "its gradient differs from that of sdpa by inf of its norm"),
            (
                {"gradient": RuntimeError("no C compiler\nsecond line")},
                "by inf of its norm (RuntimeError: no C compiler)",
            ),
            ({"logprobs": 0.5}, "it gives other logprobs on this model: mean difference 0.5 nats"),
            ({"attention_dropout": 0.1}, "it has no attention_dropout"),
        ],
    )
    def test_what_speaks_against_it_is_said(self, monkeypatch, found, reason):
        implementation, (fallback,) = self.choose(monkeypatch, **found)
        assert implementation == "sdpa"
        assert fallback.startswith("attention multiplies every pair of tokens of a tree")
        assert reason in fallback

    @pytest.mark.parametrize("max_length", [512, 4096])
    def test_windows_use_it_in_rows_of_every_length(self, monkeypatch, max_length):
        assert self.choose(monkeypatch, max_length=max_length, sliding_window=64) == (TREE_FLEX, [])
