"""The forward passes of a run: those of the policy, and those of the reference of the KL term."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from ..loss.advantages import clip_advantages, normalize_advantages
from ..loss.losses import select_trained, weighted_cross_entropy
from ..trainer.atropos_config import AtroposConfig
from ..trainer.config_checks import sequence_parallel_size
from .load import add_adapter, disable_dropout, load_model
from .logprobs import select_positions_before, token_logprobs_and_entropy
from .scoring import ForwardPlan, PolicyScorer, plan_forward
from .sequence_parallel import SequenceParallel, scaled_for


@dataclass(frozen=True)
class PreparedPolicy:
    """What a trainer starts from.

    Args:
        model (`nn.Module`):
            The policy, with its adapter.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer.
        reference_model (`PreTrainedModel`, *optional*):
            A frozen copy of the starting policy, if the KL term needs one.
    """

    model: nn.Module
    processing_class: Any
    reference_model: PreTrainedModel | None


def prepare_policy(
    model: str | PreTrainedModel | nn.Module, args: AtroposConfig, processing_class: Any, peft_config: Any
) -> PreparedPolicy:
    """Load what is given by name, add the adapter, switch dropout off, and copy the reference.

    Args:
        model, args, processing_class, peft_config:
            See [`AtroposTrainer`].
    """
    policy = load_model(model, args)
    if processing_class is None and getattr(policy.config, "_name_or_path", None):
        processing_class = AutoTokenizer.from_pretrained(
            policy.config._name_or_path, trust_remote_code=args.trust_remote_code
        )
    if peft_config is not None:
        policy = add_adapter(policy, peft_config)
    if args.disable_dropout:
        disable_dropout(policy)
    # Before the optimizer's first step: the copy must be of the starting policy.
    needs_copy = args.beta != 0.0 and args.ref_logprobs == "recompute" and not hasattr(policy, "peft_config")
    if needs_copy and sequence_parallel_size(args) > 1:
        raise ValueError(
            f"beta is {args.beta}, and {sequence_parallel_size(args)} ranks share each sequence. TRL prepares the copy of the policy "
            "for data-parallel ranks only. Train an adapter (--use_peft), set --ref_logprobs require, or --beta 0."
        )
    return PreparedPolicy(policy, processing_class, make_reference_model(model, args) if needs_copy else None)


@dataclass(frozen=True)
class PolicyForward:
    """How the trainer scores tokens.

    Args:
        scorer ([`~policy.scoring.PolicyScorer`]):
            Of the policy, with the plan that was found out at start.
        reference ([`ReferencePolicy`], *optional*):
            None if nothing needs a reference model.
        num_data_ranks (`int`):
            By what the gradients of all ranks are divided after they were added up: the shares of a step's rollouts.
    """

    scorer: PolicyScorer
    reference: ReferencePolicy | None
    num_data_ranks: int


def make_forward(
    args: AtroposConfig,
    model: PreTrainedModel,
    wrapped: nn.Module,
    reference_model: PreTrainedModel | None,
    accelerator: Accelerator,
    sequence_parallel: SequenceParallel | None = None,
) -> PolicyForward:
    """Find out how forward passes are best made. A collective call: the model runs on every rank.

    Args:
        args ([`AtroposConfig`]):
            Options of the run.
        model (`PreTrainedModel` or `PeftModel`):
            The unwrapped policy.
        wrapped (`nn.Module`):
            The policy as accelerate wrapped it.
        reference_model (`PreTrainedModel`, *optional*):
            From [`make_reference_model`], not yet wrapped.
        accelerator (`Accelerator`):
            Of the run.
        sequence_parallel ([`~policy.sequence_parallel.SequenceParallel`], *optional*):
            If ranks share sequences.

    Raises:
        [`PreflightError`]: see [`~policy.scoring.plan_forward`].
    """
    sequence_parallel = scaled_for(sequence_parallel, wrapped)
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plan = plan_forward(
        model,
        wrapped,
        args.sequence_layout if sequence_parallel is None else "padded",
        max_length=args.max_length,
        dtype=mixed or next(model.parameters()).dtype,
        device=accelerator.device,
        autocast=accelerator.autocast,
    )
    reference = None
    if args.beta != 0.0 and args.ref_logprobs == "recompute":
        reference = ReferencePolicy(model, reference_model, plan, accelerator, sequence_parallel)
    num_data_ranks = accelerator.num_processes if sequence_parallel is None else sequence_parallel.data_size
    return PolicyForward(PolicyScorer(model, plan, accelerator.autocast, sequence_parallel), reference, num_data_ranks)


def make_reference_model(model: str | PreTrainedModel | nn.Module, args: AtroposConfig) -> PreTrainedModel:
    """Make the frozen copy of a model that has no adapter.

    Args:
        model (`str` or `PreTrainedModel`):
            What the trainer was given. A path is loaded again, which is the only way under ZeRO-3.
        args ([`AtroposConfig`]):
            How it is loaded.

    Raises:
        ValueError: an instance, under ZeRO-3: there is no whole model in this process to copy.
    """
    if isinstance(model, str):
        reference = load_model(model, args)
    elif is_deepspeed_zero3_enabled():
        raise ValueError(
            "beta is not 0, the model was given as an instance, and ZeRO-3 keeps only a piece of it in this process. It "
            "cannot be copied for the reference. Pass the model as a path, or set --ref_logprobs require."
        )
    else:
        reference = copy.deepcopy(model)
    disable_dropout(reference)
    reference.requires_grad_(False)
    reference.eval()
    return reference


class ReferencePolicy:
    """Scores tokens under the reference.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The unwrapped policy.
        copy_of_start (`PreTrainedModel`, *optional*):
            From [`make_reference_model`]; None if the policy has an adapter that can be disabled.
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


def weighted_sft_loss(
    model: nn.Module,
    head: nn.Module,
    inputs: Mapping[str, Tensor],
    advantages: Tensor,
    loss_mask: Tensor,
    args: AtroposConfig,
) -> Tensor:
    """The advantage-weighted cross entropy of a model, with logits at trained positions only.

    Args:
        model (`nn.Module`):
            Called with `inputs`.
        head (`nn.Module`):
            Its output embeddings.
        inputs (`Mapping[str, torch.Tensor]`):
            `input_ids` of shape `(B, T)`, and what else the model takes.
        advantages, loss_mask (`torch.Tensor`):
            See [`~loss.losses.advantage_weighted_sft_loss`].
        args ([`AtroposConfig`]):
            Temperature, normalisation and clipping.
    """
    positions, targets, trained_advantages = select_trained(inputs["input_ids"], advantages, loss_mask)
    is_trained = torch.ones_like(targets, dtype=torch.bool)
    normalized = normalize_advantages(trained_advantages, is_trained, args.advantage_normalization)
    with select_positions_before(head, positions):
        logits = model(**inputs, use_cache=False).logits.squeeze(0)
    logprobs, _ = token_logprobs_and_entropy(logits, targets, args.temperature)
    return weighted_cross_entropy(logprobs, clip_advantages(normalized, args.advantage_clipping))
