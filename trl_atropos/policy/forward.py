"""The forward passes of a run: those of the policy, and those of the reference of the KL term."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from .load import REFERENCE_ADAPTER, keeping_what_is_trained
from .plan import plan_forward
from .scoring import ForwardPlan, PolicyScorer
from .sequence_parallel import SequenceParallel, scaled_for


@dataclass(frozen=True)
class PolicyForward:
    """How the trainer scores tokens.

    `scorer` is that of the policy, with the plan that was found out at start; `reference` is None if nothing needs
    one. Rollouts are dealt in `num_data_ranks` shares, by which the gradients of all ranks are divided after they were
    added up.
    """

    scorer: PolicyScorer
    reference: ReferencePolicy | None
    num_data_ranks: int


def make_forward(
    model: PreTrainedModel,
    wrapped: nn.Module,
    reference_model: PreTrainedModel | None,
    accelerator: Accelerator,
    *,
    layout: str,
    max_length: int,
    needs_reference: bool,
    sequence_parallel: SequenceParallel | None = None,
    has_float32_head: bool = False,
) -> PolicyForward:
    """Find out how forward passes are best made. A collective call: the model runs on every rank.

    `model` is the unwrapped policy, with or without an adapter; `wrapped` is the policy as accelerate wrapped it.
    `reference_model` is what [`~policy.load.make_reference_model`] made, not yet wrapped. `layout` is the option
    `sequence_layout`, `max_length` the longest rollout in tokens. `needs_reference` says whether the loss has a KL
    term to a reference that is computed here. `sequence_parallel` is None if every rank holds whole sequences.
    `has_float32_head` is the option `cast_lm_head_to_fp32`.

    Raises:
        PreflightError: as [`~policy.plan.plan_forward`] does.
    """
    sequence_parallel = scaled_for(sequence_parallel, wrapped)
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plan = plan_forward(
        model,
        wrapped,
        layout if sequence_parallel is None else "padded",
        max_length=max_length,
        dtype=mixed or next(model.parameters()).dtype,
        device=accelerator.device,
        autocast=accelerator.autocast,
        has_float32_head=has_float32_head,
        sequence_parallel=sequence_parallel,
    )
    reference = None
    if needs_reference:
        reference = ReferencePolicy(model, reference_model, plan, accelerator, sequence_parallel)
    num_data_ranks = accelerator.num_processes if sequence_parallel is None else sequence_parallel.data_size
    return PolicyForward(PolicyScorer(model, plan, accelerator.autocast, sequence_parallel), reference, num_data_ranks)


class ReferencePolicy:
    """Scores tokens under the reference.

    `model` is the unwrapped policy. `copy_of_start` is what [`~policy.load.make_reference_model`] made; None if the
    policy has an adapter that can be disabled. `plan` says how forward passes are made, and `accelerator` places and
    shards the copy as it does the policy. `sequence_parallel` is None if every rank holds whole sequences.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        copy_of_start: PreTrainedModel | None,
        plan: ForwardPlan,
        accelerator: Accelerator,
        sequence_parallel: SequenceParallel | None = None,
    ):
        self._model = model
        if copy_of_start is not None:
            # The layout was found to be right with this one, which has windows and sinks on the paths of trees.
            copy_of_start.set_attn_implementation(model.config.get_text_config()._attn_implementation)
        self._wrapped_copy = None if copy_of_start is None else _prepare(copy_of_start, accelerator)
        self._scorer = PolicyScorer(
            model if copy_of_start is None else copy_of_start, plan, accelerator.autocast, sequence_parallel
        )

    @torch.no_grad()
    def logprobs(self, wrapped: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logprobs (U,) in nats of the scored positions of a micro-batch.

        The batch is as [`~policy.scoring.PolicyScorer`] takes it. `wrapped` is the wrapped policy; if there is no copy of
        the model, it runs with the adapter `REFERENCE_ADAPTER`, or without any.
        """
        if self._wrapped_copy is not None:
            return self._scorer(self._wrapped_copy, batch)[0].logprobs
        with keeping_what_is_trained(self._model), self._with_adapter_of_start():
            return self._scorer(wrapped, batch)[0].logprobs

    def _with_adapter_of_start(self) -> AbstractContextManager[Any]:
        name = REFERENCE_ADAPTER if REFERENCE_ADAPTER in self._model.peft_config else None
        context: AbstractContextManager[Any] = use_adapter(self._model, adapter_name=name)
        return context


def _prepare(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    wrapped: nn.Module
    if accelerator.state.deepspeed_plugin is not None:
        wrapped = prepare_deepspeed(model, accelerator)
    elif (plugin := getattr(accelerator.state, "fsdp_plugin", None)) is not None:
        # As accelerate prepares the policy: where only rank 0 has loaded the weights, it sends them to the others, which
        # TRL's `prepare_fsdp` does not.
        wrapped = (
            fsdp2_prepare_model(accelerator, model) if plugin.fsdp_version == 2 else prepare_fsdp(model, accelerator)
        )
    else:
        wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    return wrapped
