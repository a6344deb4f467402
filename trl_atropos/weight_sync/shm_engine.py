"""vLLM worker side of `trl_atropos_shm`: loads a policy from a shared-memory segment of a trainer on the same host.

vLLM imports this file inside its workers, through the factory entry that `serving/plugin.py` registers.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from .shm_segment import REPORT_BYTES, segment_path


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Where the segment is.

    Args:
        segment (`str`):
            Name of the segment, without a directory.
        data_bytes (`int`):
            Size of the tensor area; one report slot of `REPORT_BYTES` per worker follows it.
        num_workers (`int`):
            Number of report slots.
    """

    segment: str
    data_bytes: int
    num_workers: int


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """What the segment holds, one entry per tensor and in loading order.

    Args:
        sequence (`int`):
            Number of this transfer, repeated in the worker's report.
        names (`list[str]`):
            Checkpoint names.
        dtype_names (`list[str]`):
            For example `"bfloat16"`.
        shapes (`list[list[int]]`):
            Shapes.
        offsets (`list[int]`):
            Byte offsets from the start of the segment.
    """

    sequence: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Maps the trainer's segment once, then loads each policy straight from it, without a copy of its own."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._mapping: mmap.mmap | None = None
        self._init_info: SharedMemoryInitInfo | None = None
        self._is_updating = False
        self._expected: set[str] = set()
        self._loaded: set[str] = set()

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Map the segment. A second call replaces the first: the trainer was restarted, or the model grew."""
        self.shutdown()
        path = segment_path(init_info.segment)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise RuntimeError(
                f"The shared-memory segment {path} does not exist here. Trainer and server must run on one host and "
                "see the same /dev/shm (containers: --ipc=host); across hosts use another weight-transfer backend."
            ) from exc
        try:
            expected = init_info.data_bytes + REPORT_BYTES * init_info.num_workers
            size = os.fstat(descriptor).st_size
            if size != expected:
                raise RuntimeError(f"The shared-memory segment {path} has {size} bytes, the trainer said {expected}.")
            self._mapping = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._init_info = init_info

    def start_weight_update(self) -> None:
        """Move the parameters to the meta device; from here to `finish_weight_update` the model cannot run."""
        if self._is_updating:
            # An update that was never finished left some layers processed and others with half of their tensors
            # buffered. Ending it gives every layer back its kernel tensors, of which this update replaces all.
            finalize_layerwise_reload(self.model, self.model_config)
        self._is_updating = True
        # Asked before the move, which gives a tied head a parameter of its own that nobody will send.
        every_name = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        tied = every_name - {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)
        self._expected = {name for name, _ in self.model.named_parameters()} - tied
        self._loaded = set()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load every announced tensor from the segment and leave a report in this worker's slot."""
        if self._mapping is None or self._init_info is None:
            raise RuntimeError("No segment is mapped. Call /init_weight_transfer_engine first.")
        if self._loaded:
            # A transfer always carries the whole policy: a second one in the same update replaces the first.
            self.start_weight_update()
        start = time.perf_counter()
        num_bytes = 0
        views = []
        data = memoryview(self._mapping)[: self._init_info.data_bytes]
        for name, dtype_name, shape, offset in zip(
            update_info.names, update_info.dtype_names, update_info.shapes, update_info.offsets, strict=True
        ):
            dtype = getattr(torch, dtype_name)
            numel = 1
            for size in shape:
                numel *= size
            views.append((name, torch.frombuffer(data, dtype=dtype, count=numel, offset=offset).view(shape)))
            num_bytes += numel * dtype.itemsize
        self._loaded |= set(self.model.load_weights(iter(views)) or ())
        self._report(
            {
                "sequence": update_info.sequence,
                "num_tensors": len(views),
                "num_bytes": num_bytes,
                "load_s": time.perf_counter() - start,
            }
        )

    def finish_weight_update(self) -> None:
        """Put the parameters back into the tensors that the compiled model runs on; refuse an incomplete policy."""
        missing = sorted(self._expected - self._loaded)
        if missing:
            raise RuntimeError(
                f"{len(missing)} parameters of the served model were not sent, first {missing[:3]}. Half a policy is "
                "not served: the weight update stays open. Send every parameter, or restart the server."
            )
        finalize_layerwise_reload(self.model, self.model_config)
        self._repack_tied_heads()
        self._is_updating = False

    def _repack_tied_heads(self) -> None:
        # vLLM's CPU backend prepacks the output head at load. A tied head owns no parameter, so the layerwise reload
        # never processes it and it would go on answering with the weights of the start.
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead) and getattr(module, "cpu_linear", None) is not None:
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Unmap the segment. Its name is gone already: the trainer unlinks it once every worker has mapped it."""
        if self._mapping is not None:
            mapping, self._mapping = self._mapping, None
            # A layer that waits for the rest of an interrupted update still views the segment; the mapping goes with
            # the last view.
            with contextlib.suppress(BufferError):
                mapping.close()

    def _report(self, report: dict[str, Any]) -> None:
        assert self._mapping is not None and self._init_info is not None
        config = self.parallel_config
        worker = config.data_parallel_index * config.world_size + config.rank
        payload = json.dumps(report).encode()
        offset = self._init_info.data_bytes + worker * REPORT_BYTES
        self._mapping[offset : offset + REPORT_BYTES] = payload.ljust(REPORT_BYTES, b"\0")
