"""Attention over trees that does not compute what the mask hides.

torch's `sdpa` multiplies every query with every key under any mask but a causal one, and then hides what the mask hides.

- On a CPU (`tree_sdpa`), blocks of queries see the keys on their paths only (`tree_blocks`), which is never more than
  each sequence alone takes, and nothing of L x L is made.
- On a GPU (`tree_flex`), flex attention skips every block of 128 x 128 in which no token attends to another: what
  remains is about what each path of the tree costs alone. Which blocks these are follows from two numbers a token
  (`subtree_end` and depth), and nothing of L x L is ever made. Flex attention: https://arxiv.org/abs/2412.05496

Windows and chunks of layers are those of the path of a token, and so are the positions by which Llama 4 scales its queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .layouts import tree_attention_mask
from .recompute import unwatched
from .tree_blocks import Positions, Reach, TreeBlock, tree_blocks


TREE_SDPA = "trl_atropos_blocks"
TREE_FLEX = "trl_atropos_flex"
"""Names of the attention implementations; otherwise they are `sdpa`."""

BLOCK_SIZE = 128
"""Queries and keys of a block that flex attention skips or computes: the size that its kernels are made for."""

MIN_FLEX_LENGTH = 1024
"""Shortest row in tokens for which blocks are skipped on a GPU. Below, a dense mask is as fast, and compiles nothing."""

Made = TypeVar("Made")


def tree_columns(subtree_end: Tensor, position_ids: Tensor) -> Tensor:
    """What [`tree_sdpa`] and [`tree_flex`] need to know of a tree layout, in the form of an attention mask.

    Both are (R, L) int64, of a [`~policy.layouts.Layout`]. Returns (R, 1, 2, L) int64: with four dimensions, models hand
    it to their layers as it is.
    """
    return torch.stack([subtree_end, position_ids], dim=1)[:, None]


def tree_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over trees, on a CPU; with another mask or none, this is `sdpa`.

    `query` is (R, heads, L, D), `key` and `value` are (R, key-value heads, L, D), with rotary embeddings applied; heads of
    `value` may be smaller. `attention_mask` is that of [`tree_columns`]. A layer with a window names it in
    `sliding_window`: a token attends to itself and to the `sliding_window - 1` tokens before it on its path. One whose type
    in the config is `chunked_attention` has chunks of `attention_chunk_size` tokens. `s_aux`, (heads,), are the logits of attention
    sinks, which take a part of the probability and give nothing. The other arguments are those of `sdpa`. With a `dropout` above 0, every pair of tokens is multiplied. What the rotary embedding
    or a norm has left in float32 under autocast is cast to the dtype of the values, as autocast does for `sdpa`.

    Returns the output (R, L, heads, D), and no weights.
    """
    if _is_tree(attention_mask) and not dropout:
        query, key = scaled_by_depth(module, query, attention_mask).to(value.dtype), key.to(value.dtype)
        reach = _reach(module, sliding_window)
        # The kernel wants heads of one size; what zeros add is cut off again.
        num_missing = max(query.shape[-1] - value.shape[-1], 0)
        output = _attend(query, key, F.pad(value, (0, num_missing)), attention_mask, reach, scaling, s_aux)
        return output[..., : output.shape[-1] - num_missing].contiguous(), None
    options = {"sliding_window": sliding_window, "s_aux": s_aux, **kwargs}
    return _all_pairs(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)


def tree_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over trees, on a GPU; in rows below `MIN_FLEX_LENGTH`, every pair of tokens is multiplied.

    The arguments and the output are those of [`tree_sdpa`].

    Raises:
        ValueError: `dropout` is not 0, which flex attention does not have.
    """
    if not _is_tree(attention_mask) or query.shape[2] < MIN_FLEX_LENGTH:
        options = {"sliding_window": sliding_window, "s_aux": s_aux, **kwargs}
        return _all_pairs(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    if dropout:
        raise ValueError(
            f"The attention dropout is {dropout}. Flex attention has none. Set attention_dropout 0 in the model's "
            "configuration, or --sequence_layout padded."
        )
    num_heads, num_groups = query.shape[1], getattr(module, "num_key_value_groups", 1)
    # Other numbers of heads than powers of two are not taken in groups.
    if num_heads & (num_heads - 1):
        key, value, num_groups = repeat_kv(key, num_groups), repeat_kv(value, num_groups), 1
    query, key = scaled_by_depth(module, query, attention_mask).to(value.dtype), key.to(value.dtype)
    block_mask = _known(attention_mask, _reach(module, sliding_window), tree_block_mask)
    # The compiler would trace who watches the operations of a layer (policy/recompute.py) into its graph, and break it.
    with unwatched():
        output = _compiled_flex_attention()(
            query,
            key,
            value,
            block_mask=block_mask,
            scale=scaling,
            enable_gqa=num_groups > 1,
            return_aux=None if s_aux is None else AuxRequest(lse=True),
        )
    if s_aux is not None:
        output, sums = output
        # What the sinks leave of the probability.
        output = output * torch.sigmoid(sums.lse - s_aux.view(1, -1, 1))[..., None].to(output.dtype)
    return output.transpose(1, 2).contiguous(), None


def _is_tree(attention_mask: Tensor | None) -> TypeGuard[Tensor]:
    return attention_mask is not None and attention_mask.dim() == 4 and attention_mask.dtype == torch.int64


def _all_pairs(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that multiplies every pair of tokens, of a tree too: `sdpa`, which has no sinks, or the same with them."""
    if _is_tree(attention_mask):
        query = scaled_by_depth(module, query, attention_mask)
        attention_mask = _known(attention_mask, _reach(module, kwargs.get("sliding_window")), _dense_mask)
    if s_aux is None:
        output: Tensor
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
        return output, None
    length = query.shape[2]
    sees = attention_mask
    if sees is None:
        sees = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    num_groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (query.to(value.dtype) @ key.to(value.dtype).transpose(2, 3) * scale).float()
    sinks = s_aux.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    logits = torch.cat([logits.masked_fill(~sees, torch.finfo(logits.dtype).min), sinks], dim=-1)
    weights = F.dropout(logits.softmax(dim=-1)[..., :-1], dropout).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def scaled_by_depth(module: Any, query: Tensor, columns: Tensor) -> Tensor:
    """Queries (R, heads, L, D) of a layer of Llama 4 without rotary embeddings, scaled by their depth.

    Such a layer multiplies its queries by a number that grows every `floor_scale` tokens, counted in the row
    (https://arxiv.org/abs/2501.19399). In a row of a tree they are counted on the path. Queries of other layers are
    returned as they are. `columns` is that of [`tree_columns`].
    """
    step = getattr(module, "floor_scale", None)
    if step is None or query.shape[2] < step or module.use_rope or not module.attn_temperature_tuning:
        return query
    depth = columns[:, 0, 1]
    positions = torch.stack([depth, torch.arange(query.shape[2], device=query.device).expand_as(depth)])
    of_depth, of_row = torch.log1p(torch.floor((positions + 1.0) / step)) * module.attn_scale + 1.0
    scaled: Tensor = query * (of_depth / of_row)[:, None, :, None]
    return scaled.to(query.dtype)


def _reach(module: Any, sliding_window: int | None) -> Reach | None:
    """How far back on a path a layer sees, which says its window itself; None if to its start."""
    layer, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if config is not None and types is not None and layer is not None and types[layer] == "chunked_attention":
        return Reach(config.attention_chunk_size, is_chunk=True)
    return None if sliding_window is None else Reach(sliding_window)


def _dense_mask(subtree_end: Tensor, depth: Tensor, reach: Reach | None) -> Tensor:
    """Who attends to whom, (R, 1, L, L) bool; the arguments are those of [`tree_block_mask`]."""
    mask = tree_attention_mask(subtree_end)
    if reach is not None:
        mask &= depth[:, None, None, :] >= reach.first_depth(depth)[:, None, :, None]
    return mask


def _blocks(subtree_end: Tensor, depth: Tensor, reach: Reach | None) -> list[list[TreeBlock]]:
    return [tree_blocks(*row, reach) for row in zip(subtree_end, depth, strict=True)]


_made: Any = WeakIdKeyDictionary()
"""What was made of each mask of a tree that still exists, by reach: all layers of a forward pass share the mask."""


# A compiled model calls it as it is: what there is already, and which blocks there are, is no matter of its graph.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _known(columns: Tensor, reach: Reach | None, make: Callable[[Tensor, Tensor, Reach | None], Made]) -> Made:
    """What `make` makes of `subtree_end` (R, L), depth (R, L) and a reach: for the first of the layers that need it."""
    of_mask: dict[Any, Made] = _made.setdefault(columns, {})
    if (make, reach) not in of_mask:
        subtree_end, depth = columns[:, 0].unbind(dim=1)
        of_mask[make, reach] = make(subtree_end, depth, reach)
    return of_mask[make, reach]


# A compiled model calls it as it is: which blocks there are depends on the data.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    columns: Tensor,
    reach: Reach | None,
    scaling: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Output (R, L, heads, D) of attention over the blocks of every row."""
    output: Tensor = _BlockAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, _known(columns, reach, _blocks), scaling, sinks
    )
    return output.transpose(1, 2)


class _BlockAttention(torch.autograd.Function):
    """Attention over blocks: the keys that all queries of a block see without a mask, the others with one.

    Softmax over the two kinds of keys together is that over each, weighted by their sums of exponentials, which torch's
    kernel returns as logarithms; its backward pass takes the output and the sum of both. FlashAttention, section 3.1:
    https://arxiv.org/abs/2205.14135

    A sink is one more key for every query of its head, with a logit of its own and a value of zeros: it adds to the sum, and
    its gradient is that of a logit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Sequence[Sequence[TreeBlock]],
        scaling: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        num_rows, num_heads, length, _ = query.shape
        # As the layers want it: positions before heads.
        output = query.new_empty(num_rows, length, num_heads, value.shape[-1]).transpose(1, 2)
        log_sum = torch.empty(num_rows, num_heads, length, dtype=_accurate(query.dtype))
        for row, block in _of_all_rows(blocks):
            queries = query[row, :, block.queries]
            result, result_sum = _kernel(queries, key[row], value[row], block.others, block, scaling)
            if block.common is not None:
                common, common_sum = _kernel(queries, key[row], value[row], block.common, None, scaling)
                both = torch.logaddexp(result_sum, common_sum)
                result = result * (result_sum - both).exp()[..., None] + common * (common_sum - both).exp()[..., None]
                result_sum = both
            output[row, :, block.queries] = result
            log_sum[row, :, block.queries] = result_sum
        if sinks is not None:
            with_sinks = torch.logaddexp(log_sum, sinks.to(log_sum.dtype)[:, None])
            output *= (log_sum - with_sinks).exp()[..., None]
            log_sum = with_sinks
        ctx.save_for_backward(query, key, value, output, log_sum, sinks)
        ctx.blocks, ctx.scaling = blocks, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum, sinks = ctx.saved_tensors
        # A query has gradients of two kinds of keys, a key those of all blocks that see it: they are added up.
        to_query, to_key, to_value = (torch.zeros(of.shape, dtype=_accurate(of.dtype)) for of in (query, key, value))
        for row, block in _of_all_rows(ctx.blocks):
            of_queries = [each[row, :, block.queries] for each in (gradients[0], query, output, log_sum)]
            for keys, masked in ((block.others, block), (block.common, None)):
                if keys is None:
                    continue
                parts = _kernel_backward(of_queries, key[row], value[row], keys, masked, ctx.scaling)
                for to, positions, part in zip(
                    (to_query, to_key, to_value), (block.queries, keys, keys), parts, strict=True
                ):
                    _add_at(to[row], positions, part)
        to_sinks = None
        if sinks is not None:
            probability = (sinks.to(log_sum.dtype)[:, None] - log_sum).exp()
            of_output = (gradients[0].to(log_sum.dtype) * output).sum(dim=-1)
            to_sinks = -(probability * of_output).sum(dim=(0, 2)).to(sinks.dtype)
        return to_query.to(query.dtype), to_key.to(key.dtype), to_value.to(value.dtype), None, None, to_sinks


def _of_all_rows(blocks: Sequence[Sequence[TreeBlock]]) -> list[tuple[slice, TreeBlock]]:
    return [(slice(row, row + 1), block) for row, of_row in enumerate(blocks) for block in of_row]


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, keys: Positions, masked: TreeBlock | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Output (1, heads, Q, D) and logarithms of the sums of exponentials (1, heads, Q) of attention to some keys.

    `masked` is the block whose mask hides some of them, or None.
    """
    result: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, _take(key, keys), _take(value, keys), 0.0, **_mask_options(masked, query.dtype), scale=scaling
    )
    return result


def _kernel_backward(
    of_queries: Sequence[Tensor],
    key: Tensor,
    value: Tensor,
    keys: Positions,
    masked: TreeBlock | None,
    scaling: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries and of some keys and values; `of_queries` are gradient, query, output and sum."""
    gradient, query, output, log_sum = of_queries
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient,
        query,
        _take(key, keys),
        _take(value, keys),
        output,
        log_sum,
        0.0,
        **_mask_options(masked, query.dtype),
        scale=scaling,
    )
    return result


def _mask_options(masked: TreeBlock | None, dtype: torch.dtype) -> dict[str, Any]:
    if masked is None:
        return {"is_causal": False, "attn_mask": None}
    return {"is_causal": masked.mask is None, "attn_mask": None if masked.mask is None else masked.mask.to(dtype)}


def _take(values: Tensor, positions: Positions) -> Tensor:
    """The positions of values (1, heads, L, D)."""
    return values[:, :, positions] if isinstance(positions, slice) else values.index_select(2, positions)


def _add_at(values: Tensor, positions: Positions, added: Tensor) -> None:
    """Add to the positions of values (1, heads, L, D), in place."""
    if isinstance(positions, slice):
        values[:, :, positions] += added
    else:
        values.index_add_(2, positions, added.to(values.dtype))


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tree_block_mask(subtree_end: Tensor, depth: Tensor, reach: Reach | None = None) -> BlockMask:
    """Which blocks of queries and keys attend to each other in a tree layout.

    `subtree_end` and `depth` (`position_ids`) are (R, L) int64, of a [`~policy.layouts.Layout`]; without a `reach`, a
    token attends to its whole path. The mask is that of [`~policy.layouts.tree_attention_mask`], without ever being made. Before
    the diagonal, a block of keys is needed if the subtree of any of its tokens reaches into the block of queries, and
    needs no mask if those of all of its tokens reach to the end of it; the `reach` of the shallowest query must go back to
    the deepest of them, or that of the deepest query to the shallowest.
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

    if reach is not None:
        shallowest, deepest = _extremes(depth, num_blocks)
        is_needed &= deepest[:, None, None, :] >= reach.first_depth(shallowest)[:, None, :, None]
        is_full &= shallowest[:, None, None, :] >= reach.first_depth(deepest)[:, None, :, None]
        depth = F.pad(depth, (0, num_blocks * BLOCK_SIZE - length))

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sees = (key <= query) & (query < subtree_end[row, key])
        return sees if reach is None else sees & (depth[row, key] >= reach.first_depth(depth[row, query]))

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
    depth = torch.where(index < 2 * third, index, index - third)[None]
    generator = torch.Generator(device).manual_seed(0)

    def states(heads: int) -> Tensor:
        return torch.randn(1, heads, length, head_dim, dtype=dtype, device=device, generator=generator)

    given = (states(num_heads), states(num_key_value_heads), states(num_key_value_heads))
    weights = states(num_heads).transpose(1, 2)
    layer = _Layer(num_heads // num_key_value_heads)
    gradients = []
    columns = tree_columns(subtree_end, depth)
    for attention in (tree_flex, _all_pairs):
        query, key, value = (tensor.clone().requires_grad_() for tensor in given)
        with torch.enable_grad():
            output, _ = attention(layer, query, key, value, columns, 0.0, head_dim**-0.5, None)
            gradient = torch.autograd.grad((output * weights).sum(), (query, key, value))
        gradients.append(torch.cat([part.float().flatten() for part in gradient]))
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def _extremes(depth: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest depth in each block of a row, (R, blocks) int64 both, of depths (R, L)."""
    missing = num_blocks * BLOCK_SIZE - depth.shape[1]
    # The last depth once more changes neither.
    blocks = torch.cat([depth, depth[:, -1:].expand(-1, missing)], dim=1).view(-1, num_blocks, BLOCK_SIZE)
    return blocks.amin(dim=-1), blocks.amax(dim=-1)


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
