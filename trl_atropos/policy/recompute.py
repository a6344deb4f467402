"""Gradient checkpointing that recomputes only what costs next to nothing: `recompute_granularity: selective`.

Full checkpointing keeps the input of a layer and runs the layer again in the backward pass. Here nothing is run again as a
whole: of the tensors that autograd saves, those are dropped which elementwise operations have made of tensors that are
kept anyway (outputs of norms, the activation of a gated layer and its product, casts), and made again when the backward
pass asks for them. Products of matrices, attention, convolutions, and what carries a state or draws random numbers is
computed once. Megatron-LM does the same for modules that it names: https://arxiv.org/abs/2205.05198

The same operations are made again on the same tensors, so that gradients are bit for bit those without checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily


GRANULARITIES = ("full", "selective")

ELEMENTWISE = frozenset((
    Tensor.add, torch.add, Tensor.__add__, Tensor.__radd__, Tensor.sub, torch.sub, Tensor.__sub__, Tensor.__rsub__,
    Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.neg, torch.neg, Tensor.__neg__,
    F.silu, F.gelu, F.relu, torch.relu, Tensor.relu, F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.tanh, torch.tanh, Tensor.tanh,
    Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type_as,
))  # fmt: skip
"""Operations whose output is made again. Autocast leaves them alone, and none draws random numbers or reduces."""


def recompute_selectively(model: Any) -> None:
    """Have the layers of a model for which gradient checkpointing is enabled recompute no more than `ELEMENTWISE`.

    Holds until gradient checkpointing is enabled anew.

    Raises:
        ValueError: the attention implementation is `flex_attention`, whose kernels transformers compiles within the layers.
    """
    if model.config.get_text_config()._attn_implementation == "flex_attention":
        raise ValueError(
            "recompute_granularity is selective and the attention implementation is flex_attention. The compiler would not compile it "
            "in a layer whose operations are watched. Set --attn_implementation sdpa, or --recompute_granularity full."
        )
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = run_selectively


def run_selectively(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, in the place of `torch.utils.checkpoint.checkpoint`; what its backward pass needs is kept or made again."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    watch = _Watch()
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, _unpack), watch:
        return function(*args, **kwargs)


def unwatched() -> AbstractContextManager[Any]:
    """A context in which the operations of a layer are not watched: for code that is compiled, into which watching would be
    traced. What autograd saves there is kept.
    """
    is_watched = isinstance(_get_current_function_mode(), _Watch)  # type: ignore[no-untyped-call]
    return _pop_mode_temporarily() if is_watched else nullcontext()


class _Kept:
    """A tensor that is kept, as it was."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        # A parameter stays itself: what shards weights puts their data elsewhere between the passes.
        self.tensor = tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
        self.version = tensor._version

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor of shape {tuple(self.tensor.shape)} was changed in place between the forward and the backward pass, which "
                "needs it as it was. The gradient would be wrong. Set --recompute_granularity full, or mend the model's code."
            )
        return self.tensor


class _Recipe:
    """What a tensor that was dropped is made of. Once made, it stays until nothing of the backward pass needs it."""

    __slots__ = ("args", "function", "kwargs", "value")

    def __init__(self, function: Callable[..., Tensor], args: Iterable[Any], kwargs: dict[str, Any]):
        self.function, self.args, self.kwargs = function, tuple(args), kwargs
        self.value: Tensor | None = None

    def get(self) -> Tensor:
        if self.value is None:
            args = (arg.get() if isinstance(arg, _View) else arg for arg in self.args)
            self.value = self.function(*args, **self.kwargs)
        return self.value


class _View:
    """A tensor as autograd or a recipe wants it: a view of what is kept or made again."""

    __slots__ = ("geometry", "source")

    def __init__(self, source: _Kept | _Recipe, tensor: Tensor, whole: Tensor):
        self.source = source
        geometry = _geometry(tensor)
        self.geometry = None if geometry == _geometry(whole) else geometry

    def get(self) -> Tensor:
        whole = self.source.get()
        return whole if self.geometry is None else whole.as_strided(*self.geometry)


class _Made:
    """The output of an elementwise operation, with what it was made of, during the forward pass of a layer."""

    __slots__ = ("args", "function", "kwargs", "output", "versions")

    def __init__(self, output: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.output, self.function, self.args, self.kwargs = output, function, args, kwargs
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in (self.output, *self.tensors())]

    def tensors(self) -> Iterable[Tensor]:
        return (arg for arg in self.args if isinstance(arg, Tensor))

    def is_unchanged(self) -> bool:
        """Whether neither the output nor what it was made of was changed in place."""
        return self._versions() == self.versions


class _Source:
    """Where the backward pass takes a tensor from, and all of that tensor, whose memory it may share with views."""

    __slots__ = ("value", "version", "whole")

    def __init__(self, value: _Kept | _Recipe, whole: Tensor):
        self.value, self.whole, self.version = value, whole, whole._version


class _Watch(TorchFunctionMode):
    """Watches the operations of a layer, and decides of each tensor that autograd saves whether it is kept."""

    def __init__(self) -> None:
        super().__init__()
        # Both by storage. They hold the tensors, so that no other comes to lie in the memory of one of them.
        self._made: dict[int, _Made] = {}
        self._sources: dict[int, _Source] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._made, self._sources = {}, {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and args and _is_cast_by_autocast(args[0]):
            # As autocast does inside, where nobody sees that it can be made again.
            dtype = torch.get_autocast_dtype(args[0].device.type)
            args = (self.__torch_function__(Tensor.to, types, (args[0], dtype)), *args[1:])
        output = func(*args, **kwargs)
        if func in ELEMENTWISE and _is_plain(output) and output.requires_grad:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            key = _storage(output)
            is_new = all(_is_plain(tensor) and _storage(tensor) != key for tensor in tensors)
            if is_new and not any(isinstance(value, Tensor) for value in kwargs.values()):
                self._made[key] = _Made(output, func, args, kwargs)
        return output

    def pack(self, tensor: Tensor) -> Any:
        """Return what autograd keeps in the place of a tensor that it saves."""
        if not _is_plain(tensor):
            return tensor
        source = self._source(tensor)
        if source is None:
            cost = self._cost(tensor)
            if cost is None or cost >= _num_bytes(tensor):
                source = self._keep(tensor)
        # What is kept needs no view: the tensor is there.
        return _Kept(tensor) if source is not None and isinstance(source.value, _Kept) else self._view(tensor)

    def _source(self, tensor: Tensor) -> _Source | None:
        """What a tensor is a view of, if that is known and was not changed in place since."""
        source = self._sources.get(_storage(tensor))
        return source if source is not None and source.version == tensor._version else None

    def _keep(self, tensor: Tensor) -> _Source:
        source = self._sources[_storage(tensor)] = _Source(_Kept(tensor), tensor)
        return source

    def _cost(self, tensor: Tensor) -> int | None:
        """Bytes of what has to be kept so that a tensor can be made again, and would not be otherwise; None if it cannot be."""
        to_keep: dict[int, int] = {}
        pending = [tensor]
        while pending:
            made = self._made.get(_storage(pending.pop()))
            if made is None or not made.is_unchanged():
                return None
            for arg in made.tensors():
                if self._source(arg) is not None or isinstance(arg, nn.Parameter):
                    continue
                if _storage(arg) in self._made:
                    pending.append(arg)
                else:
                    to_keep[_storage(arg)] = _num_bytes(arg)
        return sum(to_keep.values())

    def _view(self, tensor: Tensor) -> _View:
        """A tensor as a view of its source; what has none yet is kept if it was not made of others."""
        source = self._source(tensor)
        if source is None and (made := self._made.get(_storage(tensor))) is not None:
            args = [self._view(arg) if isinstance(arg, Tensor) else arg for arg in made.args]
            source = _Source(_Recipe(made.function, args, made.kwargs), made.output)
            self._sources[_storage(tensor)] = source
        source = source or self._keep(tensor)
        return _View(source.value, tensor, source.whole)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _View):
        with torch.no_grad():
            return packed.get()
    tensor: Tensor = packed.get() if isinstance(packed, _Kept) else packed
    return tensor


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor with memory of its own kind: no wrapper of others, not sparse."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _is_cast_by_autocast(tensor: Any) -> bool:
    """Whether a product of matrices casts a tensor, as autocast is set."""
    if not isinstance(tensor, Tensor) or not torch.is_autocast_enabled(tensor.device.type):
        return False
    dtype = torch.get_autocast_dtype(tensor.device.type)
    return tensor.is_floating_point() and tensor.dtype not in (torch.float64, dtype)


def _geometry(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor lies in. Not its address, which is 0 for tensors without elements."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
