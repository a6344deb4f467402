"""The served tensors of one module of a PEFT model: LoRA merged out of place, in float32.

The base weights are only read. Merging in place and subtracting again rounds twice per publish (1.3e-3 of drift after
100 cycles on a bf16 base) and leaves a merged model behind when a publish fails in the middle.

What is computed is what `merge_and_unload(safe_merge=True)` computes for a float32 model, adapter after adapter in their
order: for LoRA `W + delta`, with `delta = scaling * B A`; for DoRA (https://huggingface.co/papers/2402.09353)
`magnitude / norm(W0 + delta) * (W + delta)`, with the norm of each output over the inputs and `W0` the base. PEFT's own
functions are not called: its `get_delta_weight` rounds to the dtype of the adapter, and its merge of DoRA leaves a norm
behind in the layer.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import nn

from ...errors import PreflightError
from .gathering import is_piece, whole_shape


LORA_LAYERS = {
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.layer.Embedding",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.bnb.Linear4bit",
}
"""Layers whose merged weight is known exactly. A subclass may compute something else."""

DORA_VARIANTS = (DoraLinearVariant, DoraEmbeddingVariant)

WHY_NOT_EXACT = "Its merged weight cannot be computed exactly from what this rank holds."


def base_layer(module: nn.Module) -> nn.Module:
    """The module that holds the weight in the base model: of a PEFT layer the one that it adapts, else itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def active_adapters(module: nn.Module) -> list[str]:
    """The adapters that take part in the forward pass of this module now, in their order."""
    if not isinstance(module, BaseTunerLayer) or module.disable_adapters:
        return []
    if isinstance(module, TrainableTokensLayer):
        return [adapter for adapter in module.active_adapters if adapter in module.trainable_tokens_delta]
    held = {*module.lora_A, *module.lora_embedding_A}
    return [adapter for adapter in module.active_adapters if adapter in held]


def served_tensor(module: nn.Module, leaf: str) -> torch.Tensor:
    """What the policy computes with, as one plain tensor.

    `module` is a LoRA layer, a layer of trainable tokens, or any other module, and its parameters are whole; `leaf` is
    the name of a parameter or buffer in its base layer. Where an adapter is merged, the result is float32 in fresh
    memory; else it is the tensor itself.
    """
    tensor = _dequantized(base_layer(module), leaf)
    adapters = active_adapters(module)
    if not adapters:
        return tensor
    if isinstance(module, TrainableTokensLayer):
        return _with_trained_tokens(tensor, module, adapters) if leaf == "weight" else tensor
    if leaf == "weight":
        return _merged_weight(tensor, module, adapters)
    if leaf == "bias":
        return _merged_bias(tensor, module, adapters)
    return tensor


def served_shape(module: nn.Module, leaf: str) -> tuple[int, ...]:
    """Shape of `served_tensor`, known without gathering or dequantising."""
    base: Any = base_layer(module)
    tensor = getattr(base, leaf)
    if get_bnb_param_type(tensor):
        return (base.out_features, base.in_features)
    return whole_shape(tensor)


def is_trained(module: nn.Module, leaf: str) -> bool:
    """Whether an optimizer step can change `served_tensor`."""
    if getattr(base_layer(module), leaf).requires_grad:
        return True
    adapters = active_adapters(module)
    return any(parameter.requires_grad for parameter in _adapter_parameters(module, leaf, adapters))


def provenance(module: Any, leaf: str) -> tuple[Any, ...]:
    """Return what is equal for two modules if and only if they compute with one and the same tensor, now and after
    training.
    """
    own: tuple[Any, ...] = (id(getattr(base_layer(module), leaf)),)
    for adapter in active_adapters(module):
        parameters = _adapter_parameters(module, leaf, [adapter])
        if isinstance(module, TrainableTokensLayer):
            own += (*map(id, parameters), tuple(module.token_indices[adapter]))
        elif leaf == "bias" or adapter in module.lora_variant or any(map(is_piece, parameters)):
            own += tuple(map(id, parameters))
        else:
            # With ensure_weight_tying PEFT makes the adapter of the head of transposed views of the embedding's.
            own += (*map(_memory, _factors(module, adapter)), module.scaling[adapter])
    return own


def check_layer(name: str, module: nn.Module) -> None:
    """Refuse a layer whose served tensors cannot be computed exactly. `name` stands in the message.

    Raises:
        [`PreflightError`]: naming the module.
    """
    if isinstance(module, BaseTunerLayer):
        _check_adapted(name, module)
    base = base_layer(module)
    for leaf, parameter in base._parameters.items():
        if parameter is None or get_bnb_param_type(parameter):
            continue
        kind = type(parameter.data)
        is_packed = not parameter.is_floating_point() or parameter.dtype.itemsize < 2
        if is_packed or kind.__module__.startswith("torchao."):
            what = f"`{name}.{leaf}` is quantised ({kind.__name__} of {parameter.dtype})"
            refuse(what, "Load the base model without quantisation, or with bitsandbytes.")


def refuse(what: str, fix: str, why: str = WHY_NOT_EXACT) -> None:
    """Raise the error of a policy that cannot be published."""
    raise PreflightError(f"{what}.", why, fix)


def _check_adapted(name: str, layer: BaseTunerLayer) -> None:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if layer.merged:
        refuse(f"`{name}` holds a merged adapter", "Call model.unmerge_adapter() before training.")
    if isinstance(layer, TrainableTokensLayer):
        return
    if kind not in LORA_LAYERS:
        refuse(f"`{name}` is a {kind}", "Use LoRA on linear or embedding modules (--use_peft).")
    has_lora_bias = False
    for adapter in active_adapters(layer):
        variant = layer.lora_variant.get(adapter)
        is_dora = type(variant) in DORA_VARIANTS
        if variant is not None and not is_dora:
            refuse(f"`{name}` uses {type(variant).__name__}", "Use LoRA, rsLoRA or DoRA, and no other variant.")
        if is_dora and has_lora_bias:
            refuse(
                f"`{name}` has the DoRA adapter '{adapter}' after one with a LoRA bias",
                "Activate one of the two adapters.",
                "In the forward pass DoRA scales that bias, and in a merge it does not.",
            )
        has_lora_bias = has_lora_bias or layer.lora_bias[adapter]
    if has_lora_bias and getattr(layer.get_base_layer(), "bias", None) is None:
        refuse(
            f"`{name}` has a LoRA bias and its base layer has none",
            "Set lora_bias=False in the LoraConfig.",
            "The server's model has no tensor that could hold it.",
        )


def _dequantized(base: Any, leaf: str) -> torch.Tensor:
    parameter = getattr(base, leaf)
    if not get_bnb_param_type(parameter):
        whole: torch.Tensor = parameter.detach()
        return whole
    if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
        return _unpacked(parameter)
    # PEFT's `dequantize_module_weight` would write into the layer's state and put a new parameter in its place.
    state = getattr(base, "state", None)
    scales = parameter.SCB if state is not None and state.SCB is None else getattr(state, "SCB", None)
    dequantized: torch.Tensor = dequantize_bnb_weight(parameter, state=SimpleNamespace(SCB=scales))
    return dequantized.detach()


def _unpacked(parameter: Any) -> torch.Tensor:
    """Dequantise a 4-bit weight that bitsandbytes rearranged for AVX512, which it does in eval mode on a CPU.

    `dequantize_4bit` of bitsandbytes 0.50 reads it as if it were not rearranged, and its own inverse leaves the scales as
    they are.
    """
    from bitsandbytes import functional

    state = copy.copy(parameter.quant_state)
    state.original_nested = False
    data, state = functional._convert_weight_packed_for_cpu_inverse(parameter.data, state)
    state.absmax = parameter.quant_state.absmax.T.reshape(-1).float()
    dequantized: torch.Tensor = functional.dequantize_4bit(data, state)
    return dequantized


def _factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`(left, right)` with `delta = scaling * left @ right` in the orientation of the base weight."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter].T
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return (a.T, b.T) if _is_transposed(layer) else (b, a)


def _is_transposed(layer: Any) -> bool:
    return getattr(layer, "fan_in_fan_out", False)


def _merged_weight(weight: torch.Tensor, layer: Any, adapters: list[str]) -> torch.Tensor:
    merged = weight
    for adapter in adapters:
        left, right = _factors(layer, adapter)
        delta = (left.detach().float() @ right.detach().float()).mul_(layer.scaling[adapter])
        if adapter not in layer.lora_variant:
            merged = delta.add_(merged)
            continue
        # The outputs of an embedding and of a transposed linear layer are the columns.
        inputs = 0 if adapter in layer.lora_embedding_A or _is_transposed(layer) else 1
        norm = torch.linalg.vector_norm(weight.float() + delta, dim=inputs, keepdim=True)
        magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()
        merged = delta.add_(merged).mul_(magnitude.view_as(norm) / norm)
    return merged


def _merged_bias(bias: torch.Tensor, layer: Any, adapters: list[str]) -> torch.Tensor:
    merged = bias
    for adapter in adapters:
        if layer.lora_bias[adapter]:
            merged = merged.float() + layer.lora_B[adapter].bias.detach().float() * layer.scaling[adapter]
    return merged


def _with_trained_tokens(weight: torch.Tensor, layer: Any, adapters: list[str]) -> torch.Tensor:
    for adapter in adapters:
        rows = torch.tensor(layer.token_indices[adapter], device=weight.device)
        weight = weight.index_copy(0, rows, layer.trainable_tokens_delta[adapter].detach().to(weight.dtype))
    return weight


def _adapter_parameters(module: Any, leaf: str, adapters: list[str]) -> list[nn.Parameter]:
    """The parameters, beside those of the base layer, that a served tensor depends on."""
    if leaf not in ("weight", "bias"):
        return []
    if isinstance(module, TrainableTokensLayer):
        return [module.trainable_tokens_delta[adapter] for adapter in adapters] if leaf == "weight" else []
    found: list[nn.Parameter] = []
    for adapter in adapters:
        if leaf == "bias":
            found += [module.lora_B[adapter].bias] if module.lora_bias[adapter] else []
        elif adapter in module.lora_embedding_A:
            found += [module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]]
        else:
            found += [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
        if leaf == "weight" and adapter in module.lora_magnitude_vector:
            found.append(module.lora_magnitude_vector[adapter].weight)
    return found


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what is equal for two tensors if and only if they are the same numbers in the same memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
