"""vLLM worker side of `trl_atropos_gloo`: receives a policy in chunks and loads one while the next arrives.

vLLM imports this file inside its workers, through the factory entry that `serving/plugin.py` registers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import ProcessGroupGloo, Store, Work
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo

from .gloo import connect_store, join_group, joined_key, receiving_key, report_key, start_broadcast
from .layerwise_engine import LayerwiseEngine, LayerwiseUpdateInfo
from .rendezvous import local_address_towards
from .reports import CHECKSUM_MODULUS, WorkerReport, checksum, view_tensor


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer waits: its address, its port, and the name of this meeting.

    `rank_offset` is the rank of worker 0, `world_size` counts trainer and workers, and `timeout_s` is the deadline of
    every operation in seconds.
    """

    master_address: str
    master_port: int
    name: str
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(LayerwiseUpdateInfo):
    """How the tensors are cut into chunks; `offsets` count from the start of the tensor's chunk.

    For each chunk there are the number of its tensors, its size in bytes, and the checksum of its tensors
    ([`~weight_sync.transports.reports.checksum`]).
    """

    chunk_num_tensors: list[int]
    chunk_num_bytes: list[int]
    checksums: list[int]


class GlooEngine(LayerwiseEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives chunks into fresh memory: vLLM keeps the tensors of a layer until the layer is complete."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _store: Store | None = None
    _group: ProcessGroupGloo | None = None
    # The chunk that arrives. Not in a local variable: the traceback of an error would keep its connection open.
    _arriving: tuple[torch.Tensor, Work] | None = None

    def connect(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group."""
        self._store = connect_store(
            init_info.master_address, init_info.master_port, init_info.name, init_info.timeout_s
        )
        self._store.set(joined_key(self.worker), self.why_not_beside())
        self._group = join_group(
            self._store,
            self.worker + init_info.rank_offset,
            init_info.world_size,
            local_address_towards(init_info.master_address),
            init_info.timeout_s,
        )

    def receive(self, update_info: GlooUpdateInfo) -> WorkerReport:
        """Receive and load every announced tensor."""
        if self._group is None or self._store is None:
            raise RuntimeError("No trainer is connected. Call /init_weight_transfer_engine first.")
        start = time.perf_counter()
        num_bytes = 0
        total = 0

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal num_bytes, total
            assert self._store is not None
            self._store.set(receiving_key(update_info.sequence, self.worker), "")
            names = iter(update_info.names)
            for index, chunk in enumerate(self._receive_chunks(update_info)):
                found = checksum(chunk)
                if found != update_info.checksums[index]:
                    raise RuntimeError(
                        f"The checksum of chunk {index} is {found}, the trainer said {update_info.checksums[index]}: it "
                        "was damaged on its way. Nothing of it was loaded."
                    )
                total += found
                num_bytes += sum(tensor.nbytes for tensor in chunk)
                while chunk:
                    yield next(names), chunk.pop(0)

        try:
            self.load(update_info, tensors())
        except BaseException:
            # The trainer sees the connection end and stops to send. Its store is still there for the report.
            self._arriving = None
            self._group = None
            raise
        return WorkerReport(
            update_info.sequence,
            len(update_info.names),
            num_bytes,
            total % CHECKSUM_MODULUS,
            time.perf_counter() - start,
        )

    def report(self, report: WorkerReport) -> None:
        """Leave a report in the trainer's store."""
        assert self._store is not None
        self._store.set(report_key(report.sequence, self.worker), report.to_json().decode())

    def shutdown(self) -> None:
        """Leave the trainer's group."""
        self._arriving = None
        self._group = None
        self._store = None

    def _receive_chunks(self, update_info: GlooUpdateInfo) -> Iterator[list[torch.Tensor]]:
        """Yield the tensors of each chunk while the next chunk arrives."""
        sizes = update_info.chunk_num_bytes
        first = 0
        if sizes:
            self._receive(sizes[0])
        for index, num_tensors in enumerate(update_info.chunk_num_tensors):
            memory = self._take_arriving()
            if index + 1 < len(sizes):
                self._receive(sizes[index + 1])
            last = first + num_tensors
            chunk = [
                view_tensor(memory, offset, dtype_name, shape)
                for offset, dtype_name, shape in zip(
                    update_info.offsets[first:last],
                    update_info.dtype_names[first:last],
                    update_info.shapes[first:last],
                    strict=True,
                )
            ]
            # The views are all that keeps the memory from here on.
            del memory
            first = last
            yield chunk

    def _receive(self, num_bytes: int) -> None:
        assert self._group is not None
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._arriving = (memory, start_broadcast(self._group, memory))

    def _take_arriving(self) -> torch.Tensor:
        assert self._arriving is not None
        self._arriving[1].wait()
        memory = self._arriving[0]
        self._arriving = None
        return memory
