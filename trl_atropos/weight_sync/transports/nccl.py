"""A policy travels over NCCL to a stock `trl vllm-serve`, through vLLM's own rendezvous and packed broadcast.

Needs CUDA on both sides; follows TRL's `WeightTransferClient` and vLLM's `NCCLTrainerWeightTransferEngine` call by call. Run by the
authors between two ranks of one GPU; between several GPUs it was not.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...errors import VLLMServerError, WeightSyncError
from ..base import TensorSpec, TransferReport
from .collective import Collective
from .group import GroupTransport, numbered, watching_device
from .reports import describe_tensors


if TYPE_CHECKING:
    from ..inference_server import InferenceServer


logger = logging.getLogger(__name__)

PACKED_BUFFER_BYTES = 256 * 2**20
PACKED_NUM_BUFFERS = 2

ABORT_S = 10.0
"""Seconds that an aborted broadcast is waited for; vLLM gives the abort itself five."""


class NcclTransport(GroupTransport):
    """`WeightTransport` for a server with `--weight-transfer-config '{"backend": "nccl"}'`, TRL's default.

    What NCCL does runs beside the request that makes the workers join, and the first that fails ends both. A broadcast is
    ended by aborting its communicator; a rendezvous, in which NCCL may wait for a worker, ends by itself or with the
    process.

    A stock server sends no reports: that it loaded every tensor is only proven by the publisher's logprob probe.

    `device` is the CUDA device of the trainer's main process. `timeout_s` is how long a collective may go on after the
    workers have answered, in seconds. `host` and `port` are those of `GroupTransport`.
    """

    def __init__(self, device: torch.device, timeout_s: float = 300.0, *, host: str | None = None, port: int = 0):
        super().__init__(timeout_s, host=host, port=port)
        self.device = device
        self._group: Any = None

    def _meet(self, client: InferenceServer) -> None:
        if self.device.type != "cuda":
            raise WeightSyncError(
                f"The vLLM server at {client.base_url} receives weights over NCCL, the trainer runs on {self.device}.",
                "NCCL moves data between CUDA devices only.",
                """Start the server with --weight-transfer-config '{"backend": "trl_atropos_shm"}' (same host).""",
            )
        # Before the server is asked for anything: it would wait for a trainer that cannot come.
        self._check_libraries()
        self.device = numbered(self.device)
        disconnect(client)
        listener, meeting = self._listen(client)
        init_info = {
            **meeting,
            "packed": True,
            "packed_buffer_size_bytes": PACKED_BUFFER_BYTES,
            "packed_num_buffers": PACKED_NUM_BUFFERS,
        }
        rendezvous = Collective(
            "NCCL rendezvous",
            lambda _: self._join(init_info, listener),
            timeout_s=self.timeout_s,
            end=listener.close,
            end_s=0.0,
        )
        self._group = rendezvous.run_beside(lambda: client.init_weight_transfer_engine(init_info))

    def prepare(self, specs: Sequence[TensorSpec]) -> None:
        """Nothing: the workers are told no checksums. See `WeightTransport.prepare`."""

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Broadcast tensors to every worker. See `WeightTransport.send`."""
        client, _ = self._require_open()
        specs = in_packed_order(specs)
        broadcast = Collective(
            "NCCL broadcast",
            lambda _: self._broadcast(specs),
            timeout_s=self.timeout_s,
            end=self._leave,
            end_s=ABORT_S,
        )
        with watching_device(self.device):
            broadcast.run_beside(lambda: client.update_weights(describe_tensors(specs)))
        return TransferReport(sum(spec.num_bytes for spec in specs), load_s=0.0)

    def _leave(self) -> None:
        """Abort the communicator, also while it waits for a worker, and let go of the port."""
        group, self._group = self._group, None
        if group is not None:
            group.destroy()
            group.group.store = None
            group.group.socket = None

    def _check_libraries(self) -> None:
        """Refuse to go on without the libraries that the rendezvous needs, which would only say so in a log."""
        try:
            from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

            NCCLLibrary()
        except (ImportError, OSError) as exc:
            raise WeightSyncError(
                f"The trainer cannot use NCCL: {type(exc).__name__}: {exc}.",
                "It meets the workers through vLLM's own code, and libnccl.",
                "Install vllm beside the trainer (pip install trl-atropos[vllm]), or name the library with "
                """VLLM_NCCL_SO_PATH; on one host --weight-transfer-config '{"backend": "trl_atropos_shm"}' needs neither.""",
            ) from exc

    def _join(self, init_info: dict[str, Any], listener: socket.socket) -> Any:
        """Meet the workers, as vLLM's `trainer_init` does, on a port that is ours already."""
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        self._use_device()
        group = StatelessProcessGroup.create(
            init_info["master_address"],
            init_info["master_port"],
            rank=0,
            world_size=init_info["world_size"],
            store_timeout=math.ceil(self.timeout_s),
            listen_socket=listener,
        )
        with unpinned_nccl_env():
            communicator = PyNcclCommunicator(group, device=self.device)
        if communicator.disabled or not communicator.available:
            raise WeightSyncError(
                "vLLM's communicator has switched itself off.",
                "VLLM_DISABLE_PYNCCL is set, or libnccl could not be loaded.",
                "Unset VLLM_DISABLE_PYNCCL; the trainer's log says which library was tried.",
            )
        return communicator

    def _use_device(self) -> None:
        # A thread begins with device 0.
        torch.cuda.set_device(self.device)

    def _broadcast(self, specs: Sequence[TensorSpec]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        self._use_device()
        # Staging has waited for its copies, so that the streams of the packing need not: to wait for the whole device
        # would be to wait for a broadcast that a dead worker left behind.
        packed_nccl_broadcast_producer(
            iterator=self.tensors_on_device(specs),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=PACKED_BUFFER_BYTES,
            num_buffers=PACKED_NUM_BUFFERS,
        )

    def tensors_on_device(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """Copy tensors one by one to the device, on the stream that is current when each is taken."""
        _, layout = self._require_open()
        for spec in specs:
            yield spec.name, layout.view(self._memory, spec).to(self.device, non_blocking=True)


def in_packed_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Tensors in an order in which vLLM can unpack them: their own, or that of the size of their elements.

    vLLM packs them without a gap and views each at its dtype, which fails where a bfloat16 tensor of odd size stands
    before a float32 one. With larger elements first no tensor begins between two of its elements.
    """
    start = 0
    for spec in specs:
        if start % spec.dtype.itemsize:
            return sorted(specs, key=lambda spec: -spec.dtype.itemsize)
        start += spec.num_bytes
    return list(specs)


def disconnect(client: InferenceServer) -> None:
    """Free the workers of a server from the trainer that was connected before, which may have been killed at any
    point.

    Raises:
        [`WeightSyncError`]: if the server refuses.
    """
    try:
        client.shutdown_weight_transfer_engine()
        return
    except VLLMServerError as exc:
        logger.warning(
            f"The server at {client.base_url} has an unfinished weight update, which is ended: {exc.detail}"
        )
    client.finish_weight_update(None)
    client.shutdown_weight_transfer_engine()
