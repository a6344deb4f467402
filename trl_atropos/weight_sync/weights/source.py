"""What is published: everything that a checkpoint of the policy holds, under the server's names.

served_modules     which module computes, behind the wrappers of PEFT and torch
gathered           its parameters whole, one module at a time
served_tensor      LoRA merged, quantised weights dequantised
CheckpointNames    as the base checkpoint has them
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from peft.utils.integrations import get_bnb_param_type
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..base import TensorSpec
from .checkpoint_names import CheckpointNames
from .gathering import gathered, is_sharded, reshard
from .merging import base_layer, refuse, served_shape, served_tensor
from .modules import ServedModule, fused_groups, served_modules


class PolicyWeights:
    """`WeightSource` of a model: plain, with LoRA adapters, or sharded over ranks by DeepSpeed ZeRO-3 or FSDP2.

    What a checkpoint holds is sent: all parameters and the persistent buffers, tied ones once under their first name.
    LoRA is merged out of place, `modules_to_save` take the place of the modules that they replace, and a bitsandbytes
    base is dequantised. The state of the model counts at the time of each call: which adapters are active, and whether
    they are enabled.

    A tensor `is_trained` if training can change one of its group. vLLM reloads a fused module whole (q, k, v; gate,
    up; all experts of a layer), and what it fuses are siblings: so it is for every `packed_modules_mapping` and
    `stacked_params_mapping` of the models of vLLM 0.32, fused_qkv_a_proj of DeepSeek included. A group is therefore
    what lies below the parent of the module that holds the tensor, and all of a layer's experts with what routes to
    them; modules beside the list of layers (embeddings, last norm, head) are a group each.

    `model` is the unwrapped policy. `dtype` is the server's, in which parameters are announced; buffers keep theirs,
    because those of the gates of experts are in float32 on the server, too. `is_collective` says whether the ranks
    must iterate together. `gather_s` and `merge_s` are the seconds that the last iteration spent in gathering, and in
    merging and dequantising.

    Raises:
        [`PreflightError`]: naming the module, if it cannot be served exactly: other tuners than LoRA, other variants than
            DoRA, a merged adapter, one side of tied embeddings trained apart, quantised weights other than
            bitsandbytes', FSDP1.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        _check_model(model)
        self.dtype = dtype
        self.is_collective = is_sharded(model)
        self.gather_s = 0.0
        self.merge_s = 0.0
        self._model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._names: CheckpointNames
        self.manifest()

    def manifest(self) -> tuple[TensorSpec, ...]:
        """All tensors in order. Nothing is gathered or computed.

        Raises:
            [`PreflightError`]: if a module cannot be served exactly, as the class says.
        """
        modules = served_modules(self._model)
        self._names = CheckpointNames(self._model, {served.name: self._announced(served) for served in modules})
        groups = fused_groups(served.name for served in modules)
        trained = {groups[served.name] for served in modules if any(served.leaves.values())}
        return tuple(
            TensorSpec(name, tensor.dtype, tuple(tensor.shape), groups[served.name] in trained)
            for served in modules
            for name, tensor in self._names.of_module(served.name).items()
        )

    @torch.no_grad()
    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for each of `specs`, gathering each module that holds one of them.

        `specs` is a part of the manifest in its order, the same on every rank. If the policy is sharded, an error on
        one rank, or a consumer that stops, ends the iteration only after this rank took part in all gathering: the
        other ranks wait for it.
        """
        self.gather_s = self.merge_s = 0.0
        reshard(self._model)
        wanted = {spec.name for spec in specs}
        failure: BaseException | None = None
        for served in served_modules(self._model):
            if wanted.isdisjoint(self._names.of_module(served.name)):
                continue
            start = time.perf_counter()
            with gathered(served.module):
                self.gather_s += time.perf_counter() - start
                if failure is not None:
                    continue
                try:
                    yield from self._computed(served, wanted)
                except (Exception, GeneratorExit) as exc:
                    if not self.is_collective:
                        raise
                    failure = exc
        if failure is not None:
            raise failure

    def _announced(self, served: ServedModule) -> dict[str, torch.Tensor]:
        """The tensors of a module as they will be sent, without memory."""
        tensors = {}
        for leaf in served.leaves:
            tensor = getattr(base_layer(served.module), leaf)
            is_cast = get_bnb_param_type(tensor) or isinstance(tensor, nn.Parameter)
            shape = served_shape(served.module, leaf)
            dtype = self.dtype if is_cast else tensor.dtype
            tensors[served.full_name(leaf)] = torch.empty(shape, dtype=dtype, device="meta")
        return tensors

    def _computed(self, served: ServedModule, wanted: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The wanted tensors of a module whose parameters are whole."""
        leaves = {served.full_name(leaf): leaf for leaf in served.leaves}
        for names in self._names.convertible(leaves):
            start = time.perf_counter()
            converted = self._names.convert({name: served_tensor(served.module, leaves[name]) for name in names})
            self.merge_s += time.perf_counter() - start
            yield from ((name, tensor) for name, tensor in converted.items() if name in wanted)


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            refuse(
                f"`{name or type(model).__name__}` is sharded by FSDP1",
                "Use FSDP2 (fsdp_version: 2 in the configuration of accelerate) or DeepSpeed ZeRO-3.",
                "Its parameters exist only inside summon_full_params, whose memory is freed when that context ends.",
            )
    if not isinstance(model, PeftModel):
        return
    for adapter in model.active_adapters:
        config = model.peft_config[adapter]
        if config.peft_type != "LORA":
            learns = "learns a prompt, not weights" if config.is_prompt_learning else "is not LoRA"
            refuse(f"The adapter '{adapter}' ({type(config).__name__}) {learns}", "Use LoRA (--use_peft).")
