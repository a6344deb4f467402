"""Ways to compute the attention of a micro-batch: those of the package, and a candidate for packed rows beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface

from trl_atropos.policy import scoring
from trl_atropos.policy.tree_attention import TREE_FLEX, register_tree_attention

from .bench import Bench


@dataclass(frozen=True)
class Variant:
    """A layout, an attention implementation, and how the model's inputs are made of a micro-batch.

    `precisions` are those that its kernel has; `is_timed` says whether training steps are worth timing, and `needs_cuda`
    that there is no backward pass on a CPU.
    """

    name: str
    layout: str
    implementation: str
    make_inputs: Callable[..., dict[str, Any]] = scoring.model_inputs
    is_timed: bool = True
    needs_cuda: bool = False
    precisions: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


@contextmanager
def using(variant: Variant, model: nn.Module) -> Iterator[None]:
    """Inside, the package's scorer runs the model in this way."""
    before = scoring.model_inputs
    model.set_attn_implementation(variant.implementation)
    scoring.model_inputs = variant.make_inputs
    try:
        yield
    finally:
        scoring.model_inputs = before


def varlen_inputs(batch: Mapping[str, Tensor], implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    position_ids = batch["position_ids"]
    starts = (position_ids[0] == 0).nonzero().squeeze(-1)
    bounds = F.pad(starts, (0, 1), value=position_ids.shape[1]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {
        "input_ids": batch["input_ids"],
        "position_ids": position_ids,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def varlen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    num_groups = module.num_key_value_groups
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    query, key, value = (states[0].transpose(0, 1).to(torch.bfloat16) for states in (query, key, value))
    bounds, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    output = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=kwargs.get("scaling"), window_size=(-1, 0)
    )
    return output[None], None


AttentionInterface.register("bench_varlen", varlen)
# What it needs comes with the inputs.
AttentionMaskInterface.register("bench_varlen", lambda *args, **kwargs: None)
register_tree_attention()


ALL_VARIANTS = (
    Variant("tree, sdpa", "tree", "sdpa"),
    Variant("tree, flex", "tree", TREE_FLEX, needs_cuda=True),
    # Every pair of tokens of the row: 2.0 s at 512/2048/8 on an H200, and minutes in all.
    Variant("packed, sdpa", "packed", "sdpa", is_timed=False),
    Variant(
        "packed, varlen of torch",
        "packed",
        "bench_varlen",
        varlen_inputs,
        needs_cuda=True,
        precisions=(torch.bfloat16,),
    ),
    Variant("padded, sdpa", "padded", "sdpa"),
)


def variants(bench: Bench) -> list[Variant]:
    """Those that this device has kernels for."""
    return [variant for variant in ALL_VARIANTS if bench.is_cuda or not variant.needs_cuda]
