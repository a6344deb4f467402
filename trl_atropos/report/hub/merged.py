"""The policy with its adapters merged, as a checkpoint of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedTokenizerBase

from ...errors import PreflightError
from ...weight_sync.weights.source import PolicyWeights


MERGED_DIR = "merged"


def check_mergeable(model: Any) -> None:
    """Refuse an unwrapped policy that cannot be merged, before it is trained for that.

    Raises:
        [`PreflightError`]: the policy has no adapter, or one that cannot be merged exactly.
    """
    if not hasattr(model, "peft_config"):
        raise PreflightError(
            "`push_merged` is set and the model has no adapter.",
            "There is nothing to merge: the model is uploaded whole anyway.",
            "Leave out --push_merged, or train an adapter with --use_peft.",
        )
    PolicyWeights(model, _dtype(model.get_base_model()))


def save_merged(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, directory: Path, is_main_process: bool = True
) -> None:
    """Write a PEFT model as one model without adapters. The model itself is only read. Collective if it is sharded.

    It is merged as it is published: [`~weight_sync.weights.source.PolicyWeights`]. The whole merged model is held in
    host memory once. `model` is the unwrapped policy; the tokenizer, if there is one, is saved with it. Only the main
    process writes.

    Raises:
        [`PreflightError`]: the policy cannot be merged exactly.
    """
    base = model.get_base_model()
    weights = PolicyWeights(model, _dtype(base))
    tensors: dict[str, torch.Tensor] = {}
    specs = weights.manifest()
    dtypes = {spec.name: spec.dtype for spec in specs}
    for name, tensor in weights.tensors(specs):
        if is_main_process:
            tensors[name] = tensor.to("cpu", dtypes[name], copy=True).contiguous()
    if not is_main_process:
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, directory, metadata={"format": "pt"})
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = _dtype(base)
    config.save_pretrained(directory)
    if base.can_generate() and base.generation_config is not None:
        base.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _dtype(base: Any) -> torch.dtype:
    """The dtype of the weights that are not quantised."""
    dtypes = (p.dtype for p in base.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(dtypes, torch.float32)
