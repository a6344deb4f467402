"""Attention by blocks of queries: the same output and gradient as one call, and where it is used."""

from __future__ import annotations

import pytest
import torch
from scoring_cases import plan, tiny_llama
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trl_atropos.policy import tree_attention
from trl_atropos.policy.layouts import tree_attention_mask, tree_layout
from trl_atropos.policy.tree_attention import TREE_SDPA, tree_sdpa


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


def tree_mask(length: int) -> torch.Tensor:
    """Of two rows: a prompt of a third of the row with two continuations, and a chain."""
    third = length // 3
    prompt = torch.arange(third)
    left, right = torch.arange(100, 100 + third), torch.arange(200, 200 + length - 2 * third)
    groups = [[torch.cat([prompt, left]), torch.cat([prompt, right])], [torch.arange(length)]]
    return tree_attention_mask(tree_layout(groups).subtree_end)


@pytest.mark.parametrize("length", [7, 12, 13])
@pytest.mark.parametrize("is_additive", [False, True])
def test_blocks_give_the_output_and_the_gradient_of_one_call(monkeypatch, length, is_additive):
    monkeypatch.setattr(tree_attention, "BLOCK_QUERIES", 4)
    mask = tree_mask(length)
    assert mask.shape == (2, 1, length, length)
    if is_additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    weights = torch.randn(2, length, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for attention in (tree_sdpa, sdpa_attention_forward):
        tensors = inputs(length)
        output, no_weights = attention(Layer(), *tensors, mask, scaling=0.3)
        (output * weights).sum().backward()
        assert no_weights is None
        results.append([output.detach(), *(tensor.grad for tensor in tensors)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_block_sees_no_key_behind_it(monkeypatch):
    monkeypatch.setattr(tree_attention, "BLOCK_QUERIES", 4)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append((query.shape[2], key.shape[2], value.shape[2]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    tree_sdpa(Layer(), *inputs(10), tree_mask(10))
    assert seen == [(4, 4, 4), (4, 8, 8), (2, 10, 10)]


@pytest.mark.parametrize("case", ["no mask", "cache"])
def test_without_a_mask_and_with_a_cache_it_is_sdpa(monkeypatch, case):
    monkeypatch.setattr(tree_attention, "BLOCK_QUERIES", 4)
    query, key, value = inputs(9)
    mask = None
    if case == "cache":
        # One new token sees all nine.
        query, mask = query[:, :, -1:], torch.ones(2, 1, 1, 9, dtype=torch.bool)
    ours, _ = tree_sdpa(Layer(), query, key, value, mask)
    theirs, _ = sdpa_attention_forward(Layer(), query, key, value, mask)
    torch.testing.assert_close(ours, theirs)


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
