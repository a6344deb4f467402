"""The seams of a publish: what is sent (`WeightSource`), where it is staged (`PolicyLayout`), and how it travels
(`WeightTransport`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable


if TYPE_CHECKING:
    import torch

    from .inference_server import InferenceServer


ALIGNMENT_BYTES = 64
"""Staged tensors start at multiples of a cache line."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a policy as the server will receive it.

    Args:
        name (`str`):
            The server's checkpoint name.
        dtype (`torch.dtype`):
            The dtype on the wire, which is the server's.
        shape (`tuple[int, ...]`):
            Shape of the whole tensor.
        is_trained (`bool`, *optional*, defaults to `True`):
            Whether training can change it, or a tensor that the server keeps in one piece with it. The others need not
            be sent again.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_trained: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel

    @property
    def num_bytes(self) -> int:
        """Size on the wire, in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype in the spelling of torch and the servers, for example `"bfloat16"`."""
        return str(self.dtype).removeprefix("torch.")


class PolicyLayout:
    """Where every tensor of a policy lies in one flat buffer of `num_bytes` bytes.

    The tensors lie in the order of `specs`, which is the source's. `offsets` gives the byte offset of each tensor by
    name, always a multiple of `ALIGNMENT_BYTES`.
    """

    def __init__(self, specs: Sequence[TensorSpec]):
        self.specs = tuple(specs)
        self.offsets: dict[str, int] = {}
        end = 0
        for spec in self.specs:
            self.offsets[spec.name] = end
            end += align(spec.num_bytes)
        self.num_bytes = end
        if len(self.offsets) != len(self.specs):
            names = [spec.name for spec in self.specs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"The policy has {len(twice)} names twice, first {twice[:3]}.")

    def view(self, memory: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """The tensor `spec`, which is one of `specs`, inside a buffer: uint8, of shape `(num_bytes,)`."""
        start = self.offsets[spec.name]
        return memory[start : start + spec.num_bytes].view(spec.dtype).view(spec.shape)


def align(num_bytes: int) -> int:
    """Round a number of bytes up to the next multiple of `ALIGNMENT_BYTES`."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class WeightSource(Protocol):
    """A policy as an ordered set of named tensors."""

    is_collective: bool
    """Whether `tensors` gathers over ranks: then every rank must iterate it, to the end and in lockstep."""

    def manifest(self) -> Sequence[TensorSpec]:
        """All tensors in order, known without computing one. The same on every rank."""
        ...

    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for each of `specs`, a part of the manifest in its order.

        A tensor may still be in the trainer's dtype, and is valid until the next one is taken.
        """
        ...


@dataclass(frozen=True)
class TransferReport:
    """What the workers of one server report about one transfer.

    `num_bytes` is what travelled, in bytes, and `load_s` the seconds that the slowest worker spent in loading.
    `has_checksums` says whether every worker reported a checksum of what it loaded, and all were right; where it is
    False, every publish is proven by logprobs.
    """

    num_bytes: int
    load_s: float
    has_checksums: bool = False


class WeightTransport(Protocol):
    """A mover of bytes from the trainer to every worker of one server. Used by one thread at a time.

    The server's state (pause, start, finish, version) is the publisher's business; a transport only calls
    `init_weight_transfer_engine`, `shutdown_weight_transfer_engine` and `update_weights`.
    """

    def open(self, client: InferenceServer, layout: PolicyLayout) -> torch.Tensor:
        """Connect to every worker. May be called again after a failure: then it replaces what was open.

        Args:
            client ([`InferenceServer`]):
                The server.
            layout (`PolicyLayout`):
                Names, dtypes and shapes of all tensors of the policy, and where each lies in the staging memory.

        Returns:
            `torch.Tensor` of shape `(layout.num_bytes,)`, uint8: host memory in which the policy is to be staged. It
            keeps its content between sends and stays readable after `close`.

        Raises:
            [`WeightSyncError`]: if the server, the machine or the layout cannot work with this transport.
        """
        ...

    def prepare(self, specs: Sequence[TensorSpec]) -> None:
        """Do what the next `send` of these tensors needs and the server need not be paused for. They are staged already;
        the next `send` is of them.
        """
        ...

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Move these tensors from the staging memory into every worker. The server is paused, between start and
        finish of an update.

        Args:
            specs (`Sequence[TensorSpec]`):
                All of the layout, or a part of it in its order that is whole for every module that it touches.

        Raises:
            [`WeightSyncError`]: if not every worker reports that it loaded every tensor.
        """
        ...

    def close(self) -> None:
        """Release everything on this side. Safe to call twice, and after a failure."""
        ...


@runtime_checkable
class BuildsBeside(Protocol):
    """A `WeightTransport` whose workers may load a policy beside the one that they serve, and only swap at the finish."""

    @property
    def can_build(self) -> bool:
        """Whether the workers that are connected can: they have the memory, and know how the model holds its weights."""
        ...

    def build(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """As `send`, for a server that goes on serving. Returns when every worker has the policy ready.

        Raises:
            [`WeightSyncError`]: if one does not; the server has what it had.
        """
        ...


def check_same_tensor(spec: TensorSpec, name: str, tensor: torch.Tensor) -> None:
    """Refuse a source whose iteration does not follow its manifest, before the tensor is moved.

    Raises:
        `ValueError`: naming both sides. Beyond this point the two ends would cut the bytes differently.
    """
    if name != spec.name or tuple(tensor.shape) != spec.shape:
        raise ValueError(
            f"The weight source yields {name!r} of shape {tuple(tensor.shape)} where its manifest announces "
            f"{spec.name!r} of shape {spec.shape}."
        )
