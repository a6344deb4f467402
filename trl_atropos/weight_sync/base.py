"""The seams of a publish: what is sent (`WeightSource`) and how it travels (`WeightTransport`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol


if TYPE_CHECKING:
    import torch

    from .vllm_client import AtroposVLLMClient


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a policy as the server will receive it.

    Args:
        name (`str`):
            The server's checkpoint name.
        dtype (`torch.dtype`):
            The dtype on the wire: the server's.
        shape (`tuple[int, ...]`):
            Shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size on the wire, in bytes."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The dtype in vLLM's spelling, for example `"bfloat16"`."""
        return str(self.dtype).removeprefix("torch.")


class WeightSource(Protocol):
    """A policy as an ordered set of named tensors. Iterating twice gives the same names in the same order."""

    def manifest(self) -> Sequence[TensorSpec]:
        """What iterating will yield, known without computing a tensor."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` in manifest order; the tensor may still be in the trainer's dtype."""
        ...


class WeightTransport(Protocol):
    """A mover of bytes from the trainer to every worker of one server. Used by one thread."""

    def open(self, client: AtroposVLLMClient, manifest: Sequence[TensorSpec]) -> None:
        """Connect to every worker. Called once, before the first publish; the server is not paused.

        Raises:
            `WeightSyncError`: if the server, the machine or the manifest cannot work with this transport.
        """
        ...

    def stage(self, source: WeightSource) -> None:
        """Do everything that does not need a paused server: gather, merge, cast, copy. The server keeps serving."""
        ...

    def send(self) -> None:
        """Move the staged policy into every worker. The server is paused, between start and finish of an update.

        Raises:
            `WeightSyncError`: if not every worker reports that it loaded every tensor.
        """
        ...

    def close(self) -> None:
        """Release everything on this side. Safe to call twice, and after a failure."""
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
