"""A second set of weights beside those that a vLLM worker serves: the next policy is loaded into it while the server goes on,
and a pause only has to swap.

vLLM imports this file inside its workers. A twin has the modules of the model once more, with parameters of their own and
everything else in common, so that the model's own `load_weights` and vLLM's layerwise reload work on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,
    _get_original_loader,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import sanitize_layer_refs
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo


MEMORY_FACTOR = 1.25
"""How much memory has to be free, over the size of the policy: a layer is there once more while it is packed."""

PLAIN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
"""Ways to hold weights that change nothing but the module that they belong to. That of experts makes their kernel, and is a
module itself: a twin has its own."""

EXPERT_BACKENDS = (UnquantizedMoeBackend.CPU, UnquantizedMoeBackend.TRITON)
"""Kernels for experts that leave the weights they compute with in the layer."""

STATE_OF_MODULE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class ModelTwin:
    """The twin of a model that is being served, which may go on while the twin is loaded.

    `root` is the model's counterpart. What was loaded has to be placed in it by the layerwise reload before `swap`.
    """

    def __init__(self, model: nn.Module):
        self._twins: dict[nn.Module, nn.Module] = {}
        self._before: dict[nn.Module, dict[str, Any]] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.root = self._make(model)

    def swap(self, loaded: set[nn.Module]) -> None:
        """Give the model the weights of those modules of the twin, in the tensors that it computes with, and what else their
        loading has made."""
        with torch.no_grad():
            for module, twin in self._twins.items():
                if twin not in loaded:
                    continue
                for own, others in ((module._parameters, twin._parameters), (module._buffers, twin._buffers)):
                    for name, tensor in own.items():
                        other = others[name]
                        if tensor is not None and other is not None and tensor is not other:
                            tensor.data.copy_(other.data)
                before = self._before[module]
                for name, value in twin.__dict__.items():
                    if name not in STATE_OF_MODULE and value is not before.get(name):
                        module.__dict__[name] = value

    def release(self) -> None:
        """Give its memory back now: modules and the loaders of their parameters refer to each other, and what vLLM knows of a
        module keeps it.
        """
        for twin in self._twins.values():
            LAYERWISE_INFO.pop(twin, None)
            twin.__dict__.clear()
        self._twins.clear()
        self._before.clear()
        self._tensors.clear()

    def _make(self, module: nn.Module) -> nn.Module:
        twin = self._twins.get(module)
        if twin is not None:
            return twin
        twin = module.__class__.__new__(module.__class__)
        self._twins[module] = twin
        self._before[module] = dict(module.__dict__)
        twin.__dict__.update(module.__dict__)
        has_parameters = any(parameter is not None for parameter in module._parameters.values())
        # What a module without parameters keeps in buffers is no weight.
        twin.__dict__["_buffers"] = {
            name: self._tensor(buffer, copies=True) if has_parameters and not self._is_view(buffer) else buffer
            for name, buffer in module._buffers.items()
        }
        twin.__dict__["_parameters"] = {
            name: self._tensor(parameter, copies=False) for name, parameter in module._parameters.items()
        }
        twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        twin.__dict__["_modules"] = {
            name: None if child is None else self._make(child) for name, child in module._modules.items()
        }
        info, own = get_layerwise_info(module), get_layerwise_info(twin)
        parameters, buffers = info.restore_metadata
        own.restore_metadata = (_for_another(parameters, module), _for_another(buffers, module))
        own.restore_device = info.restore_device
        return twin

    def _is_view(self, buffer: torch.Tensor | None) -> bool:
        """Whether a buffer shows a parameter of the model: it follows when that takes its new weights."""
        return buffer is not None and buffer.untyped_storage().data_ptr() in self._storages

    def _tensor(self, tensor: torch.Tensor | None, *, copies: bool) -> Any:
        """Another tensor of its kind; the same one for a parameter that two modules share."""
        if tensor is None:
            return None
        twin = self._tensors.get(id(tensor))
        if twin is None:
            twin = tensor.data.clone() if copies else torch.empty_like(tensor.data)
            twin.__class__ = tensor.__class__
            twin.__dict__.update(tensor.__dict__)
            self._tensors[id(tensor)] = twin
        return twin


def _for_another(metadata: dict[str, torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
    """Metadata of a module for its twin: without the loaders that an earlier update of the module has left in it."""
    copies = {}
    for name, tensor in metadata.items():
        copy = to_meta_tensor(tensor)
        if hasattr(copy, "weight_loader"):
            copy.weight_loader = _get_original_loader(copy)
        copies[name] = sanitize_layer_refs(copy, module)
    return copies


def loaded_modules(root: nn.Module) -> set[nn.Module]:
    """The modules of which something was loaded since the reload began, and before it is finished."""
    return {module for module in root.modules() if _is_loaded(get_layerwise_info(module))}


def _is_loaded(info: LayerReloadingInfo) -> bool:
    # A layer that is complete was processed, and takes nothing more.
    return not info.can_load() or info.load_numel > 0


def why_no_twin(model: nn.Module, device: torch.device) -> str | None:
    """Why a policy cannot be loaded beside the one that this model serves, or None if it can."""
    for name, module in model.named_modules():
        why = _why_not_plain(module)
        if why is not None:
            return f"{name} {why}"
    needed = MEMORY_FACTOR * _num_bytes(model)
    free = _available_bytes() if device.type == "cpu" else _available_device_bytes(device)
    if free < needed:
        return f"{needed / 1e9:.1f} GB are needed for it, and {free / 1e9:.1f} GB are free"
    return None


def _why_not_plain(module: nn.Module) -> str | None:
    """Why a module has weights outside of its own tensors, or others than its own, or None if it has not."""
    method = getattr(module, "quant_method", None)
    if method is not None and not isinstance(method, PLAIN_METHODS) and next(_tensors(module), None) is not None:
        return f"holds its weights as {type(method).__name__} does"
    if isinstance(method, UnquantizedFusedMoEMethod):
        if method.moe.moe_parallel_config.enable_eplb:
            return "has experts that move between workers (--enable-eplb)"
        if method.unquantized_backend not in EXPERT_BACKENDS:
            return f"has experts whose kernel is {method.unquantized_backend.value}"
    if hasattr(module, "base_layer"):
        return "is wrapped for adapters"
    return None


def _available_bytes() -> int:
    """Host memory, in bytes, that processes can still be given without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _available_device_bytes(device: torch.device) -> int:
    """Memory of a GPU, in bytes, that this process can still be given, with what its allocator keeps of a twin before."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    # Of the checkpoint: what a kernel has packed may not be among the parameters any more.
    for tensors in get_layerwise_info(module).restore_metadata:
        yield from tensors.values()


def _num_bytes(model: nn.Module) -> int:
    metadata = {id(tensor): tensor for module in model.modules() for tensor in _tensors(module)}
    return sum(tensor.numel() * tensor.element_size() for tensor in metadata.values())
