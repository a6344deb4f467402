"""One forward pass over a micro-batch: laid out rollouts in, the scores of their trained tokens out.

Which layout a model can take, and whether its head may be called piece by piece, is found out once, at the start, by
scoring a few made-up sequences in every way and comparing with each sequence run alone.

Shape letters: R rows, L positions of a row, U scored positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested

from .layouts import tree_attention_mask
from .logprobs import (
    TokenScores,
    capture_hidden_states,
    score_hidden_states,
    score_inside,
    select_positions_before,
)
from .sequence_parallel import SequenceParallel
from .tree_attention import TREE_FLEX, TREE_SDPA, tree_block_mask, tree_columns
from .tree_states import branch_states


if TYPE_CHECKING:
    from transformers import PreTrainedModel


NEEDS_NO_PADDING_MASK = ("sdpa", TREE_SDPA, TREE_FLEX)
"""Attention implementations that run faster without the mask of padded rows. Others take the padding out with it."""


@dataclass(frozen=True)
class ForwardPlan:
    """How forward passes are made.

    `layout` is one of `layouts.LAYOUTS`. `projects_in_pieces` says whether the head is called piece by piece; if not, the
    model's forward makes the logits of all scored positions at once. `is_head_sharded` says whether the pieces are made
    inside of the model's forward, where a head whose weight is sharded is whole; else they are made outside. `fallbacks`
    say why a better way was not taken, one sentence each. `has_float32_head` says whether the head computes in float32
    also in mixed precision, for which it must be called outside of the model's forward. `branches_states` says that layers
    which carry a state from token to token run over trees piece by piece.
    """

    layout: str
    projects_in_pieces: bool
    fallbacks: tuple[str, ...] = ()
    has_float32_head: bool = False
    is_head_sharded: bool = False
    branches_states: bool = False


class PolicyScorer:
    """Scores tokens with one model, which is given unwrapped, with or without an adapter.

    `autocast` makes the context in which the head runs: the mixed precision that the wrapped model's forward has. With
    `sequence_parallel`, a model in training mode runs on this rank's piece of the sequence, and micro-batches have one
    row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: ForwardPlan,
        autocast: Callable[[], Any] = nullcontext,
        sequence_parallel: SequenceParallel | None = None,
    ):
        self.model = model
        self.plan = plan
        self.autocast = autocast
        self.sequence_parallel = sequence_parallel
        self._transform_logits = logits_transform(model.config.get_text_config())
        self._branches = branch_states(model) if plan.branches_states else None

    @property
    def shares_between_groups(self) -> bool:
        """Whether rollouts of different groups may share a tree: where attention skips what nobody sees, one row of all
        trees costs no more than a row for each, has no padding, and holds what groups share (a system prompt) once.
        """
        implementation = self.model.config.get_text_config()._attn_implementation
        # Those with states are not given rows with padding.
        is_one_row = self.plan.branches_states or implementation in (TREE_SDPA, TREE_FLEX)
        return self.plan.layout == "tree" and is_one_row

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[TokenScores, Tensor]:
        """Score a micro-batch with `model`, the one that accelerate, DDP, DeepSpeed or FSDP wrapped.

        The batch has `input_ids` and what else [`model_inputs`] needs; `prediction_index` (U,) int64, counted over all
        rows; `targets` (U,) int64; `temperature` (U,) float32; and `teacher_token_ids` (U, K) int64 if there is a
        teacher.

        Returns the scores of the U positions, and a zero of shape () that ties the model's own output to the loss, for
        the wrappers whose hooks wait for its gradient.
        """
        # DeepSpeed's attention leaves evaluation whole.
        if self.sequence_parallel is None or not self.model.training:
            implementation = self.model.config.get_text_config()._attn_implementation
            inputs = model_inputs(batch, implementation, next(self.model.parameters()).dtype)
            if self._branches is not None:
                self._branches.take(batch["subtree_end"], batch["position_ids"])
            if self.plan.layout == "packed" and takes_lengths(self.model):
                inputs |= packed_lengths(batch["position_ids"])
            return self._score(model, inputs, batch)
        inputs, piece, is_here = self.sequence_parallel.shard(batch)
        scores, no_loss = self._score(model, inputs, piece)
        return self.sequence_parallel.join(scores, is_here), no_loss

    def _score(
        self, model: nn.Module, inputs: Mapping[str, Any], batch: Mapping[str, Tensor]
    ) -> tuple[TokenScores, Tensor]:
        head = self.model.get_output_embeddings()
        if not self.plan.projects_in_pieces:
            with select_positions_before(head, batch["prediction_index"]):
                logits = model(**inputs, use_cache=False).logits
            # They are there already: to make them again would need the model's forward.
            scores = self._score_rows(lambda rows: rows, logits.squeeze(0), batch, max_logits=max(logits.numel(), 1))
            return scores, logits.new_zeros(())
        if self.plan.is_head_sharded:
            return self._score_inside(head, model, inputs, batch)
        with capture_hidden_states(head) as captured:
            output = model(**inputs, use_cache=False).logits
        assert captured.value is not None, "the context raises if the head was not called"
        hidden_states = captured.value.flatten(0, 1)[batch["prediction_index"]]
        if self.plan.has_float32_head:
            hidden_states = hidden_states.float()
        with nullcontext() if self.plan.has_float32_head else self.autocast():
            scores = self._score_rows(lambda hidden: self._transform_logits(head(hidden)), hidden_states, batch)
        return scores, output.sum()

    def _score_inside(
        self, head: nn.Module, model: nn.Module, inputs: Mapping[str, Any], batch: Mapping[str, Tensor]
    ) -> tuple[TokenScores, Tensor]:
        found: list[TokenScores] = []

        def score(project: Callable[[Tensor], Tensor], hidden_states: Tensor) -> None:
            rows = hidden_states[batch["prediction_index"]]
            found.append(self._score_rows(lambda hidden: self._transform_logits(project(hidden)), rows, batch))

        with score_inside(head, score):
            output = model(**inputs, use_cache=False).logits
        (scores,) = found
        return scores, output.sum()

    def _score_rows(
        self,
        project: Callable[[Tensor], Tensor],
        rows: Tensor,
        batch: Mapping[str, Tensor],
        max_logits: int | None = None,
    ) -> TokenScores:
        return score_hidden_states(
            project,
            rows,
            batch["targets"],
            batch["temperature"],
            vocab_size=self.model.config.get_text_config().vocab_size,
            teacher_token_ids=batch.get("teacher_token_ids"),
            max_logits=max_logits,
        )


def model_inputs(batch: Mapping[str, Tensor], implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the model's forward for a layout.

    The batch has `input_ids` (R, L); for `padded` also `attention_mask` (R, L); for `packed` also `position_ids` (R,
    L); for `tree` also `position_ids` and `subtree_end` (R, L). `implementation` is the model's attention
    implementation, and `dtype` that of the additive mask which `eager` wants.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if "attention_mask" in batch:
        # The padding is on the right, where no causal attention sees it: the kernels without a mask are faster.
        return (
            inputs
            if implementation in NEEDS_NO_PADDING_MASK
            else {**inputs, "attention_mask": batch["attention_mask"]}
        )
    inputs["position_ids"] = batch["position_ids"]
    subtree_end = batch.get("subtree_end")
    if subtree_end is None:
        return inputs
    if implementation in (TREE_SDPA, TREE_FLEX):
        return {**inputs, "attention_mask": tree_columns(subtree_end, batch["position_ids"])}
    if implementation == "flex_attention":
        return {**inputs, "attention_mask": tree_block_mask(subtree_end, batch["position_ids"])}
    mask = tree_attention_mask(subtree_end)
    if implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return {**inputs, "attention_mask": mask}


def takes_lengths(model: Any) -> bool:
    """Whether the forward of a model, with or without an adapter, hands the lengths of packed rows to FlashAttention."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    parameters = inspect.signature(base.forward).parameters.values()
    return is_flash_attention_requested(base.config.get_text_config()) and any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters
    )


def packed_lengths(position_ids: Tensor) -> dict[str, Any]:
    """Where the sequences of a packed row begin, and the length of the longest one, by the names of FlashAttention.

    Without them every layer finds them again in `position_ids` (1, L), for which the device is waited for each time.
    """
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids)
    length = int(longest)
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": length, "max_length_k": length}


def logits_transform(config: Any) -> Callable[[Tensor], Tensor]:
    """What a model does to the output of its head: scaling, then soft-capping. Unknown ways fail the check at start."""
    scale = 1.0
    # Cohere; Falcon-H1; Granite and MiniCPM3 divide.
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def transform(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform
