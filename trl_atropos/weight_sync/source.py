"""What is published: every parameter of the policy, under the server's names, LoRA merged out of place.

The base weights are only read. Merging in place and subtracting again rounds twice per publish (1.3e-3 of drift after
100 cycles on a bf16 base) and leaves a merged model behind when a publish fails in the middle; here
`W.float() + delta.float()` goes into a fresh tensor that the transport casts once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import PreflightError
from .base import TensorSpec


PEFT_PREFIX = "base_model.model."


class PolicyWeights:
    """`WeightSource` of a plain model or of a PEFT model with LoRA adapters.

    Sent: all parameters once (tied ones under their first name, as in a checkpoint), with the sum of the deltas of the
    active adapters added; `modules_to_save` take the place of the modules that they replace.

    Args:
        model (`nn.Module`):
            The unwrapped policy.
        dtype (`torch.dtype`):
            The server's dtype; floating-point parameters are announced in it.

    Raises:
        [`PreflightError`]: naming the module, if it cannot be merged exactly: DoRA, LoRA biases, LoRA on a tied output
            head, quantised base weights, other tuners than LoRA; or if parameters are sharded over ranks.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model = model
        self.dtype = dtype
        self._check()
        self._specs = [
            TensorSpec(name, dtype if parameter.is_floating_point() else parameter.dtype, tuple(parameter.shape))
            for name, parameter, _ in self._entries()
        ]

    def manifest(self) -> list[TensorSpec]:
        """What iterating yields, in order."""
        return self._specs

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter, lora in self._entries():
            yield name, parameter.detach() if lora is None else _merged(parameter, lora)

    def _entries(self) -> Iterator[tuple[str, nn.Parameter, Any]]:
        """Yield (server name, base parameter, LoRA layer whose delta belongs to it or None)."""
        lora_layers = {name: module for name, module in self.model.named_modules() if _is_lora_layer(module)}
        for name, parameter in self.model.named_parameters():
            if _is_adapter_parameter(name):
                continue
            module_name, _, leaf = name.rpartition(".")
            layer = lora_layers.get(module_name.removesuffix(".base_layer"))
            if "modules_to_save" in name and not _is_active_copy(name, self.model):
                continue
            is_adapted = layer is not None and leaf == "weight" and not layer.disable_adapters
            yield _server_name(name), parameter, layer if is_adapted else None

    def _check(self) -> None:
        for name, parameter in self.model.named_parameters():
            if hasattr(parameter, "ds_id") and getattr(parameter, "ds_status", None) is not None:
                _refuse(name, "is partitioned by DeepSpeed ZeRO-3", "Use ZeRO-1 or ZeRO-2, or plain data parallelism.")
            if type(parameter.data).__name__ == "DTensor":
                _refuse(name, "is sharded by FSDP2 or tensor parallelism", "Use DDP or ZeRO-1/2.")
            if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
                _refuse(name, f"is quantised ({parameter.dtype})", "Load the base model without quantisation.")
        peft_config = getattr(self.model, "active_peft_config", None)
        if peft_config is not None and peft_config.is_prompt_learning:
            _refuse(type(peft_config).__name__, "learns a prompt, not weights", "Use LoRA (--use_peft).")
        tied = getattr(getattr(self.model, "config", None), "tie_word_embeddings", False)
        get_head = getattr(self.model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        for name, module in self.model.named_modules():
            saved = _saved_module(module)
            if tied and saved is not None and (module is head or type(saved) is nn.Embedding):
                _refuse(
                    name, "is trained apart from the embeddings that it is tied to", "Leave it out of modules_to_save."
                )
            if not _is_tuner_layer(module):
                continue
            if not _is_lora_layer(module):
                kind = type(module).__module__ + "." + type(module).__name__
                _refuse(name, f"is a {kind}", "Use LoRA on linear or embedding modules (--use_peft).")
            if module.merged:
                _refuse(name, "holds a merged adapter", "Call model.unmerge_adapter() before training.")
            variants = [
                type(module.lora_variant[a]).__name__ for a in module.active_adapters if a in module.lora_variant
            ]
            if variants:
                _refuse(name, f"uses {variants[0]}", "Use plain LoRA: --use_dora false, and no other variant.")
            if any(module.lora_bias.get(adapter, False) for adapter in module.active_adapters):
                _refuse(name, "has a LoRA bias", "Set lora_bias=False in the LoraConfig.")
            if tied and (module is head or type(module.get_base_layer()) is nn.Embedding):
                _refuse(
                    name,
                    "adapts one side of tied embeddings",
                    "Leave lm_head and embed_tokens out of --lora_target_modules.",
                )


def _refuse(name: str, what: str, fix: str) -> None:
    raise PreflightError(
        f"`{name}` {what}.", "Its merged weight cannot be computed exactly from what this rank holds.", fix
    )


def _is_tuner_layer(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _saved_module(module: nn.Module) -> nn.Module | None:
    """The original of a module that PEFT trains as a whole, or None."""
    from peft.utils import ModulesToSaveWrapper

    return module.original_module if isinstance(module, ModulesToSaveWrapper) else None


def _is_lora_layer(module: nn.Module) -> bool:
    from peft.tuners.lora import Embedding, Linear

    return isinstance(module, (Linear, Embedding))


def _is_adapter_parameter(name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith("lora_") for part in parts) or "original_module" in parts


def _is_active_copy(name: str, model: nn.Module) -> bool:
    """Whether `...modules_to_save.<adapter>...` names the copy of an active adapter."""
    adapter = name.split("modules_to_save.")[1].split(".")[0]
    return adapter in getattr(model, "active_adapters", [])


def _server_name(name: str) -> str:
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    if ".modules_to_save." in name:
        before, _, after = name.partition(".modules_to_save.")
        name = before + "." + after.split(".", 1)[1]
    return name


def _merged(weight: torch.Tensor, layer: Any) -> torch.Tensor:
    # Never in place: for a float32 base `float()` is the base itself.
    merged = weight.detach().float()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            merged = merged + layer.get_delta_weight(adapter).float()
    return merged
