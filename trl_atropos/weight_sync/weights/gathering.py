"""Whole parameters of one module of a model whose parameters are sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only pieces of some parameters: DeepSpeed ZeRO-3, FSDP2, or tensor parallelism.

    The model is unwrapped. ZeRO-1 and ZeRO-2 leave its parameters whole.
    """
    # A module of FSDP2 may hold whole parameters between its forward and its backward pass.
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        is_piece(parameter) for parameter in model.parameters()
    )


def is_piece(parameter: torch.Tensor) -> bool:
    """Whether this rank may hold only a piece of a parameter."""
    return is_zero3(parameter) or isinstance(parameter, DTensor)


def is_zero3(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 partitions this parameter."""
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_status")


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of a parameter over all ranks, known without gathering it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def reshard(model: nn.Module) -> None:
    """Have FSDP2 hold every module of a model in pieces again, on this rank alone.

    After a forward pass without a backward some stay whole, and in the dtype of mixed precision; the pieces are exact.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def tensor_holders(module: nn.Module) -> list[nn.Module]:
    """The modules whose parameters make up one module of the policy.

    For a layer of PEFT these are base layer and adapters; for any other module, itself without its children.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return list(module.modules()) if isinstance(module, BaseTunerLayer) else [module]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the context, the parameters of one module are plain and whole; afterwards they are the same objects
    again.

    These are the parameters of all its `tensor_holders`. A collective for a sharded module: every rank enters in the
    same order. What is gathered lives until the context ends, so that at most one module is whole at a time.
    """
    holders = tensor_holders(module)
    partitioned = [p for holder in holders for p in holder._parameters.values() if p is not None and is_zero3(p)]
    if not partitioned:
        with _whole_dtensors(holders):
            yield
        return
    import deepspeed

    # The same parameter twice would be partitioned twice.
    unique = list({id(parameter): parameter for parameter in partitioned}.values())
    with deepspeed.zero.GatheredParameters(unique):
        yield


@contextmanager
def _whole_dtensors(holders: list[nn.Module]) -> Iterator[None]:
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for holder in holders:
            held: list[dict[str, Any]] = [holder._parameters, holder._buffers]
            for tensors in held:
                for name, tensor in tensors.items():
                    if isinstance(tensor, DTensor):
                        replaced.append((tensors, name, tensor))
                        tensors[name] = _whole(tensor)
        yield
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def _whole(tensor: DTensor) -> torch.Tensor:
    # To the device of the mesh: offloaded parameters are on the CPU, where it may have no collectives.
    on_mesh: Any = tensor.detach().to(tensor.device_mesh.device_type)
    whole: torch.Tensor = on_mesh.full_tensor()
    return nn.Parameter(whole, requires_grad=False) if isinstance(tensor, nn.Parameter) else whole
