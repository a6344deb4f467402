"""What our vLLM worker engines share: a policy is loaded layer by layer, and half of one is never served.

vLLM imports this file inside its workers. A policy is loaded in the place of the served one, or, `is_beside`, into a twin
beside it (`twin_engine.py`) while the server goes on. From the first tensor to the finish of the update every parameter of what is
loaded lies on the meta device; vLLM collects what is loaded and puts a layer in place, prepacked, as soon as it is
complete. A layer of which nothing is loaded gets its kernel tensors back at the end, a layer of which a part is loaded
would be filled up with uninitialised memory.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import threading
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from .reports import WorkerReport
from .twin_engine import ModelTwin, loaded_modules, why_no_twin


logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 1e-4
"""After which the serving thread lets the one that builds go on, instead of Python's 5 ms."""

NUM_NAMED = 3
"""How many names an error lists."""

COPY_SIGNATURE = inspect.signature(default_weight_loader)
EXPERT = re.compile(r"(\.experts)\.\d+\..*")


@dataclass
class LayerwiseUpdateInfo(WeightTransferUpdateInfo):
    """What a transfer carries, one entry per tensor and in loading order.

    `sequence` is the number of this transfer, repeated in the worker's report. `is_complete` says whether every
    parameter of the served model is sent; if not, the modules that are not named stay. `is_beside` says that the server
    goes on with its policy meanwhile, and takes the new one at the finish. `names` are checkpoint names,
    `dtype_names` are spelt like `"bfloat16"`, and `offsets` are the byte offsets of the tensors in the memory that
    they travel in.
    """

    sequence: int
    is_complete: bool
    is_beside: bool
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]


TInitInfo = TypeVar("TInitInfo", bound=WeightTransferInitInfo)
TUpdateInfo = TypeVar("TUpdateInfo", bound=LayerwiseUpdateInfo)


class LayerwiseEngine(WeightTransferEngine[TInitInfo, TUpdateInfo]):
    """Base of engines that load whole tensors into vLLM's layerwise reload.

    A subclass connects in `connect`, calls `load` from `receive`, and brings what that returns to the trainer in `report`.

    One update takes one transfer; a second one replaces the first and so has to be complete. An update that a trainer
    left open is ended by the next one. A partial transfer needs a worker that holds a complete policy of the trainer
    that is connected.
    """

    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._is_updating = False
        self._is_complete = False
        # What is loaded into: the served model, or its twin; None until the first tensor of an update.
        self._root: nn.Module | None = None
        self._twin: ModelTwin | None = None
        # Loads the twin, and ends with the error that has kept it from that.
        self._builder: threading.Thread | None = None
        self._build_error: BaseException | None = None
        # Of the twin, once it is whole.
        self._built: set[nn.Module] | None = None
        # Whether the model, outside of an update, is a complete policy of the connected trainer.
        self._has_policy = False
        self._expected: set[str] = set()
        self._loaded: set[str] = set()
        # Aliases of tied parameters -> the name that is loaded.
        self._tied: dict[str, str] = {}
        # Checkpoint names that are known to end in a parameter.
        self._known: set[str] = set()
        # Whether `load_weights` of the model copies into some parameters itself; None before the first load.
        self._copies_itself: bool | None = None
        # What computes with the experts of a layer, by the method that packs them.
        self._expert_kernels: dict[FusedMoEMethodBase, Any] = {}
        # What a complete policy fills of the layers that are allocated larger than it, by the name of the layer.
        self._padded_numel: dict[str, int] = {}

    @property
    def worker(self) -> int:
        """Number of this worker among all tensor-, pipeline- and data-parallel ones of the server, from 0."""
        config = self.parallel_config
        number: int = config.data_parallel_index * config.world_size + config.rank
        return number

    def init_transfer_engine(self, init_info: TInitInfo) -> None:
        """Connect to a trainer. A second call replaces the first: the trainer was restarted, or connects again."""
        # Whatever was built was built for the trainer that was connected before.
        self._drop_twin()
        self.shutdown()
        self._has_policy = False
        self._check_model()
        self.connect(init_info)

    def why_not_beside(self) -> str:
        """Why this worker cannot load a policy beside the served one; empty if it can."""
        if self.parallel_config.pipeline_parallel_size > 1:
            return "the server has pipeline stages"
        return why_no_twin(self.model, self.device) or ""

    def _check_model(self) -> None:
        for name, module in self.model.named_modules():
            if getattr(module, "is_amx_bmm_enabled", False):
                raise RuntimeError(
                    f"{name} of the served model is attention with a compressed cache (MLA), of which vLLM's CPU backend keeps "
                    "packed weights only: a new policy has no place to go. Serve this model on a GPU, or on a CPU without AMX."
                )

    @abstractmethod
    def connect(self, init_info: TInitInfo) -> None:
        """Connect to a trainer. The engine is not connected when this is called."""

    def start_weight_update(self) -> None:
        """Begin an update; the served model changes with the first tensor that is not loaded beside it."""
        if self._is_updating:
            self._drop_twin()
            if self._root is not None:
                # An update that was never finished left some layers processed and others with half of their tensors
                # buffered. Ending it gives every layer its kernel tensors, of which a complete policy replaces all.
                finalize_layerwise_reload(self._root, self.model_config)
        self._is_updating = True
        self._root = None
        # Asked before the move, which gives a tied parameter a tensor of its own that nobody will send.
        self._tied = _tied_names(self.model)
        names = {_plain_name(name) for name, _ in self.model.named_parameters()}
        self._expected = names - self._tied.keys() - _derived_names(self.model)
        self._loaded = set()

    def receive_weights(self, update_info: TUpdateInfo) -> None:
        """Receive and load what is announced, and report it. What is loaded beside the served policy is loaded on a thread of
        its own: this returns at once, and the report says how it ended.
        """
        # An update that was left open has taken the served model apart: there is nothing beside which to load.
        if not update_info.is_beside or self._root is self.model:
            self.report(self.receive(update_info))
            return
        self._drop_twin()
        self._builder = threading.Thread(
            target=self._build, args=(update_info,), name="trl_atropos-next-policy", daemon=True
        )
        self._builder.start()

    @abstractmethod
    def receive(self, update_info: TUpdateInfo) -> WorkerReport:
        """Receive and load every announced tensor, and return what is to be reported."""

    @abstractmethod
    def report(self, report: WorkerReport) -> None:
        """Bring a report to the trainer."""

    def _build(self, update_info: TUpdateInfo) -> None:
        interval = sys.getswitchinterval()
        try:
            _use_every_core()
            # The thread that serves asks for work without a pause: at the usual interval each of some thousand operations here
            # would wait five milliseconds for the interpreter.
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            if self.device.type != "cpu":
                torch.cuda.set_device(self.device)
            with torch.no_grad():
                report = self.receive(update_info)
                self._built = self._place()
            if self.device.type != "cpu":
                torch.cuda.current_stream().synchronize()
        except BaseException as exc:
            # The trainer is told, and the finish of the update is refused.
            logger.error("The next policy could not be built beside the served one.", exc_info=exc)
            self._build_error = exc
            report = WorkerReport(update_info.sequence, 0, 0, 0, error=f"{type(exc).__name__}: {exc}")
        finally:
            sys.setswitchinterval(interval)
        try:
            self.report(report)
        except RuntimeError as exc:
            logger.error(
                "How the loading of the next policy ended cannot be reported: the trainer is gone.", exc_info=exc
            )

    def _drop_twin(self) -> None:
        """Wait for what is being built, and forget it."""
        if self._builder is not None:
            self._builder.join()
        self._builder = self._build_error = self._built = None
        if self._twin is not None:
            self._twin.release()
            self._twin = self._root = None
            self._loaded = set()
            self._expert_kernels = {}

    def load(self, update_info: TUpdateInfo, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the tensors of a transfer, which come in the order of `update_info` and are kept until their layer is
        complete.

        Raises:
            `RuntimeError`: if names are missing, unknown or do not belong to whole modules.
        """
        if self._loaded:
            self.start_weight_update()
        self._check_names(update_info)
        self._is_complete = update_info.is_complete
        root = self._begin()
        is_known = self._known.issuperset(update_info.names)
        recorder = None if is_known or not self._holds_all_layers() else ReadRecorder()
        if self.parallel_config.tensor_parallel_size > 1:
            weights = _with_own_biases(weights)
        copies = None if self._copies_itself is False else DirectCopies(root)
        with recorder or nullcontext(), copies or nullcontext():
            watched = iter(weights) if recorder is None else recorder.watch(weights)
            self._loaded |= {_plain_name(name) for name in root.load_weights(watched) or ()}
        if copies is not None:
            self._copies_itself = self._copies_itself or copies.num_caught > 0
        if recorder is not None:
            unknown = [name for name in recorder.unread if name not in self._tied]
            if unknown:
                raise RuntimeError(
                    f"{len(unknown)} tensors were sent that no parameter of the served model took, first "
                    f"{unknown[:NUM_NAMED]}. The server and the trainer run different models, or vLLM knows these "
                    "weights under other names."
                )
            self._known |= set(update_info.names)

    def _begin(self) -> Any:
        """Move what is loaded into to the meta device, and return it: a `load_weights` and the parameters it fills."""
        if self._builder is not None:
            self._twin = ModelTwin(self.model)
            self._take_apart(self._twin.root)
        elif self._root is None:
            # From here to the finish the model cannot run.
            self._has_policy = False
            self._take_apart(self.model)
        return self._root

    def _take_apart(self, root: Any) -> None:
        self._root = root
        initialize_layerwise_reload(root)
        self._set_expert_kernels_aside(root)

    def finish_weight_update(self) -> None:
        """Put the parameters back into the tensors that the compiled model runs on; refuse half a policy."""
        if self._builder is not None:
            self._builder.join()
        if self._build_error is not None:
            raise RuntimeError(
                f"The next policy could not be built beside the served one: {self._build_error}. The served one stays, and the "
                "weight update stays open."
            ) from self._build_error
        if self._twin is None:
            self._place()
        else:
            assert self._built is not None
            self._twin.swap(self._built)
            self._derive_attention()
            if self.device.type != "cpu":
                # The twin's memory goes back to the stream that built it, which does not wait for this one.
                torch.cuda.current_stream().synchronize()
        self._refresh_convolutions()
        self._drop_twin()
        self._root = None
        self._is_updating = False
        self._has_policy = True

    def _place(self) -> set[nn.Module]:
        """Put what was loaded together, refusing half a policy, and return the modules of which something was loaded."""
        missing = sorted(self._expected - self._loaded) if self._is_complete or not self._loaded else []
        if missing:
            raise RuntimeError(
                f"{len(missing)} parameters of the served model were not sent, first {missing[:NUM_NAMED]}. Half a "
                "policy is not served: the weight update stays open. Send every parameter, or restart the server."
            )
        torn = self._half_loaded_layers()
        if torn:
            raise RuntimeError(
                f"{len(torn)} layers of the served model were sent in part, first {torn[:NUM_NAMED]}. The rest of them "
                "would be uninitialised memory: the weight update stays open. Send every parameter of a module."
            )
        assert self._root is not None
        loaded = loaded_modules(self._root)
        finalize_layerwise_reload(self._root, self.model_config)
        self._restore_expert_kernels()
        loaded.update(self._repack_tied_heads())
        return loaded

    def _check_names(self, update_info: LayerwiseUpdateInfo) -> None:
        names = set(update_info.names)
        if len(names) < len(update_info.names):
            raise RuntimeError(
                f"{len(update_info.names) - len(names)} of {len(update_info.names)} names are sent twice."
            )
        if update_info.is_complete:
            return
        if not self._has_policy:
            raise RuntimeError(
                f"{len(names)} changed tensors were sent to a worker that holds no complete policy of this trainer. "
                "Send every parameter first."
            )
        # A pipeline stage knows its own names only.
        unknown = sorted(names - self._known) if self._holds_all_layers() else []
        if unknown:
            raise RuntimeError(
                f"{len(unknown)} changed tensors were sent that the complete policy did not have, first "
                f"{unknown[:NUM_NAMED]}."
            )
        packed = getattr(self.model, "packed_modules_mapping", {})
        modules = {_module_of(name, packed) for name in names}
        absent = sorted(name for name in self._known - names if _module_of(name, packed) in modules)
        if absent:
            raise RuntimeError(
                f"{len(absent)} tensors were not sent that the server keeps in one module with others that were, first "
                f"{absent[:NUM_NAMED]}. Send every tensor of a module (q, k and v; gate and up; all experts), or none."
            )

    def _holds_all_layers(self) -> bool:
        config = self.parallel_config
        return config.pipeline_parallel_size == 1 and not config.enable_expert_parallel

    def _half_loaded_layers(self) -> list[str]:
        torn = []
        assert self._root is not None
        for name, layer in self._root.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or not 0 < info.load_numel < info.load_numel_total:
                continue
            if isinstance(layer, LinearBase) and isinstance(layer.quant_method, UnquantizedLinearMethod):
                torn.append(name)
            elif self._is_complete:
                # Allocated with padding, which no checkpoint fills.
                self._padded_numel[name] = info.load_numel
            elif info.load_numel != self._padded_numel.get(name):
                torn.append(name)
        return torn

    def _set_expert_kernels_aside(self, root: nn.Module) -> None:
        # vLLM packs experts for its CPU kernels when it makes these, and takes a method that has one for packed: without
        # it, the weights of an update are packed as those of the start were. On GPUs it must stay, because graphs were captured
        # with it.
        if not current_platform.is_cpu():
            return
        for method in (getattr(module, "quant_method", None) for module in root.modules()):
            if isinstance(method, FusedMoEMethodBase) and method.moe_kernel is not None and _packs_experts(method):
                self._expert_kernels[method] = method.moe_kernel
                method.moe_kernel = None

    def _restore_expert_kernels(self) -> None:
        """Give experts that this update left as they are what computes with them."""
        for method, kernel in self._expert_kernels.items():
            if method.moe_kernel is None:
                method.moe_kernel = kernel
        self._expert_kernels = {}

    def _repack_tied_heads(self) -> Iterator[nn.Module]:
        # vLLM's CPU backend prepacks the output head at load. A tied head owns no parameter, so the layerwise reload
        # never processes it and it would go on answering with the weights of the start.
        assert self._root is not None
        for name, module in self._root.named_modules():
            if not isinstance(module, ParallelLMHead) or getattr(module, "cpu_linear", None) is None:
                continue
            if self._tied.get(_plain_name(f"{name}.weight")) in self._loaded:
                module.quant_method.process_weights_after_loading(module)
                yield module

    def _derive_attention(self) -> None:
        # Some attention computes with what it makes of weights of other modules (MLA with the parts of a projection, FlashInfer
        # with sinks in float32), which a twin of it makes for itself.
        for module in self.model.modules():
            if is_deferred_attention_layer(module):
                module.process_weights_after_loading(self.model_config.dtype)

    def _refresh_convolutions(self) -> None:
        # Mamba layers compute with a view of the weight of their convolution. Where vLLM's CPU backend packs that weight, the
        # view is one of the tensor that it packed at load.
        for module in self.model.modules():
            unpacked = getattr(getattr(module, "conv1d", None), "_cpu_unpacked_conv_weight", None)
            view = getattr(module, "conv_weights", None)
            if unpacked is not None and view is not None:
                view.copy_(unpacked)


class DirectCopies(TorchDispatchMode):
    """Gives the layerwise reload what a model's `load_weights` copies into a parameter without its weight loader.

    Those of GPT-OSS and a few others do. In an update the parameter is on the meta device, where a copy leaves no trace,
    and the layer would go on with its old weights. `num_caught` counts such copies.

    Raises:
        `RuntimeError`: at a copy into a part of a parameter.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.num_caught = 0
        self._places = {
            parameter.untyped_storage()._cdata: (layer, name)
            for layer in model.modules()
            for name, parameter in layer.named_parameters(recurse=False)
            if parameter.is_meta
        }

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta and not args[1].is_meta:
            place = self._places.get(args[0].untyped_storage()._cdata)
            if place is not None and not _is_buffered(*place):
                self._load(*place, args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _load(self, layer: nn.Module, name: str, target: torch.Tensor, tensor: torch.Tensor) -> None:
        parameter = getattr(layer, name)
        if target.shape != parameter.shape or tensor.shape != parameter.shape:
            raise RuntimeError(
                f"`load_weights` of the served model copies {tuple(tensor.shape)} into a part of {name} of {type(layer).__name__}, "
                f"which has {tuple(parameter.shape)}. vLLM's layerwise reload takes whole parameters only, so that a policy cannot "
                "be published to this model."
            )
        self.num_caught += 1
        info = get_layerwise_info(layer)
        # The layer is made anew when it is complete: by then the sender may have written over what it sent.
        parameter.weight_loader = default_weight_loader
        info.loaded_weights.append((name, COPY_SIGNATURE.bind(parameter, tensor.clone())))
        info.load_numel += tensor.numel()
        if info.load_numel >= info.load_numel_total:
            _layerwise_process(layer, info)


def _use_every_core() -> None:
    """Let this thread run where the process that started the worker may: vLLM binds the thread that serves to a core of its
    own, which this one would share."""
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))


def _with_own_biases(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copy the biases, which are small: GPT-OSS zeroes those that another rank adds, in memory that all ranks may read."""
    for name, tensor in weights:
        yield name, tensor.clone() if name.endswith("bias") else tensor


def _is_buffered(layer: nn.Module, name: str) -> bool:
    """Whether the reload has a weight for a parameter: then a copy into it is that of its loader, which is being counted."""
    return any(buffered == name for buffered, _ in get_layerwise_info(layer).loaded_weights)


def _packs_experts(method: FusedMoEMethodBase) -> bool:
    """Whether the experts of a method lie in another form on the server than in a checkpoint."""
    packs = type(method.moe_kernel.fused_experts).process_weights_after_loading
    return packs is not FusedMoEExperts.process_weights_after_loading


class ReadRecorder(TorchDispatchMode):
    """Finds the tensors that a model's `load_weights` never looks into.

    vLLM's models skip some names that they do not know and raise for others; the names that `load_weights` returns are
    those of its own parameters. A tensor counts as read when an operation other than a view takes it, or a view of it.

    `unread` holds the tensors by name that were not read so far. They are kept alive, so that their memory is not
    mistaken for that of a later tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unread: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass on `(name, tensor)` pairs, and watch the tensors from then on."""
        for name, tensor in weights:
            if tensor.numel() > 0:
                self.unread[name] = tensor
                self._names[tensor.data_ptr()] = name
            yield name, tensor

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        names = {self._names[address] for address in _addresses(args) if address in self._names}
        if names:
            returned = func._schema.returns[0].alias_info if func._schema.returns else None
            if returned is not None and not returned.is_write:
                (name, *_) = names
                self._names.update(dict.fromkeys(_addresses((result,)), name))
            else:
                for name in names:
                    self.unread.pop(name, None)
        return result


def _addresses(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _addresses(value)
        elif isinstance(value, torch.Tensor) and value.device.type != "meta" and value.numel() > 0:
            yield value.data_ptr()


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Map each name of a parameter that is the same tensor as an earlier one to the name of that."""
    first = {id(parameter): _plain_name(name) for name, parameter in model.named_parameters()}
    every = [(_plain_name(name), parameter) for name, parameter in model.named_parameters(remove_duplicate=False)]
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _derived_names(model: nn.Module) -> set[str]:
    """The parameters that attention layers make of the weights of other modules; no checkpoint has them."""
    names = set()
    for layer, module in model.named_modules():
        if is_deferred_attention_layer(module):
            parameters, _ = get_layerwise_info(module).restore_metadata
            names |= {_plain_name(f"{layer}.{name}") for name in module._parameters.keys() - parameters.keys()}
    return names


def _plain_name(name: str) -> str:
    """Take the wrapper out of a name that a server with LoRA puts around a layer; its loaders know the layer by both
    names.
    """
    return name.replace(".base_layer.", ".")


def _module_of(name: str, packed: dict[str, list[str]]) -> str:
    """The module of the served model that a checkpoint name belongs to, as far as names tell."""
    module = EXPERT.sub(r"\1.weight", name).rpartition(".")[0]
    fused = {part: whole for whole, parts in packed.items() for part in parts}
    return ".".join(fused.get(part, part) for part in module.split("."))
