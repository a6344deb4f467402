"""Which modules make up the policy that is served, behind the wrappers of PEFT and torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from .merging import base_layer, check_layer, is_trained, provenance, refuse


TRANSPARENT_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where torch.compile and torch's activation checkpointing keep the module that they wrap."""


@dataclass(frozen=True)
class ServedModule:
    """A module of the policy that holds tensors.

    `name` is its name in the base model, and `module` is the module, or the PEFT layer in its place. `leaves` holds
    the names of the tensors of the base layer, without those that are tied to an earlier one, and whether training can
    change them.
    """

    name: str
    module: nn.Module
    leaves: dict[str, bool]

    def full_name(self, leaf: str) -> str:
        """The name in the base model of one of the module's tensors."""
        return _join(self.name, leaf)


def served_modules(model: nn.Module) -> list[ServedModule]:
    """The modules of a policy in the order of its `state_dict`, tied tensors once under their first name.

    `model` is the base model, with the layers of PEFT in it.

    Raises:
        [`PreflightError`]: naming a module that cannot be served exactly.
    """
    # PEFT's copies of a module are not tied, and still the server has one tensor for both: tied is what was tied before.
    original = {_join(name, leaf): tensor for name, module in _walk(model, True) for leaf, tensor in _tensors(module)}
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    found: list[ServedModule] = []
    first_owners: dict[int, tuple[ServedModule, str]] = {}
    for name, module in _walk(model, False):
        check_layer(name, module)
        served = ServedModule(name, module, {})
        for leaf, _ in _tensors(module):
            full_name = served.full_name(leaf)
            identity = id(original.get(declared.get(full_name, full_name), original[full_name]))
            owner, owner_leaf = first_owners.setdefault(identity, (served, leaf))
            if provenance(module, leaf) != provenance(owner.module, owner_leaf):
                _refuse_untied(full_name, owner.full_name(owner_leaf))
            if owner is served and owner_leaf == leaf:
                served.leaves[leaf] = is_trained(module, leaf)
        found.append(served)
    return [served for served in found if served.leaves]


def fused_groups(names: Iterable[str]) -> dict[str, str]:
    """The group of modules that a server may keep in one piece, for each of `names`: those of all modules that hold
    tensors.
    """
    paths = {name: name.split(".") if name else [] for name in names}
    parents = {_join(*path[:-1]) for path in paths.values()}
    # Everything above a numbered layer: what hangs there is not part of a layer.
    above_layers = {
        _join(*path[:depth])
        for path in paths.values()
        for depth in range(next((i for i, part in enumerate(path) if part.isdigit()), 0))
    }
    groups = {}
    for name, path in paths.items():
        parent = _join(*path[:-1])
        experts = next((i for i, part in enumerate(path) if "expert" in part), None)
        if experts is not None:
            groups[name] = _join(*path[:experts])
        else:
            groups[name] = name if name in parents or parent in above_layers else parent
    return groups


def _walk(module: nn.Module, original: bool, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold tensors themselves, by their name in the base model, parents first.

    With `original`, those that the base model had before PEFT replaced some by copies.
    """
    if isinstance(module, ModulesToSaveWrapper):
        yield from _walk(module.original_module if original else _computing_copy(module), original, name)
        return
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    yield name, module
    if isinstance(module, BaseTunerLayer):
        return
    for child_name, child in module.named_children():
        is_wrapped = child_name in TRANSPARENT_WRAPPERS
        yield from _walk(child, original, name if is_wrapped else _join(name, child_name))


def _computing_copy(wrapper: ModulesToSaveWrapper) -> nn.Module:
    """Of the modules that a `ModulesToSaveWrapper` holds, the one that its `forward` calls."""
    adapters = wrapper.active_adapters
    is_passed_through = wrapper.disable_adapters or not adapters or any(a not in wrapper._adapters for a in adapters)
    chosen: nn.Module = wrapper.original_module if is_passed_through else wrapper.modules_to_save[adapters[0]]
    return chosen


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers that a module holds itself, as in its `state_dict`."""
    base = base_layer(module)
    for leaf, parameter in base._parameters.items():
        if parameter is not None:
            yield leaf, parameter
    for leaf, buffer in base._buffers.items():
        if buffer is not None and leaf not in base._non_persistent_buffers_set:
            yield leaf, buffer


def _refuse_untied(name: str, first: str) -> None:
    refuse(
        f"`{name}` is tied to `{first}` in the base model and trained apart from it",
        "Leave both out of --lora_target_modules and modules_to_save, or set ensure_weight_tying=True in the LoraConfig.",
        "The server has one tensor for both.",
    )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
