"""Makes the policy that is trained: load, adapt, switch dropout off, copy the reference."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import PreflightError
from .options import PolicyOptions


if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class PreparedPolicy:
    """What a trainer starts from.

    `model` is the policy with its adapter, `processing_class` its tokenizer, None if it has none, and
    `reference_model` a frozen copy of the starting policy, None if the KL term needs none.
    """

    model: nn.Module
    processing_class: Any
    reference_model: PreTrainedModel | None


def prepare_policy(
    model: str | PreTrainedModel | nn.Module,
    options: PolicyOptions,
    processing_class: Any,
    peft_config: PeftConfig | None,
    *,
    needs_reference: bool,
    sequence_parallel_size: int,
) -> PreparedPolicy:
    """Load what is given by name, add the adapter, switch dropout off, and copy the reference.

    A policy with an adapter needs no copy: its reference is the policy without the adapter.

    Raises:
        ValueError: a copy is needed, and `sequence_parallel_size` (ranks that share a sequence) is above 1.
    """
    policy = load_model(model, options)
    if processing_class is None and getattr(policy.config, "_name_or_path", None):
        processing_class = AutoTokenizer.from_pretrained(
            policy.config._name_or_path, trust_remote_code=options.trust_remote_code
        )
    if peft_config is not None:
        policy = add_adapter(policy, peft_config)
    if options.disable_dropout:
        disable_dropout(policy)
    # Before the optimizer's first step: the copy must be of the starting policy.
    needs_copy = needs_reference and not hasattr(policy, "peft_config")
    if needs_copy and sequence_parallel_size > 1:
        raise ValueError(
            f"beta is not 0, and {sequence_parallel_size} ranks share each sequence. TRL prepares the copy of the policy for "
            "data-parallel ranks only. Train an adapter (--use_peft), set --ref_logprobs require, or --beta 0."
        )
    return PreparedPolicy(policy, processing_class, make_reference_model(model, options) if needs_copy else None)


def load_model(model: str | PreTrainedModel | nn.Module, options: PolicyOptions) -> PreTrainedModel:
    """Return the policy: the instance itself, or the checkpoint loaded in float32 unless the options say otherwise."""
    init_kwargs = options.model_init_kwargs or {}
    assert isinstance(init_kwargs, dict), "TrainingArguments parses the options that are dictionaries"
    if not isinstance(model, str):
        if init_kwargs:
            raise ValueError(
                f"model_init_kwargs {init_kwargs} was given together with a model instance. They only act "
                "when the trainer loads the model. Leave them out, or pass the model as a string."
            )
        return model
    kwargs = {"trust_remote_code": options.trust_remote_code, **init_kwargs}
    # A step at lr 1e-6 is below the resolution of bf16 weights: updates would be rounded away.
    kwargs.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(model, **kwargs)


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> nn.Module:
    """Wrap the policy with a fresh adapter."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError(
            "A PeftModel was given together with a peft_config. It already has an adapter, and training a second one on "
            "top is not what is usually meant. Pass the base model, or leave peft_config out."
        )
    adapted: nn.Module = get_peft_model(model, peft_config)
    return adapted


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def make_reference_model(model: str | PreTrainedModel | nn.Module, options: PolicyOptions) -> PreTrainedModel:
    """Make the frozen copy of a model that has no adapter. A path is loaded again, which is the only way under ZeRO-3.

    Raises:
        ValueError: an instance, under ZeRO-3: there is no whole model in this process to copy.
    """
    if isinstance(model, str):
        reference = load_model(model, options)
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


def use_sparse_embedding_gradient(model: PreTrainedModel) -> bool:
    """Let a tied embedding give its gradient as the few rows that occur, not as a second matrix of the head's size.

    The sum with the head's gradient is dense again, so the optimizer sees no difference; what goes away is a matrix of
    zeros of that size, filled, added and dropped in each backward pass. Only for one process: DDP would expect a
    sparse sum.

    Returns whether it applies, which is when the weight is tied and trained.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    applies = (
        isinstance(embedding, nn.Embedding)
        and isinstance(head, nn.Linear)
        and embedding.weight is head.weight
        and embedding.weight.requires_grad
    )
    if applies:
        embedding.sparse = True
    return applies


def eos_token_ids(model: nn.Module, processing_class: Any, *, is_required: bool) -> frozenset[int] | None:
    """Tokens that end a completion: those of the tokenizer and of the generation config; None if there are none.

    Raises:
        PreflightError: there are none, and `is_required`.
    """
    of_generation = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [getattr(processing_class, "eos_token_id", None)]
    ids += of_generation if isinstance(of_generation, list) else [of_generation]
    found = frozenset(token_id for token_id in ids if token_id is not None)
    if not found and is_required:
        raise PreflightError(
            "mask_truncated_completions is on, and neither tokenizer nor generation config has an eos_token_id.",
            "Every rollout would count as truncated, and none would be trained.",
            "Pass a processing_class with an eos_token, or set --mask_truncated_completions false.",
        )
    return found or None
