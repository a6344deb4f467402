"""vLLM worker side of `trl_atropos_shm`: loads a policy from a shared-memory segment of a trainer on the same host.

vLLM imports this file inside its workers, through the factory entry that `serving/plugin.py` registers.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.platforms import current_platform

from ..page_locks import PageLocks
from .layerwise_engine import LayerwiseEngine, LayerwiseUpdateInfo
from .reports import WorkerReport, checksum, view_tensor
from .shm_segment import REPORT_BYTES, segment_path


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Where the segment is.

    `segment` is its name, without a directory. `data_bytes` is the size of the tensor area; one report slot of
    `REPORT_BYTES` for each of the `num_workers` workers follows it.
    """

    segment: str
    data_bytes: int
    num_workers: int


@dataclass
class SharedMemoryUpdateInfo(LayerwiseUpdateInfo):
    """What the segment holds; `offsets` count from its start.

    `checksum` is that of all tensors ([`~weight_sync.transports.reports.checksum`]).
    """

    checksum: int


class SharedMemoryEngine(LayerwiseEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Maps the trainer's segment once, then loads each policy straight from it, without a copy of its own."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    _mapping: mmap.mmap | None = None
    _data_bytes = 0
    # Of the segment, on a GPU: of pages that are not locked it copies at a sixth of the speed.
    _page_locks: PageLocks | None = None

    def connect(self, init_info: SharedMemoryInitInfo) -> None:
        """Map the segment, and report it: the trainer takes its name away."""
        path = segment_path(init_info.segment)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise RuntimeError(
                f"The shared-memory segment {path} does not exist here. Trainer and server must run on one host and "
                "see the same /dev/shm (containers: --ipc=host); across hosts use the backend trl_atropos_gloo."
            ) from exc
        try:
            expected = init_info.data_bytes + REPORT_BYTES * init_info.num_workers
            size = os.fstat(descriptor).st_size
            if size != expected:
                raise RuntimeError(f"The shared-memory segment {path} has {size} bytes, the trainer said {expected}.")
            self._mapping = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._data_bytes = init_info.data_bytes
        if current_platform.is_cuda_alike():
            self._page_locks = PageLocks()
            self._page_locks.hold([self._memory()])
        self.report(
            WorkerReport(sequence=0, num_tensors=0, num_bytes=0, checksum=0, why_not_beside=self.why_not_beside())
        )

    def receive(self, update_info: SharedMemoryUpdateInfo) -> WorkerReport:
        """Load every announced tensor from the segment."""
        if self._mapping is None:
            raise RuntimeError("No segment is mapped. Call /init_weight_transfer_engine first.")
        memory = self._memory()
        tensors = [
            view_tensor(memory, offset, dtype_name, shape)
            for offset, dtype_name, shape in zip(
                update_info.offsets, update_info.dtype_names, update_info.shapes, strict=True
            )
        ]
        with nullcontext() if current_platform.is_cpu() else on_every_core():
            found = checksum(tensors)
        if found != update_info.checksum:
            raise RuntimeError(
                f"The checksum of the segment is {found}, the trainer said {update_info.checksum}: it is being written, "
                "or it is not the trainer's. Nothing of it was loaded."
            )
        start = time.perf_counter()
        self.load(update_info, zip(update_info.names, tensors, strict=True))
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        return WorkerReport(update_info.sequence, len(tensors), num_bytes, found, time.perf_counter() - start)

    def shutdown(self) -> None:
        """Let go of the segment. Its name is gone already: the trainer unlinks it once every worker has mapped it."""
        # Not closed: a layer that waits for the rest of an interrupted update still views the segment, and the mapping
        # goes with the last view.
        self._page_locks = None
        self._mapping = None

    def report(self, report: WorkerReport) -> None:
        """Leave a report in this worker's slot."""
        assert self._mapping is not None
        offset = self._data_bytes + self.worker * REPORT_BYTES
        self._mapping[offset : offset + REPORT_BYTES] = report.to_json().ljust(REPORT_BYTES, b"\0")

    def _memory(self) -> torch.Tensor:
        assert self._mapping is not None
        return torch.frombuffer(self._mapping, dtype=torch.uint8)[: self._data_bytes]


@contextmanager
def on_every_core() -> Iterator[None]:
    """Let what this thread computes on the host use every core that it may run on: vLLM leaves the worker of a GPU one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
