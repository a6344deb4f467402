"""One forward pass over a micro-batch: laid out rollouts in, the scores of their trained tokens out.

Which layout a model can take, and whether its head may be called piece by piece, is found out once, at the start, by
scoring a few made-up sequences in every way and comparing with each sequence run alone.

Shape letters: R rows, L positions of a row, U scored positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..distributed import largest_over_ranks
from ..errors import PreflightError
from .layouts import lay_out, layout_inputs, tree_attention_mask
from .logprobs import (
    TokenScores,
    capture_hidden_states,
    evaluating,
    score_hidden_states,
    select_positions_before,
)
from .sequence_parallel import SequenceParallel
from .tree_attention import TREE_SDPA, register_tree_attention


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

TREE_IMPLEMENTATIONS = ("sdpa", TREE_SDPA, "eager", "flex_attention")
"""Attention implementations that take an arbitrary mask."""

CHECK_LENGTH = 24
"""Longest made-up sequence in tokens: long enough to fork twice."""

CHECK_TOLERANCE = 1e-4
PADDED_TOLERANCE_EPS = 40.0
"""Accepted mean |logprob difference| in nats of padded rows: the larger of both, the second in units of the arithmetic's
epsilon. Rounding in bfloat16 alone makes up to about 10 of them."""

LAYOUT_TOLERANCE_RATIO = 4.0
"""Accepted difference of another layout, in units of that of padded rows: both are sums in another order. In bfloat16 a
trained model shows a ratio of 1.5, one whose recurrent layers run on from a sequence into the next 70 and more."""

WINDOW_NAMES = ("sliding_window", "window_size")
"""What configs call the number of tokens that a token attends to."""

MODEL_ERRORS = (ValueError, RuntimeError, TypeError, IndexError)
"""What models raise when they cannot take a layout."""


@dataclass(frozen=True)
class ForwardPlan:
    """How forward passes are made.

    Args:
        layout (`str`):
            One of `layouts.LAYOUTS`.
        projects_in_pieces (`bool`):
            Whether the head is called outside of the model's forward, piece by piece. If not, the model's forward makes
            the logits of all scored positions at once.
        fallbacks (`tuple[str, ...]`):
            Why a better way was not taken, one sentence each.
    """

    layout: str
    projects_in_pieces: bool
    fallbacks: tuple[str, ...] = ()


class PolicyScorer:
    """Scores tokens with one model.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unwrapped model.
        plan ([`ForwardPlan`]):
            How.
        autocast (`Callable`, *optional*):
            Makes the context in which the head runs: the mixed precision that the wrapped model's forward has.
        sequence_parallel ([`~policy.sequence_parallel.SequenceParallel`], *optional*):
            With it, a model in training mode runs on this rank's piece of the sequence, and micro-batches have one row.
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

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[TokenScores, Tensor]:
        """Score a micro-batch.

        Args:
            model (`nn.Module`):
                The model as accelerate, DDP, DeepSpeed or FSDP wrapped it.
            batch (`Mapping[str, torch.Tensor]`):
                `input_ids` and what else [`model_inputs`] needs; `prediction_index` (U,) int64, counted over all rows;
                `targets` (U,) int64; `temperature` (U,) float32; `teacher_token_ids` (U, K) int64 if there is a teacher.

        Returns:
            `tuple[TokenScores, torch.Tensor]`: of the U positions; and a zero of shape `()` that ties the model's own
            output to the loss, for the wrappers whose hooks wait for its gradient.
        """
        # DeepSpeed's attention leaves evaluation whole.
        if self.sequence_parallel is None or not self.model.training:
            implementation = self.model.config.get_text_config()._attn_implementation
            return self._score(model, model_inputs(batch, implementation, next(self.model.parameters()).dtype), batch)
        inputs, piece, is_here = self.sequence_parallel.shard(batch)
        scores, no_loss = self._score(model, inputs, piece)
        return self.sequence_parallel.join(scores, is_here), no_loss

    def _score(
        self, model: nn.Module, inputs: Mapping[str, Any], batch: Mapping[str, Tensor]
    ) -> tuple[TokenScores, Tensor]:
        head = self.model.get_output_embeddings()
        index, targets, temperature = batch["prediction_index"], batch["targets"], batch["temperature"]
        teacher_token_ids = batch.get("teacher_token_ids")
        vocab_size = self.model.config.get_text_config().vocab_size
        if not self.plan.projects_in_pieces:
            with select_positions_before(head, index):
                logits = model(**inputs, use_cache=False).logits
            scores = score_hidden_states(
                lambda rows: rows,
                logits.squeeze(0),
                targets,
                temperature,
                vocab_size=vocab_size,
                teacher_token_ids=teacher_token_ids,
                # They are there already: to make them again would need the model's forward.
                max_logits=max(logits.numel(), 1),
            )
            return scores, logits.new_zeros(())
        with capture_hidden_states(head) as captured:
            output = model(**inputs, use_cache=False).logits
        assert captured.value is not None, "the context raises if the head was not called"
        with self.autocast():
            scores = score_hidden_states(
                lambda hidden: self._transform_logits(head(hidden)),
                captured.value.flatten(0, 1)[index],
                targets,
                temperature,
                vocab_size=vocab_size,
                teacher_token_ids=teacher_token_ids,
            )
        return scores, output.sum()


def model_inputs(batch: Mapping[str, Tensor], implementation: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the model's forward for a layout.

    Args:
        batch (`Mapping[str, torch.Tensor]`):
            `input_ids` (R, L); for `padded` with `attention_mask` (R, L); for `packed` with `position_ids` (R, L); for
            `tree` with `position_ids` and `subtree_end` (R, L).
        implementation (`str`):
            The model's attention implementation.
        dtype (`torch.dtype`):
            Of the additive mask that `eager` wants.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if "attention_mask" in batch:
        return {**inputs, "attention_mask": batch["attention_mask"]}
    inputs["position_ids"] = batch["position_ids"]
    subtree_end = batch.get("subtree_end")
    if subtree_end is None:
        return inputs
    if implementation == "flex_attention":
        return {**inputs, "attention_mask": _tree_block_mask(subtree_end)}
    mask = tree_attention_mask(subtree_end)
    if implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return {**inputs, "attention_mask": mask}


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


def plan_forward(
    model: PreTrainedModel,
    wrapped: nn.Module,
    requested: str,
    *,
    max_length: int,
    dtype: torch.dtype,
    device: torch.device,
    autocast: Callable[[], Any] = nullcontext,
) -> ForwardPlan:
    """Find the best way to make forward passes that gives the logprobs of each sequence run alone.

    A collective call: every rank makes the same forward passes, and all take the same decision.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unwrapped model.
        wrapped (`nn.Module`):
            The model as it will be called.
        requested (`str`):
            `"auto"`, or one of `layouts.LAYOUTS`.
        max_length (`int`):
            Longest rollout in tokens, prompt included.
        dtype (`torch.dtype`):
            In which the forward computes.
        device (`torch.device`):
            Where.
        autocast (`Callable`, *optional*):
            See [`PolicyScorer`].

    Returns:
        [`ForwardPlan`]: its `fallbacks` are logged as warnings.

    Raises:
        PreflightError: the layout that was asked for gives other logprobs, or even padded rows do.
    """
    config = model.config.get_text_config()
    eps = torch.finfo(dtype).eps
    groups = _check_sequences(config.vocab_size, min(max_length, CHECK_LENGTH))
    fallbacks: list[str] = []

    def difference(plan: ForwardPlan) -> float:
        return largest_over_ranks(_difference_to_alone(PolicyScorer(model, plan, autocast), wrapped, groups, device))

    with evaluating(model), torch.no_grad():
        in_pieces, padded_difference = _check_padded(
            model, difference, max(CHECK_TOLERANCE, PADDED_TOLERANCE_EPS * eps), fallbacks
        )
        tolerance = max(CHECK_TOLERANCE, eps, LAYOUT_TOLERANCE_RATIO * padded_difference)
        for layout in ("tree", "packed", "padded") if requested == "auto" else (requested,):
            reason = _cannot(layout, config, max_length)
            if reason is None and layout != "padded":
                implementation = config._attn_implementation
                if layout == "tree" and implementation == "sdpa" and device.type == "cpu":
                    # For good: gradient checkpointing runs the layers again in the backward pass.
                    register_tree_attention()
                    model.set_attn_implementation(TREE_SDPA)
                reason = _refused(difference, ForwardPlan(layout, in_pieces), tolerance)
                if reason is not None and implementation != config._attn_implementation:
                    model.set_attn_implementation(implementation)
            if reason is None:
                break
            if requested != "auto":
                raise PreflightError(
                    f"sequence_layout is {requested}, and {reason}.",
                    "The gradient would be that of other probabilities than the rollouts were sampled with.",
                    "Set --sequence_layout auto.",
                )
            fallbacks.append(f"the {layout} layout is not used: {reason}")
    for fallback in fallbacks:
        logger.warning(f"Forward passes are slower than they could be: {fallback}.")
    logger.info(f"Layout of micro-batches: {layout}")
    return ForwardPlan(layout, in_pieces, tuple(fallbacks))


def _check_padded(
    model: PreTrainedModel, difference: Callable[[ForwardPlan], float], tolerance: float, fallbacks: list[str]
) -> tuple[bool, float]:
    """Whether the head may be called piece by piece, and how far padded rows are from sequences run alone, in nats."""
    if _is_sharded(model.get_output_embeddings()):
        fallbacks.append("the head's weight is sharded, so the logits of a micro-batch are made at once")
    else:
        distance = difference(ForwardPlan("padded", True))
        if distance <= tolerance:
            return True, distance
        fallbacks.append(
            f"the model changes its logits in an unknown way (mean |logprob difference| {distance:.2g} nats), so those of a "
            "micro-batch are made at once"
        )
    distance = difference(ForwardPlan("padded", False))
    if not distance <= tolerance:
        raise PreflightError(
            f"Padded rows give other logprobs than each sequence run alone: mean difference {distance:.2g} nats.",
            "The model does not respect attention_mask, so the loss of a rollout would depend on its neighbours.",
            "Set --per_device_train_batch_size 1, or another --attn_implementation.",
        )
    return False, distance


def _refused(difference: Callable[[ForwardPlan], float], plan: ForwardPlan, tolerance: float) -> str | None:
    """Why the comparison speaks against a layout; None if it does not."""
    try:
        distance = difference(plan)
    except MODEL_ERRORS as exc:
        return f"the model cannot take it ({type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else 'no reason given'})"
    if distance <= tolerance:
        return None
    return f"it gives other logprobs on this model: mean difference {distance:.2g} nats"


def _cannot(layout: str, config: Any, max_length: int) -> str | None:
    """Why a layout is out of the question, as far as the config tells; None if it may work."""
    if layout != "tree":
        return None
    implementation = config._attn_implementation
    if implementation not in TREE_IMPLEMENTATIONS:
        return f"attention implementation {implementation} takes no mask; {', '.join(TREE_IMPLEMENTATIONS)} do"
    # The made-up sequences are shorter than most windows: this would not show in the comparison.
    for name in WINDOW_NAMES:
        window = getattr(config, name, None)
        if isinstance(window, int) and window < max_length and getattr(config, "use_sliding_window", True):
            return f"the model's {name.replace('_', ' ')} of {window} tokens is shorter than max_length ({max_length})"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < max_length:
        return f"the model's attention chunks of {chunk} tokens are shorter than max_length ({max_length})"
    return None


def _check_sequences(vocab_size: int, length: int) -> list[list[Tensor]]:
    """Two groups of ragged sequences that fork twice, one a prefix of another: what rollouts do to each other."""
    generator = torch.Generator().manual_seed(0)

    def tokens(number: int) -> Tensor:
        return torch.randint(vocab_size, (number,), generator=generator)

    third = max(length // 3, 1)
    prompt = tokens(third)
    turn = torch.cat([prompt, tokens(third)])
    forked = [torch.cat([turn, tokens(third)]), torch.cat([turn, tokens(max(third - 1, 1))]), turn]
    return [[*forked, torch.cat([prompt, tokens(2)])], [tokens(third), tokens(max(third - 1, 1))]]


def _difference_to_alone(
    scorer: PolicyScorer, wrapped: nn.Module, groups: Sequence[Sequence[Tensor]], device: torch.device
) -> float:
    """Mean |logprob difference| in nats between a layout and the model's own logits for each sequence alone."""
    sequences = [sequence for group in groups for sequence in group]
    layout = lay_out(scorer.plan.layout, groups)
    pairs = list(zip(layout.token_positions, sequences, strict=True))
    targets = torch.cat([sequence[1:] for sequence in sequences])
    batch = {
        **layout_inputs(layout),
        "prediction_index": torch.cat([positions[: sequence.numel() - 1] for positions, sequence in pairs]),
        "targets": targets,
        "temperature": torch.ones(targets.shape),
    }
    scores, _ = scorer(wrapped, {name: tensor.to(device) for name, tensor in batch.items()})
    alone = []
    for sequence in sequences:
        logits = wrapped(input_ids=sequence[None].to(device), use_cache=False).logits[0, :-1]
        alone.append(logits.float().log_softmax(-1).gather(-1, sequence[1:, None].to(device)).squeeze(-1))
    return (scores.logprobs - torch.cat(alone)).abs().mean().item()


def _is_sharded(head: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 keeps a piece of the head's parameters outside of the model's forward."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in head.parameters())


def _tree_block_mask(subtree_end: Tensor) -> Any:
    # Imported here: it is only there where flex attention is.
    from torch.nn.attention.flex_attention import create_block_mask

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[batch, key])

    num_rows, length = subtree_end.shape
    return create_block_mask(attends, num_rows, None, length, length, device=str(subtree_end.device))
