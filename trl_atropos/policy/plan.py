"""Which layout a model can take, and whether its head may be called piece by piece: found out once, at the start.

A few made-up sequences are scored in every way and compared with each sequence run alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd

from ..distributed import largest_over_ranks
from ..errors import PreflightError
from .layouts import lay_out, layout_inputs
from .log_softmax import why_not_compiled
from .logprobs import evaluating, keeping_modes
from .scoring import ForwardPlan, PolicyScorer
from .tree_attention import (
    MIN_FLEX_LENGTH,
    TREE_FLEX,
    TREE_SDPA,
    flex_gradient_difference,
    register_tree_attention,
)
from .tree_states import gradient_difference, layers_with_states, unbranch_states


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .sequence_parallel import SequenceParallel


logger = logging.getLogger(__name__)

TREE_IMPLEMENTATIONS = ("sdpa", TREE_SDPA, TREE_FLEX, "eager", "flex_attention")
"""Attention implementations that take an arbitrary mask."""

WINDOW_IMPLEMENTATIONS = ("sdpa", TREE_SDPA, TREE_FLEX)
"""Those of them for which layers say their window: `sdpa` becomes one of ours for trees, and so does `eager` of a model
that has no `sdpa`, because of its attention sinks."""

CHECK_LENGTH = 24
"""Longest made-up sequence in tokens: long enough to fork twice."""

FLEX_CHECK_LENGTH = MIN_FLEX_LENGTH
"""Longest made-up sequence in tokens for flex attention: their trees are longer, and have blocks of every kind."""

CHECK_TOLERANCE = 1e-4
PADDED_TOLERANCE_EPS = 40.0
"""Accepted mean |logprob difference| in nats of padded rows: the larger of both, the second in units of the arithmetic's
epsilon. Rounding in bfloat16 alone makes up to about 10 of them."""

GRADIENT_TOLERANCE_EPS = 8.0
"""Accepted difference of the gradients of two attention kernels, in units of the arithmetic's epsilon and of their norm;
on an H200 it was below 0.1 of them in float32, and about 1 in bfloat16."""

LAYOUT_TOLERANCE_RATIO = 4.0
"""Accepted difference of another layout, in units of that of padded rows: both are sums in another order. In bfloat16 a
trained model shows a ratio of 1.5, one whose recurrent layers run on from a sequence into the next 70 and more."""

ROUNDING_TOLERANCE_RATIO = 1.5
"""Accepted difference of another layout, in units of what one rounding of the embeddings makes. In bfloat16 another kernel
is 0.8 of it away on a trained model, as far as float32 is, and no more than padded rows where their kernel is the same."""

ROW_COUNTS = ("attention_chunk_size", "floor_scale")
"""What configs call a number of tokens that layers count from the start of a row, whatever the positions say (Llama 4): that
of a chunk, and that of a step by which queries are scaled."""

WINDOW_NAMES = ("sliding_window", "window_size", *ROW_COUNTS)
"""What configs call a number of tokens beyond which a sequence is computed otherwise than before it."""

MODEL_ERRORS = (ValueError, RuntimeError, TypeError, LookupError, AttributeError)
"""What models raise when they cannot take a layout, and torch where it lacks a kernel."""


def plan_forward(
    model: PreTrainedModel,
    wrapped: nn.Module,
    requested: str,
    *,
    max_length: int,
    dtype: torch.dtype,
    device: torch.device,
    autocast: Callable[[], Any] = nullcontext,
    has_float32_head: bool = False,
    sequence_parallel: SequenceParallel | None = None,
) -> ForwardPlan:
    """Find the best way to make forward passes that gives the logprobs of each sequence run alone.

    A collective call: every rank makes the same forward passes, and all take the same decision.

    `model` is the unwrapped model, with or without an adapter; `wrapped` is the model as it will be called.
    `requested` is `"auto"` or one of `layouts.LAYOUTS`. `max_length` is the longest rollout in tokens, prompt
    included. The forward computes in `dtype` on `device`; `autocast` is that of [`~policy.scoring.PolicyScorer`], and
    `has_float32_head` that of [`~policy.scoring.ForwardPlan`]. With `sequence_parallel`, which takes padded rows only, a
    sequence in pieces is compared, too.

    The `fallbacks` of the plan are logged as warnings.

    Raises:
        PreflightError: the layout that was asked for gives other logprobs, or even padded rows or pieces do; or the head
            cannot compute in float32.
    """
    if has_float32_head:
        _check_float32_head(model)
    config = model.config.get_text_config()
    eps = torch.finfo(dtype).eps
    comparison = _Comparison(model, wrapped, max_length, dtype, device, autocast, has_float32_head)
    fallbacks = comparison.fallbacks
    if device.type == "cuda" and (reason := why_not_compiled(device.type)) is not None:
        fallbacks.append(f"logprobs are computed a few rows at a time: torch.compile makes no kernels here ({reason})")

    padded_tolerance = max(CHECK_TOLERANCE, PADDED_TOLERANCE_EPS * eps)
    with evaluating(model), torch.no_grad():
        padded, padded_difference = _check_padded(comparison, padded_tolerance)
        if has_float32_head and (padded.is_head_sharded or not padded.projects_in_pieces):
            why = "the head's weight is sharded" if padded.is_head_sharded else fallbacks[-1]
            raise PreflightError(
                "cast_lm_head_to_fp32 is on, and the head of this model is called inside of its forward.",
                f"There it computes in the precision of the rest: {why}.",
                "Leave --cast_lm_head_to_fp32 out, or set --bf16 false.",
            )
        if _is_code_of_others(model):
            scorer = PolicyScorer(model, padded, autocast)
            _check_long_neighbour(scorer, wrapped, max_length, device, padded_tolerance)
        tolerance = max(CHECK_TOLERANCE, eps, LAYOUT_TOLERANCE_RATIO * padded_difference)
        if sequence_parallel is not None:
            _check_pieces(comparison, padded, sequence_parallel, tolerance)
        for layout in ("tree", "packed", "padded") if requested == "auto" else (requested,):
            has_windows = comparison.takes_tree_attention
            reason = _cannot(layout, config, max_length, has_windows) or _needless(layout, config, requested, device)
            plan = replace(padded, layout=layout, branches_states=layout == "tree" and comparison.branches_states)
            if reason is None and layout != "padded":
                reason = (comparison.refuses_tree if layout == "tree" else comparison.refuses)(plan, tolerance)
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
    if not plan.branches_states:
        unbranch_states(model)
    return replace(plan, fallbacks=tuple(fallbacks), has_float32_head=has_float32_head)


@dataclass(frozen=True)
class _Comparison:
    """Scores made-up sequences in one layout and compares with each sequence run alone; every call is collective.

    The fields are the arguments of `plan_forward`. What is slower than it could be is added to `fallbacks`.
    """

    model: PreTrainedModel
    wrapped: nn.Module
    max_length: int
    dtype: torch.dtype
    device: torch.device
    autocast: Callable[[], Any] = nullcontext
    has_float32_head: bool = False
    fallbacks: list[str] = field(default_factory=list)
    alone: dict[int, Tensor] = field(default_factory=dict)
    """Logprobs of each sequence alone, by the length of the longest: by the model's own attention, as it was at first."""
    roundings: dict[int, float] = field(default_factory=dict)
    """Mean |logprob difference| in nats that rounding makes of them, by the same length, the largest of all ranks."""

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def length(self) -> int:
        """Longest made-up sequence in tokens: beyond a window, too, because whether the layers say theirs shows in no shorter
        one.
        """
        window = _short_window(self.config, self.max_length)
        return CHECK_LENGTH + (0 if window is None else window[1])

    @property
    def takes_tree_attention(self) -> bool:
        """Whether the model may be given attention of ours over trees."""
        implementation = self.config._attn_implementation
        has_sdpa = getattr(self.model, "_supports_sdpa", True)
        return implementation in WINDOW_IMPLEMENTATIONS or (implementation == "eager" and not has_sdpa)

    @property
    def branches_states(self) -> bool:
        """Whether layers that carry a state are run over the pieces of trees, if the model is given any. A compiled one would be
        compiled again for each.
        """
        has_states = bool(layers_with_states(self.model))
        return has_states and self.takes_tree_attention and not is_compiled_module(self.wrapped)

    def difference(self, plan: ForwardPlan, length: int = CHECK_LENGTH) -> float:
        """Mean |logprob difference| in nats with sequences of up to `length` tokens, the largest of all ranks."""
        groups = self._groups(length)
        scorer = PolicyScorer(self.model, replace(plan, has_float32_head=self.has_float32_head), self.autocast)
        self.run_alone(length)
        return largest_over_ranks(_difference(scorer, self.wrapped, groups, self.alone[length], self.device))

    def difference_in_pieces(self, plan: ForwardPlan, sequence_parallel: SequenceParallel, length: int) -> float:
        """Mean |logprob difference| in nats of one sequence of up to `length` tokens that ranks share, the largest of all
        ranks.
        """
        self.run_alone(length)
        plan = replace(plan, has_float32_head=self.has_float32_head)
        scorer = PolicyScorer(self.model, plan, self.autocast, sequence_parallel)
        # The first is the longest.
        sequence = self._groups(length)[0][0]
        alone = self.alone[length][: sequence.numel() - 1]
        with keeping_modes(self.model):
            for module in self.model.modules():
                module.training = not isinstance(module, _DropoutNd)
            return largest_over_ranks(_difference(scorer, self.wrapped, [[sequence]], alone, self.device))

    def run_alone(self, length: int) -> None:
        """Run each sequence of up to `length` tokens alone, unless that is done; and once more from embeddings that are off by
        one rounding, where that is coarse.
        """
        if length in self.alone:
            return
        sequences = [sequence for group in self._groups(length) for sequence in group]
        self.alone[length] = _logprobs_alone(self.wrapped, sequences, self.device)
        self.roundings[length] = 0.0
        half = torch.finfo(self.dtype).eps / 2
        if half > CHECK_TOLERANCE:
            with _embeddings_off_by(self.model, half):
                off = _logprobs_alone(self.wrapped, sequences, self.device)
            self.roundings[length] = largest_over_ranks((off - self.alone[length]).abs().mean().item())

    def _groups(self, length: int) -> list[list[Tensor]]:
        return _check_sequences(self.config.vocab_size, min(self.max_length, length))

    def refuses(self, plan: ForwardPlan, tolerance: float, length: int = CHECK_LENGTH) -> str | None:
        """Why the comparison speaks against a layout; None if it does not."""
        try:
            distance = self.difference(plan, length)
        except torch.OutOfMemoryError:
            raise
        except MODEL_ERRORS as exc:
            return f"the model cannot take it ({_first_line(exc)})"
        if distance <= self.accepted(tolerance, length):
            return None
        return f"it gives other logprobs on this model: mean difference {distance:.2g} nats"

    def accepted(self, tolerance: float, length: int) -> float:
        """Mean |logprob difference| in nats that is accepted of sequences of up to `length` tokens: `tolerance`, or more if
        rounding makes more. They were compared before.
        """
        return max(tolerance, ROUNDING_TOLERANCE_RATIO * self.roundings.get(length, 0.0))

    def refuses_tree(self, plan: ForwardPlan, tolerance: float) -> str | None:
        """As `refuses`; a model that can is given the attention that computes no more of a tree than it needs, and one with
        states runs over its pieces.

        For good: gradient checkpointing runs the layers again in the backward pass.
        """
        if plan.branches_states and (reason := self._refuses_states()) is not None:
            return reason
        before = self.config._attn_implementation
        if not self.takes_tree_attention:
            return self.refuses(plan, tolerance)
        register_tree_attention()
        window, length = _short_window(self.config, self.max_length), self.length
        implementation = TREE_SDPA if self.device.type == "cpu" else TREE_FLEX
        skipping = None
        must_be_ours = window is not None or _row_count(self.config) is not None
        # Otherwise, there is nothing to skip in the short rows of a GPU.
        if self.device.type == "cpu" or must_be_ours or self.max_length >= MIN_FLEX_LENGTH:
            # By the model's own attention.
            self.run_alone(length)
            if self.device.type != "cpu" and self.max_length >= MIN_FLEX_LENGTH:
                self.run_alone(max(length, FLEX_CHECK_LENGTH))
            self.model.set_attn_implementation(implementation)
            if self.config._attn_implementation == implementation:
                skipping = self._refuses_skipping(plan, tolerance, length)
            else:
                # transformers leaves models alone that do not look their attention up by name.
                skipping = "the model has attention of its own"
            if skipping is None:
                return None
            self.model.set_attn_implementation(before)
            if must_be_ours:
                return skipping
        reason = self.refuses(plan, tolerance)
        if reason is None and skipping is not None:
            self.fallbacks.append(
                f"attention multiplies every pair of tokens of a tree: {implementation} is not used, {skipping}"
            )
        return reason

    def _refuses_states(self) -> str | None:
        """Why the gradient speaks against running layers with a state over the pieces of a tree; None if it does not."""
        (layer, _), *_ = layers_with_states(self.model)
        if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
            # Every call gathers them, on all ranks at once.
            return "under ZeRO-3, all ranks would have to cut their trees into as many pieces"
        error = ""
        try:
            with self.autocast():
                difference = gradient_difference(layer, self.config, next(self.model.parameters()).dtype, self.device)
        except torch.OutOfMemoryError:
            raise
        except MODEL_ERRORS as exc:
            difference, error = torch.inf, f" ({_first_line(exc)})"
        difference = largest_over_ranks(difference)
        if difference <= max(CHECK_TOLERANCE, GRADIENT_TOLERANCE_EPS * torch.finfo(self.dtype).eps):
            return None
        return (
            f"the gradient of a layer with a state is off by {difference:.2g} of its norm in pieces of a path{error}"
        )

    def _refuses_skipping(self, plan: ForwardPlan, tolerance: float, length: int) -> str | None:
        """Why a model cannot take the attention over trees that it was given; sequences have up to `length` tokens."""
        if self.device.type != "cpu":
            if getattr(self.config, "attention_dropout", 0.0):
                return "it has no attention_dropout"
            if self.max_length >= MIN_FLEX_LENGTH:
                logger.info("Compiling and comparing the attention over trees, which takes up to a minute")
                reason = _refuses_flex_gradient(self.config, self.dtype, self.device)
                reason = reason or self.refuses(plan, tolerance, max(length, FLEX_CHECK_LENGTH))
                if reason is not None:
                    return reason
        return self.refuses(plan, tolerance, length)


def _check_padded(comparison: _Comparison, tolerance: float) -> tuple[ForwardPlan, float]:
    """How the head may be called (the plan for padded rows), and how far these are from sequences run alone, in nats."""
    fallbacks = comparison.fallbacks
    is_sharded = _is_sharded(comparison.model.get_output_embeddings())
    in_pieces = ForwardPlan("padded", True, is_head_sharded=is_sharded)
    distance = comparison.difference(in_pieces)
    if distance <= tolerance:
        return in_pieces, distance
    fallbacks.append(
        f"the model changes its logits in an unknown way (mean |logprob difference| {distance:.2g} nats), so those of a "
        "micro-batch are made at once"
    )
    distance = comparison.difference(ForwardPlan("padded", False))
    if not distance <= tolerance:
        raise PreflightError(
            f"Padded rows give other logprobs than each sequence run alone: mean difference {distance:.2g} nats.",
            "The model does not respect attention_mask, so the loss of a rollout would depend on its neighbours.",
            "Set --per_device_train_batch_size 1, or another --attn_implementation.",
        )
    return ForwardPlan("padded", False), distance


def _check_pieces(
    comparison: _Comparison, plan: ForwardPlan, sequence_parallel: SequenceParallel, tolerance: float
) -> None:
    """Refuse a model that computes something else of pieces of a sequence than of the whole; collective.

    DeepSpeed's attention puts the pieces together; other layers see their rank's piece only. It leaves masks out, in evaluation, too,
    so that the comparison would not show a window that a kernel takes from a mask.
    """
    config, max_length = comparison.config, comparison.max_length
    window = _short_window(config, max_length)
    if window is not None and (window[0] in ROW_COUNTS or "flash" not in config._attn_implementation):
        name, size = window
        raise PreflightError(
            f"The model's {_in_words(name)} of {size} tokens is shorter than max_length ({max_length}), and "
            f"{sequence_parallel.size} ranks share a sequence.",
            f"DeepSpeed's attention leaves masks out, and with {config._attn_implementation} this model has it in the mask.",
            f"Lower --max_length to {size}, or take `parallelism_config` out of the accelerate configuration.",
        )
    if getattr(config, "attention_dropout", 0.0):
        logger.warning(
            "Pieces of sequences are not compared with whole ones, because the model has attention_dropout."
        )
        return
    length = comparison.length
    distance = comparison.difference_in_pieces(plan, sequence_parallel, length)
    if not distance <= comparison.accepted(tolerance, length):
        raise PreflightError(
            f"A sequence whose pieces lie on {sequence_parallel.size} ranks gets other logprobs than the whole: mean difference "
            f"{distance:.2g} nats with {length} tokens.",
            "Layers of this model carry a state from token to token, or look at neighbours otherwise than by attention: each rank "
            "has only its piece of them.",
            "Take `parallelism_config` out of the accelerate configuration; --max_length shortens what one device holds.",
        )


def _check_float32_head(model: PreTrainedModel) -> None:
    coarse = {parameter.dtype for parameter in model.get_output_embeddings().parameters()} - {torch.float32}
    if coarse:
        raise PreflightError(
            f"cast_lm_head_to_fp32 is on, and the head has weights in {', '.join(sorted(map(str, coarse)))}.",
            "They would be copied to float32 in every forward pass, and trained at their own resolution.",
            "Load the model in float32 (--dtype float32, the default where it is given by its path).",
        )


def _check_long_neighbour(
    scorer: PolicyScorer, wrapped: nn.Module, max_length: int, device: torch.device, tolerance: float
) -> None:
    """Refuse a model whose short rows have other logprobs beside one of `max_length` tokens; collective.

    Frequencies that follow the longest row would not show among sequences of `CHECK_LENGTH` tokens. Those of models
    that are part of transformers are known (`rotary.py`).
    """
    vocab_size = scorer.model.config.get_text_config().vocab_size
    groups = _check_sequences(vocab_size, min(max_length, CHECK_LENGTH))
    long = torch.randint(vocab_size, (max_length,), generator=torch.Generator().manual_seed(1))
    alone = _logprobs_alone(wrapped, [sequence for group in groups for sequence in group], device)
    distance = largest_over_ranks(_difference(scorer, wrapped, [*groups, [long]], alone, device, num_left_out=1))
    if not distance <= tolerance:
        raise PreflightError(
            f"Short rollouts get other logprobs beside one of {max_length} tokens: mean difference {distance:.2g} nats.",
            "The model computes something from the longest row of a forward pass, so the loss of a rollout would depend on its "
            "neighbours.",
            "Lower --max_length, or load the model that transformers has of this kind (without --trust_remote_code).",
        )


def _is_code_of_others(model: Any) -> bool:
    """Whether a model, without its adapter, is no part of transformers."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return not type(base).__module__.startswith("transformers.")


def _refuses_flex_gradient(config: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the gradient of flex attention speaks against it, compared with `sdpa` at the sizes of a model; None if it does
    not. A collective call, with one answer: a single rank may lack a compiler.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    error = ""
    try:
        difference = flex_gradient_difference(
            config.num_attention_heads, num_key_value_heads, head_dim, dtype=dtype, device=device
        )
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as exc:
        difference, error = torch.inf, f" ({_first_line(exc)})"
    difference = largest_over_ranks(difference)
    if difference <= max(CHECK_TOLERANCE, GRADIENT_TOLERANCE_EPS * torch.finfo(dtype).eps):
        return None
    return f"its gradient differs from that of sdpa by {difference:.2g} of its norm{error}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def _cannot(layout: str, config: Any, max_length: int, has_windows: bool) -> str | None:
    """Why a layout is out of the question, as far as the config tells; None if it may work. With `has_windows`, the
    attention of the model can be ours, which has windows on the paths of trees.
    """
    if layout == "padded":
        return None
    counts = _row_count(config)
    if layout == "packed":
        return None if counts is None else f"layers of the model count {_in_words(counts)} from the start of a row"
    implementation = config._attn_implementation
    if implementation not in TREE_IMPLEMENTATIONS:
        return f"attention implementation {implementation} takes no mask; {', '.join(TREE_IMPLEMENTATIONS)} do"
    # The made-up sequences are shorter than most windows and chunks: this would not show in the comparison.
    window = _short_window(config, max_length)
    if window is not None and not has_windows:
        name, size = window
        return (
            f"the model's {_in_words(name)} of {size} tokens is shorter than max_length ({max_length}), and only sdpa "
            f"has trees with windows, not {implementation}"
        )
    if counts is not None and not has_windows:
        return (
            f"layers of the model count {_in_words(counts)} from the start of a row, and only sdpa has trees that count on "
            f"paths, not {implementation}"
        )
    return None


def _row_count(config: Any) -> str | None:
    """Which of `ROW_COUNTS` a model has; None if none."""
    return next((name for name in ROW_COUNTS if getattr(config, name, None) is not None), None)


def _short_window(config: Any, max_length: int) -> tuple[str, int] | None:
    """Name and size in tokens of the longest window that is shorter than `max_length`; None if there is none."""
    if not getattr(config, "use_sliding_window", True):
        return None
    windows = [(name, getattr(config, name, None)) for name in WINDOW_NAMES]
    short = [(name, size) for name, size in windows if isinstance(size, int) and size < max_length]
    return max(short, key=lambda window: window[1], default=None)


def _in_words(name: str) -> str:
    return name.replace("_", " ")


def _needless(layout: str, config: Any, requested: str, device: torch.device) -> str | None:
    """Why `auto` leaves a layout out that would work; None if it does not.

    On one H200 a step with 512/2048/8 (prompt, completion, rollouts) took 2.0 s in packed rows with `sdpa`, 0.9 s in
    padded ones (benchmarks/gpu.py).
    """
    if layout != "packed" or requested != "auto" or device.type == "cpu" or config._attn_implementation != "sdpa":
        return None
    return "sdpa on a GPU multiplies every pair of tokens of a packed row; --attn_implementation flash_attention_2 does not"


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


def _logprobs_alone(wrapped: nn.Module, sequences: Sequence[Tensor], device: torch.device) -> Tensor:
    """Logprobs (N,) in nats of all tokens but the first of each sequence, by the model's own logits for it alone."""
    alone = []
    for sequence in sequences:
        logits = wrapped(input_ids=sequence[None].to(device), use_cache=False).logits[0, :-1]
        alone.append(logits.float().log_softmax(-1).gather(-1, sequence[1:, None].to(device)).squeeze(-1))
    return torch.cat(alone)


@contextmanager
def _embeddings_off_by(model: PreTrainedModel, relative: float) -> Iterator[None]:
    """Make every entry of the embeddings larger or smaller by this share of it, at random."""
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator, dtype=torch.int8) * 2 - 1
        return output * (1 + relative * signs.to(output.device, output.dtype))

    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _difference(
    scorer: PolicyScorer,
    wrapped: nn.Module,
    groups: Sequence[Sequence[Tensor]],
    alone: Tensor,
    device: torch.device,
    num_left_out: int = 0,
) -> float:
    """Mean |logprob difference| in nats between a layout and `alone`, the logprobs of each sequence alone.

    The last `num_left_out` sequences are laid out with the others and not compared.
    """
    sequences = [sequence for group in groups for sequence in group]
    layout = lay_out(scorer.plan.layout, groups, shares_between_groups=scorer.shares_between_groups)
    pairs = list(zip(layout.token_positions, sequences, strict=True))[: len(sequences) - num_left_out]
    sequences = [sequence for _, sequence in pairs]
    targets = torch.cat([sequence[1:] for sequence in sequences])
    batch = {
        **layout_inputs(layout),
        "prediction_index": torch.cat([positions[: sequence.numel() - 1] for positions, sequence in pairs]),
        "targets": targets,
        "temperature": torch.ones(targets.shape),
    }
    scores, _ = scorer(wrapped, {name: tensor.to(device) for name, tensor in batch.items()})
    return (scores.logprobs - alone).abs().mean().item()


def _is_sharded(head: nn.Module) -> bool:
    """Whether ZeRO-3 or FSDP2 keeps a piece of the head's parameters outside of the model's forward."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in head.parameters())
