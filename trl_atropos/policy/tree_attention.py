"""Scaled dot product attention that does not compute what no causal mask shows, for CPUs.

torch's CPU kernel multiplies every query with every key and then hides what the mask hides. A tree mask hides the upper
triangle like any causal mask; here blocks of queries see the keys up to their own last position only, as views, so that
nothing is copied and nothing more is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


TREE_SDPA = "trl_atropos_sdpa"
"""Name of the attention implementation; otherwise it is `sdpa`."""

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


def register_tree_attention() -> None:
    """Make [`tree_sdpa`] known to transformers under the name `TREE_SDPA`."""
    AttentionInterface.register(TREE_SDPA, tree_sdpa)
    AttentionMaskInterface.register(TREE_SDPA, sdpa_mask)
