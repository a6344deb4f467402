"""Makes the policy that is trained: load, adapt, switch dropout off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .atropos_config import AtroposConfig


if TYPE_CHECKING:
    from peft import PeftConfig


def load_model(model: str | PreTrainedModel | nn.Module, args: AtroposConfig) -> PreTrainedModel:
    """Return the policy: the instance itself, or the checkpoint loaded in float32 unless the options say otherwise."""
    init_kwargs = args.model_init_kwargs or {}
    assert isinstance(init_kwargs, dict), "TrainingArguments parses the options that are dictionaries"
    if not isinstance(model, str):
        if init_kwargs:
            raise ValueError(
                f"model_init_kwargs {init_kwargs} was given together with a model instance. They only act "
                "when the trainer loads the model. Leave them out, or pass the model as a string."
            )
        return model
    kwargs = {"trust_remote_code": args.trust_remote_code, **init_kwargs}
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
    return get_peft_model(model, peft_config)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
