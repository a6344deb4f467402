"""Which transport fits a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import PreflightError
from ..base import WeightTransport
from .gloo import GlooTransport
from .nccl import NcclTransport
from .shm import SharedMemoryTransport


if TYPE_CHECKING:
    import torch

    from ..client import AtroposVLLMClient


GLOO_BACKEND = "trl_atropos_gloo"
NCCL_BACKEND = "nccl"
SHARED_MEMORY_BACKEND = "trl_atropos_shm"


def make_transport(
    backend: str | None,
    client: AtroposVLLMClient,
    device: torch.device,
    *,
    timeout_s: float,
    group_host: str | None = None,
    group_port: int = 0,
) -> WeightTransport:
    """Choose the transport for a server's weight transfer backend.

    Args:
        backend (`str`, *optional*):
            As the server reports it; None if it has none.
        client (`AtroposVLLMClient`):
            The server.
        device (`torch.device`):
            Where the trainer's model lies.
        timeout_s (`float`):
            Deadline in seconds of one transfer.
        group_host (`str`, *optional*):
            Address of this machine where the workers meet the trainer; the one that faces the server if not given.
        group_port (`int`, *optional*, defaults to `0`):
            Port there; 0 takes a free one.

    Raises:
        [`PreflightError`]: if the trainer cannot send to this backend.
    """
    if backend == SHARED_MEMORY_BACKEND:
        return SharedMemoryTransport(timeout_s)
    if backend == GLOO_BACKEND:
        return GlooTransport(timeout_s, host=group_host, port=group_port)
    if backend == NCCL_BACKEND and device.type == "cuda":
        return NcclTransport(device, timeout_s, host=group_host, port=group_port)
    raise PreflightError(
        f"The vLLM server at {client.base_url} receives weights over {backend!r}, the trainer runs on {device}.",
        f"The trainer sends over {SHARED_MEMORY_BACKEND!r} (same host), {GLOO_BACKEND!r} (any host) and, from a CUDA "
        f"device, over {NCCL_BACKEND!r}.",
        f"""Start the server with --weight-transfer-config '{{"backend": "{SHARED_MEMORY_BACKEND}"}}', or give the """
        "trainer another transport: AtroposTrainer(weight_transport=...).",
    )
