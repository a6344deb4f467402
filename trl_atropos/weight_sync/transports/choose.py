"""Which transport fits a server."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ...errors import PreflightError
from ..base import WeightTransport
from .backends import NO_TRANSPORT_FIX, NO_TRANSPORT_WHY, describe_no_transport, find_backend


if TYPE_CHECKING:
    import torch

    from ..inference_server import InferenceServer
    from .gloo import GlooTransport
    from .nccl import NcclTransport
    from .sglang_group import SGLangGlooTransport, SGLangNcclTransport
    from .shm import SharedMemoryTransport

    # The table names classes as text; that each of them fits the protocol shows here.
    _FIT: tuple[type[WeightTransport], ...] = (
        SharedMemoryTransport,
        GlooTransport,
        NcclTransport,
        SGLangGlooTransport,
        SGLangNcclTransport,
    )


def make_transport(
    backend: str | None,
    client: InferenceServer,
    device: torch.device,
    *,
    timeout_s: float,
    group_host: str | None = None,
    group_port: int = 0,
) -> WeightTransport:
    """Make the transport for `backend`, the weight transfer backend that a server reports; None if it has none.

    `device` is where the trainer's model lies, `timeout_s` the deadline in seconds of one transfer. The workers meet
    the trainer at `group_host`, by default the address of this machine that faces the server, and `group_port`; 0
    takes a free one.

    Raises:
        [`PreflightError`]: if the trainer cannot send to this backend.
    """
    row = find_backend(backend, device.type)
    if row is None:
        what = describe_no_transport(client.base_url, backend, device)
        raise PreflightError(what, NO_TRANSPORT_WHY, NO_TRANSPORT_FIX)
    module, name = row.transport
    options = {"timeout_s": timeout_s, "device": device, "host": group_host, "port": group_port}
    transport: WeightTransport = getattr(import_module(module), name)(**{key: options[key] for key in row.options})
    return transport
