"""Attention over trees that does not compute what the mask hides.

torch's `sdpa` multiplies every query with every key under any mask but a causal one, and then hides what the mask hides.

- On a CPU (`tree_sdpa`), blocks of queries see the keys up to their own last position only, as views: the upper triangle
  is skipped, nothing is copied and nothing more is kept for the backward pass.
- On a GPU (`tree_flex`), flex attention skips every block of 128 x 128 in which no token attends to another: what
  remains is about what each path of the tree costs alone. Which blocks these are follows from one number a token
  (`subtree_end`), and nothing of L x L is ever made. Flex attention: https://arxiv.org/abs/2412.05496
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .layouts import tree_attention_mask


TREE_SDPA = "trl_atropos_sdpa"
TREE_FLEX = "trl_atropos_flex"
"""Names of the attention implementations; otherwise they are `sdpa`."""

BLOCK_SIZE = 128
"""Queries and keys of a block that flex attention skips or computes: the size that its kernels are made for."""

MIN_FLEX_LENGTH = 1024
"""Shortest row in tokens for which blocks are skipped on a GPU. Below, a dense mask is as fast, and compiles nothing."""

BLOCK_QUERIES = 256
"""Smaller blocks skip more of the triangle, larger ones keep both cores busy: the fastest of 64, 128, 256 and all."""


def tree_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer with a mask in which no query sees a later key.

    `query` is (R, heads, L, D), `key` and `value` are (R, key-value heads, L, D), with rotary embeddings applied.
    `attention_mask` (R, 1, L, L), bool or floating, is that of [`~policy.layouts.tree_attention_mask`] or any causal
    mask; if it is None, and with a key-value cache, this is `sdpa`. The other arguments are those of `sdpa`.

    Returns the output (R, L, heads, D), and no weights.
    """
    length = query.shape[2]
    if attention_mask is None or key.shape[2] != length or length <= BLOCK_QUERIES:
        output: Tensor
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    num_groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    blocks = []
    for start in range(0, length, BLOCK_QUERIES):
        end = min(start + BLOCK_QUERIES, length)
        blocks.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, :end],
                value[:, :, :end],
                attn_mask=attention_mask[:, :, start:end, :end],
                dropout_p=dropout,
                scale=scaling,
            )
        )
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


def tree_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer with the blocks of a tree, on a GPU; with a dense mask or none, this is `sdpa`.

    Shapes are those of [`tree_sdpa`]; `attention_mask` is that of [`tree_block_mask`]. What the rotary embedding or a
    norm has left in float32 under autocast is cast to the dtype of the values, as autocast does for `sdpa`.

    Raises:
        ValueError: `dropout` is not 0, which flex attention does not have.
    """
    if not isinstance(attention_mask, BlockMask):
        output: Tensor
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    if dropout:
        raise ValueError(
            f"The attention dropout is {dropout}. Flex attention has none. Set attention_dropout 0 in the model's "
            "configuration, or --sequence_layout padded."
        )
    num_heads, num_groups = query.shape[1], getattr(module, "num_key_value_groups", 1)
    # Other numbers of heads than powers of two are not taken in groups.
    if num_heads & (num_heads - 1):
        key, value, num_groups = repeat_kv(key, num_groups), repeat_kv(value, num_groups), 1
    output = _compiled_flex_attention()(
        query.to(value.dtype),
        key.to(value.dtype),
        value,
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=num_groups > 1,
    )
    return output.transpose(1, 2).contiguous(), None


def tree_block_mask(subtree_end: Tensor) -> BlockMask:
    """Which blocks of queries and keys attend to each other in a tree layout with the `subtree_end` (R, L) int64.

    The mask is that of [`~policy.layouts.tree_attention_mask`], without ever being made. Before the diagonal, a block
    of keys is needed if the subtree of any of its tokens reaches into the block of queries, and needs no mask if those
    of all of its tokens reach to the end of it.
    """
    num_rows, length = subtree_end.shape
    num_blocks = -(-length // BLOCK_SIZE)
    # Nobody attends to what is behind the row.
    subtree_end = F.pad(subtree_end, (0, num_blocks * BLOCK_SIZE - length))
    ends = subtree_end.view(num_rows, 1, num_blocks, BLOCK_SIZE)
    block = torch.arange(num_blocks, device=subtree_end.device)
    query_start = block[:, None] * BLOCK_SIZE
    is_before = block[None, :] < block[:, None]
    is_needed = (block[None, :] == block[:, None]) | (is_before & (ends.amax(dim=-1)[..., None, :] > query_start))
    is_full = is_before & (ends.amin(dim=-1)[..., None, :] >= (query_start + BLOCK_SIZE).clamp(max=length))

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[row, key])

    return BlockMask.from_kv_blocks(
        *_number_and_indices(is_needed & ~is_full),
        *_number_and_indices(is_full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=attends,
        seq_lengths=(length, length),
    )


class _Layer(nn.Module):
    """What the attention functions read of a layer."""

    is_causal = True

    def __init__(self, num_key_value_groups: int):
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def flex_gradient_difference(
    num_heads: int, num_key_value_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
) -> float:
    """How far the gradients of [`tree_flex`] are from those of `sdpa`, in units of their norm, on a made-up tree of
    `MIN_FLEX_LENGTH` + 1 tokens: a prompt of a third with two continuations.

    Compiles both passes, which takes seconds.

    Raises:
        RuntimeError: if they cannot be compiled.
    """
    length = MIN_FLEX_LENGTH + 1
    index = torch.arange(length, device=device)
    third = length // 3
    subtree_end = torch.where((index >= third) & (index < 2 * third), 2 * third, torch.full_like(index, length))[None]
    generator = torch.Generator(device).manual_seed(0)

    def states(heads: int) -> Tensor:
        return torch.randn(1, heads, length, head_dim, dtype=dtype, device=device, generator=generator)

    given = (states(num_heads), states(num_key_value_heads), states(num_key_value_heads))
    weights = states(num_heads).transpose(1, 2)
    layer = _Layer(num_heads // num_key_value_heads)
    gradients = []
    for mask in (tree_block_mask(subtree_end), tree_attention_mask(subtree_end)):
        query, key, value = (tensor.clone().requires_grad_() for tensor in given)
        with torch.enable_grad():
            output, _ = tree_flex(layer, query, key, value, mask, scaling=head_dim**-0.5)
            gradient = torch.autograd.grad((output * weights).sum(), (query, key, value))
        gradients.append(torch.cat([part.float().flatten() for part in gradient]))
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def _number_and_indices(is_chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of (R, 1, blocks, blocks) bool: how many are chosen in each row of blocks, and the columns, chosen ones first."""
    number = is_chosen.sum(dim=-1, dtype=torch.int32)
    return number, is_chosen.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32)


@cache
def _compiled_flex_attention() -> Any:
    # Without a compiler it would make all pairs.
    return torch.compile(flex_attention)


def register_tree_attention() -> None:
    """Make [`tree_sdpa`] and [`tree_flex`] known to transformers under the names `TREE_SDPA` and `TREE_FLEX`."""
    for name, function in ((TREE_SDPA, tree_sdpa), (TREE_FLEX, tree_flex)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)
