"""vLLM's NCCL engine on a CPU: its own rendezvous, packing and unpacking, with gloo in the place of libnccl.

What it does not show: streams, and the memory that copies read while they run; two ranks on one GPU; how long NCCL takes
to notice that a rank is gone. As with NCCL, a broadcast that a dead rank left behind goes on until `destroy()`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import vllm.distributed.device_communicators.pynccl as pynccl
import vllm.distributed.device_communicators.pynccl_wrapper as pynccl_wrapper
import vllm.distributed.weight_transfer.packed_tensor as packed_tensor
from torch.distributed.distributed_c10d import AllreduceOptions, BroadcastOptions, PrefixStore, ProcessGroupGloo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from trl_atropos.weight_sync.base import TensorSpec
from trl_atropos.weight_sync.transports.nccl import NcclTransport


class GlooCommunicator:
    """`PyNcclCommunicator`, as far as weight transfer uses it."""

    def __init__(self, group: Any, device: Any, library_path: str | None = None):
        self.group, self.available, self.disabled = group, True, False
        self._store = PrefixStore("stand-in", group.store)
        self._num_broadcasts = 0
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=60)
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._gloo: ProcessGroupGloo | None = ProcessGroupGloo(self._store, group.rank, group.world_size, options)
        # vLLM's warm-up.
        self._gloo.allreduce([torch.zeros(1)], AllreduceOptions()).wait()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert tensor.is_contiguous() and tensor.dtype == torch.uint8
        self._num_broadcasts += 1
        others = [rank for rank in range(self.group.world_size) if rank != src]
        if self.group.rank == src:
            # Gloo could not be told to end a broadcast that a rank never joins.
            self._wait_for([f"{self._num_broadcasts}/{rank}" for rank in others])
        else:
            self._store.set(f"{self._num_broadcasts}/{self.group.rank}", "")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._gloo.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self.available, self.disabled = False, True
        # Its connections close with the last hold on it.
        self._gloo = None

    def _wait_for(self, keys: list[str]) -> None:
        while not self._store.check(keys):
            if self.disabled:
                raise RuntimeError("NCCL error: the communicator was aborted")
            time.sleep(0.001)


class NoStream:
    """A stream of a device that has none."""

    def synchronize(self) -> None:
        pass


def install() -> None:
    """Put gloo in the place of libnccl in this process, and nothing in the place of streams."""
    pynccl.PyNcclCommunicator = GlooCommunicator
    pynccl_wrapper.NCCLLibrary = object
    packed_tensor._get_streams = lambda device, num_buffers: (NoStream(),) * num_buffers
    stream_context = torch.cuda.stream
    torch.cuda.stream = lambda stream: nullcontext() if isinstance(stream, NoStream) else stream_context(stream)
    torch.accelerator.current_device_index = lambda: 0


class StandInEngine(NCCLWeightTransferEngine):
    """The stock engine, in a worker process of a test."""

    def __init__(self, *args: Any):
        install()
        super().__init__(*args)


class StandInTransport(NcclTransport):
    """The NCCL transport without what touches a device."""

    def __init__(self, timeout_s: float = 300.0, **options: Any):
        install()
        super().__init__(torch.device("cuda:0"), timeout_s, **options)

    def _use_device(self) -> None:
        pass

    def tensors_on_device(self, specs: Sequence[TensorSpec]) -> Any:
        for spec in specs:
            yield spec.name, self._layout.view(self._memory, spec).clone()
