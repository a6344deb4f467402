"""A policy travels over NCCL to a stock `trl vllm-serve`, through vLLM's own rendezvous and packed broadcast.

Needs CUDA on both sides, and was not run on a GPU by the authors: what does not touch a device is tested, the rest
follows TRL's `WeightTransferClient` and vLLM's `NCCLTrainerWeightTransferEngine` call by call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...errors import VLLMServerError, WeightSyncError
from ..base import PolicyLayout, TensorSpec, TransferReport
from .collective import Collective
from .rendezvous import bind, local_address_towards, server_host
from .reports import describe_tensors


if TYPE_CHECKING:
    from ..control import VLLMControl


logger = logging.getLogger(__name__)

RANK_OFFSET = 1
"""Rank of worker 0; the trainer is rank 0."""

PACKED_BUFFER_BYTES = 256 * 2**20
PACKED_NUM_BUFFERS = 2


class NcclTransport:
    """`WeightTransport` for a server with `--weight-transfer-config '{"backend": "nccl"}'`, TRL's default.

    HTTP requests run on the calling thread, under their deadline. What NCCL does runs on daemon threads whose errors
    are read: nothing can interrupt it, so after a failed request such a thread stays until the process ends.

    A stock server sends no reports: that it loaded every tensor is only proven by the publisher's logprob probe.

    `device` is the CUDA device of the trainer's main process. `timeout_s` is how long a collective may go on after the
    workers have answered, in seconds. `host` is the address of this machine where the workers meet the trainer; the
    one that faces the server if not given. `port` 0 takes a free one.
    """

    def __init__(self, device: torch.device, timeout_s: float = 300.0, *, host: str | None = None, port: int = 0):
        self.device = device
        self.timeout_s = timeout_s
        self.host = host
        self.port = port
        self._client: VLLMControl | None = None
        self._layout: PolicyLayout | None = None
        self._memory: torch.Tensor | None = None
        self._group: Any = None

    def open(self, client: VLLMControl, layout: PolicyLayout) -> torch.Tensor:
        """Join the workers in an NCCL group. See `WeightTransport.open`."""
        self.close()
        if self.device.type != "cuda":
            raise WeightSyncError(
                f"The vLLM server at {client.base_url} receives weights over NCCL, the trainer runs on {self.device}.",
                "NCCL moves data between CUDA devices only.",
                """Start the server with --weight-transfer-config '{"backend": "trl_atropos_shm"}' (same host).""",
            )
        disconnect(client)
        host = self.host or local_address_towards(server_host(client.base_url))
        # vLLM binds the port itself: this one is given back and taken again a moment later.
        with bind(host, self.port) as probe:
            port = probe.getsockname()[1]
        init_info = {
            "master_address": host,
            "master_port": port,
            "rank_offset": RANK_OFFSET,
            "world_size": client.get_world_size() + RANK_OFFSET,
            "packed": True,
            "packed_buffer_size_bytes": PACKED_BUFFER_BYTES,
            "packed_num_buffers": PACKED_NUM_BUFFERS,
        }
        rendezvous = Collective(
            "NCCL rendezvous", lambda _: self._join(init_info), timeout_s=self.timeout_s, can_be_ended=False
        )
        self._group = rendezvous.run_beside(lambda: client.init_weight_transfer_engine(init_info))
        self._client = client
        self._layout = layout
        if self._memory is None or self._memory.numel() != layout.num_bytes:
            self._memory = self._allocate(layout.num_bytes)
        return self._memory

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Broadcast tensors to every worker. See `WeightTransport.send`."""
        if self._client is None or self._layout is None or self._memory is None:
            raise RuntimeError("The transport is not open: call open() first.")
        client = self._client
        broadcast = Collective(
            "NCCL broadcast", lambda _: self._broadcast(specs), timeout_s=self.timeout_s, can_be_ended=False
        )
        broadcast.run_beside(lambda: client.update_weights(describe_tensors(specs)))
        return TransferReport(sum(spec.num_bytes for spec in specs), load_s=0.0)

    def close(self) -> None:
        """Leave the group. See `WeightTransport.close`."""
        self._client = None
        self._layout = None
        if self._group is not None:
            # Destroying the communicator waits for the other side; without store and socket it lets go of the port.
            self._group.group.store = None
            self._group.group.socket = None
            self._group = None

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def _join(self, init_info: dict[str, Any]) -> Any:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        torch.cuda.set_device(self.device)
        return trainer_init(init_info)

    def _broadcast(self, specs: Sequence[TensorSpec]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(self.device)
        # The packing runs on streams of its own, which do not wait for the one that staged the policy.
        torch.cuda.synchronize(self.device)
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
        assert self._memory is not None and self._layout is not None
        for spec in specs:
            yield spec.name, self._layout.view(self._memory, spec).to(self.device, non_blocking=True)


def disconnect(client: VLLMControl) -> None:
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
