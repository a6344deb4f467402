"""The LoRA adapter of a policy as vLLM loads it: in the place of merged weights a few megabytes.

vLLM computes `W x + scaling * B A x` with the weights `W` that it was started with, on linear layers, from a directory in
PEFT's format. Everything else that PEFT can train it drops, or reads as something else, without a word; such an adapter
is refused here and can be published merged.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import get_bnb_param_type
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...errors import PreflightError
from .gathering import gathered, is_piece, reshard
from .modules import TRANSPARENT_WRAPPERS


SERVABLE_LAYER = "peft.tuners.lora.layer.Linear"

HARMLESS_INITS = ("gaussian", "eva", "orthogonal")
"""Named ways to begin that leave the base model as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""

FIX = "Set --weight_sync_mode merged, or auto."


@dataclass(frozen=True)
class Adapter:
    """The active adapter of a policy, whole, on the CPU.

    `tensors` have PEFT's names and the server's dtype, and `config` is the adapter's own. Gathering and copying took
    `gather_s` seconds.
    """

    tensors: dict[str, torch.Tensor]
    config: LoraConfig
    gather_s: float


@dataclass(frozen=True)
class AdapterNeeds:
    """What a server must offer for an adapter: the largest rank of its layers, and the last parts of the names of the
    modules that it changes.
    """

    rank: int
    modules: frozenset[str]


def check_adapter(model: nn.Module) -> AdapterNeeds:
    """Refuse a policy that is more than its base model and one plain LoRA adapter.

    `model` is the unwrapped policy. Returns what a server must offer, for
    [`~weight_sync.transports.adapter_files.check_server`].

    Raises:
        [`PreflightError`]: naming what vLLM cannot serve.
    """
    if not isinstance(model, PeftModel):
        _refuse(
            f"{type(model).__name__} has no LoRA adapter", fix="Train with --use_peft, or set --weight_sync_mode full."
        )
    policy: Any = model
    if len(policy.active_adapters) != 1:
        _refuse(f"{len(policy.active_adapters)} adapters are active ({', '.join(policy.active_adapters)})")
    (adapter,) = policy.active_adapters
    _check_config(adapter, policy.peft_config[adapter])
    head = policy.get_base_model().get_output_embeddings()
    ranks: dict[str, int] = {}
    ours: set[int] = set()
    for name, module in policy.get_base_model().named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            _refuse(f"`{name}` is trained as a whole ({type(module).__name__})", "A LoRA adapter cannot carry it.")
        if any(get_bnb_param_type(parameter) for parameter in module._parameters.values() if parameter is not None):
            _refuse(f"`{name}` is quantised", "The server would add the adapter to weights that are not.")
        if not isinstance(module, BaseTunerLayer):
            continue
        _check_layer(name, module, adapter, is_head=module is head)
        if adapter in module.lora_A:
            ranks[name] = module.r[adapter]
            ours |= {id(factor.weight) for factor in _factors(module, adapter).values()}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            _refuse(f"`{name}` is trained beside the adapter '{adapter}'", "A LoRA adapter cannot carry it.")
    return AdapterNeeds(max(ranks.values()), frozenset(name.rpartition(".")[2] for name in ranks))


@torch.no_grad()
def take_adapter(model: PeftModel, dtype: torch.dtype) -> Adapter:
    """Copy the active adapter. If the model is sharded, a collective: call it on every rank.

    An error on one rank is raised after this rank took part in all gathering. `check_adapter` has accepted the model.
    `dtype` is the server's, into which vLLM would cast.
    """
    start = time.perf_counter()
    (adapter,) = model.active_adapters
    reshard(model)
    factors = {
        f"base_model.model.{_checkpoint_name(name)}.{kind}.weight": factor
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer) and adapter in module.lora_A
        for kind, factor in _factors(module, adapter).items()
    }
    is_collective = any(is_piece(factor.weight) for factor in factors.values())
    tensors: dict[str, torch.Tensor] = {}
    failure: BaseException | None = None
    for name, factor in factors.items():
        # Not the layer: its base weight is not needed.
        with gathered(factor) if is_collective else nullcontext():
            try:
                tensors[name] = factor.weight.detach().to("cpu", dtype, copy=True).contiguous()
            except BaseException as exc:
                if not is_collective:
                    raise
                failure = failure or exc
    if failure is not None:
        raise failure
    config = copy.copy(model.peft_config[adapter])
    config.inference_mode = True
    return Adapter(tensors, config, time.perf_counter() - start)


def _factors(layer: Any, adapter: str) -> dict[str, Any]:
    return {"lora_A": layer.lora_A[adapter], "lora_B": layer.lora_B[adapter]}


def _checkpoint_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in TRANSPARENT_WRAPPERS)


def _check_config(adapter: str, config: Any) -> None:
    if not isinstance(config, LoraConfig):
        _refuse(f"The adapter '{adapter}' is a {type(config).__name__}")
    init = config.init_lora_weights
    if isinstance(init, str) and init not in HARMLESS_INITS:
        _refuse(
            f"The adapter '{adapter}' has init_lora_weights='{init}'",
            "That changes the base model, which is not sent with the adapter.",
        )
    for name in ("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"):
        if getattr(config, name):
            _refuse(f"The adapter '{adapter}' has {name}={getattr(config, name)}", "A LoRA adapter cannot carry it.")
    for name in ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens"):
        if getattr(config, name):
            _refuse(f"The adapter '{adapter}' has {name}={getattr(config, name)}")
    if config.bias != "none":
        _refuse(f"The adapter '{adapter}' has bias='{config.bias}'", "A LoRA adapter cannot carry trained biases.")


def _check_layer(name: str, layer: Any, adapter: str, is_head: bool) -> None:
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if is_head or kind == "peft.tuners.lora.layer.Embedding":
        _refuse(
            f"The adapter '{adapter}' targets `{name}`, the {'output head' if is_head else 'embeddings'}",
            "vLLM leaves it out of what it answers (https://github.com/vllm-project/vllm/issues/51594).",
        )
    if kind != SERVABLE_LAYER or adapter in layer.lora_variant:
        variant = layer.lora_variant.get(adapter) if kind == SERVABLE_LAYER else None
        _refuse(f"`{name}` is a {kind if variant is None else type(variant).__name__}")
    if layer.merged or layer.disable_adapters:
        _refuse(
            f"The adapter '{adapter}' is {'merged' if layer.merged else 'disabled'} in `{name}`",
            "The server would add it once more, or add what the trainer does not.",
            "Call model.unmerge_adapter() or model.enable_adapter_layers() before training.",
        )
    if adapter not in layer.lora_A:
        return
    rank = layer.r[adapter]
    scaling = layer.lora_alpha[adapter] / (math.sqrt(rank) if layer.use_rslora[adapter] else rank)
    if not math.isclose(layer.scaling[adapter], scaling):
        _refuse(
            f"`{name}` scales the adapter '{adapter}' by {layer.scaling[adapter]}, its rank and alpha give {scaling}",
            "vLLM computes the factor from rank and alpha.",
        )


def _refuse(what: str, why: str = "vLLM cannot serve it as an adapter.", fix: str = FIX) -> None:
    raise PreflightError(f"{what}.", why, fix)
