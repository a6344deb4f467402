"""The forward passes of a run: those of the policy, and those of the reference of the KL term."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from .plan import plan_forward
from .scoring import ForwardPlan, PolicyScorer
from .sequence_parallel import SequenceParallel, scaled_for


@dataclass(frozen=True)
class PolicyForward:
    """How the trainer scores tokens: the scorer of the policy, with the plan that was found out at start, and the reference if
    anything needs one. The gradients of all ranks are divided by `num_data_ranks` after they were added up: the shares of a
    step's rollouts."""

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
) -> PolicyForward:
    """Find out how forward passes are best made. A collective call: the model runs on every rank.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unwrapped policy.
        wrapped (`nn.Module`):
            The policy as accelerate wrapped it.
        reference_model (`PreTrainedModel`, *optional*):
            From [`~policy.load.make_reference_model`], not yet wrapped.
        accelerator (`Accelerator`):
            Of the run.
        layout (`str`):
            `sequence_layout` of the options.
        max_length (`int`):
            Longest rollout in tokens.
        needs_reference (`bool`):
            Whether the loss has a KL term to a reference that is computed here.
        sequence_parallel ([`~policy.sequence_parallel.SequenceParallel`], *optional*):
            If ranks share sequences.

    Raises:
        [`PreflightError`]: see [`~policy.plan.plan_forward`].
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
    )
    reference = None
    if needs_reference:
        reference = ReferencePolicy(model, reference_model, plan, accelerator, sequence_parallel)
    num_data_ranks = accelerator.num_processes if sequence_parallel is None else sequence_parallel.data_size
    return PolicyForward(PolicyScorer(model, plan, accelerator.autocast, sequence_parallel), reference, num_data_ranks)


class ReferencePolicy:
    """Scores tokens under the reference.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unwrapped policy.
        copy_of_start (`PreTrainedModel`, *optional*):
            From [`~policy.load.make_reference_model`]; None if the policy has an adapter that can be disabled.
        plan ([`~policy.scoring.ForwardPlan`]):
            How forward passes are made.
        accelerator (`Accelerator`):
            Places and shards the copy as it does the policy.
        sequence_parallel ([`~policy.sequence_parallel.SequenceParallel`], *optional*):
            If ranks share sequences.
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
        self._wrapped_copy = None if copy_of_start is None else _prepare(copy_of_start, accelerator)
        self._scorer = PolicyScorer(
            model if copy_of_start is None else copy_of_start, plan, accelerator.autocast, sequence_parallel
        )

    @torch.no_grad()
    def logprobs(self, wrapped: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logprobs (U,) in nats of the scored positions of a micro-batch.

        Args:
            wrapped (`nn.Module`):
                The wrapped policy; runs without its adapter if there is no copy.
            batch (`Mapping[str, torch.Tensor]`):
                See [`~policy.scoring.PolicyScorer`].
        """
        if self._wrapped_copy is not None:
            return self._scorer(self._wrapped_copy, batch)[0].logprobs
        with self._without_adapter():
            return self._scorer(wrapped, batch)[0].logprobs

    def _without_adapter(self) -> AbstractContextManager[Any]:
        # A second adapter of that name is TRL's way to give a reference that is not the base model.
        name = "ref" if "ref" in self._model.peft_config else None
        return use_adapter(self._model, adapter_name=name)


def _prepare(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)
