"""A policy travels to a stock `sglang.launch_server` through a torch.distributed group: gloo, or NCCL on CUDA.

The trainer is rank 0 and master of the rendezvous, the workers are ranks 1 to N. SGLang brings its own end and reports
nothing: that it loaded every tensor is proven by the publisher's logprob probe, every time. Neither side is
authenticated or encrypted: use it inside a network that you trust.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store, Work

from ...errors import WeightSyncError
from ..base import TensorSpec, TransferReport
from .collective import Collective
from .gloo import Chunk, connect_store, cut_chunks, join_group, start_broadcast
from .group import RANK_OFFSET, TRAINER_RANK, GroupTransport, numbered, watching_device


if TYPE_CHECKING:
    from ..base import PolicyLayout
    from ..inference_server import InferenceServer


GROUP_NAME = "trl_atropos"
"""Always the same, so that the group of a trainer that is gone can be taken down by the next one."""

BUCKET_BYTES = 256 * 2**20
"""How much of a policy a worker holds beside its weights while it loads."""


LEAVE_S = 2.0
"""Seconds that a broadcast beside a failed request is waited for. The end of a worker ends it at once; while a worker lives
and does not receive, nothing on this side ends a broadcast of gloo before its deadline."""


def arrived_key(rank: int) -> str:
    """The key under which gloo leaves the address of a rank when it begins to join."""
    return f"0/{rank}"


def in_group(store: Store) -> Store:
    """The store with what torch.distributed, from which SGLang's end comes, puts before the keys of a gloo group."""
    return PrefixStore("cpu/", PrefixStore(f"{GROUP_NAME}/", store))


class SGLangGroupTransport(GroupTransport):
    """What both groups have in common: the meeting, the buckets, and the requests beside them.

    `timeout_s` is the deadline in seconds of connecting and of every bucket. `host` and `port` are those of
    `GroupTransport`. Buckets have at most `bucket_bytes`, a larger tensor is one of its own.
    """

    backend: str
    """Of torch.distributed, on both sides."""

    def __init__(
        self, timeout_s: float = 300.0, *, host: str | None = None, port: int = 0, bucket_bytes: int = BUCKET_BYTES
    ):
        super().__init__(timeout_s, host=host, port=port)
        self.bucket_bytes = bucket_bytes
        self._store: Store | None = None

    def _meet(self, client: InferenceServer) -> None:
        # Of a trainer that was connected before, which may have been killed at any point.
        client.shutdown_weight_transfer_engine()
        listener, meeting = self._listen(client)
        host, port = meeting["master_address"], meeting["master_port"]
        # As `init_custom_process_group` of SGLang makes it. In no local variable: the traceback of an error would keep
        # the port.
        self._store = connect_store(host, port, GROUP_NAME, self.timeout_s, listener.detach())
        rendezvous = Collective(
            f"{self.backend} rendezvous",
            lambda is_cancelled: self._join(meeting, is_cancelled),
            timeout_s=self.timeout_s,
            end_s=0.0,  # NCCL waits for the workers inside, and gloo ends by itself.
        )
        init_info = {**meeting, "group_name": GROUP_NAME, "backend": self.backend}
        rendezvous.run_beside(lambda: client.init_weight_transfer_engine(init_info))

    def prepare(self, specs: Sequence[TensorSpec]) -> None:
        """Nothing: the workers are told no checksums. See `WeightTransport.prepare`."""

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Broadcast tensors to every worker, bucket by bucket. See `WeightTransport.send`."""
        client, layout = self._require_open()
        start = time.perf_counter()
        buckets = list(cut_chunks(layout, specs, self.bucket_bytes))
        for index, bucket in enumerate(buckets):
            self._send(client, layout, bucket, is_last=index == len(buckets) - 1)
        # The workers do not say how long they loaded; each has when its request is answered.
        return TransferReport(sum(spec.num_bytes for spec in specs), load_s=time.perf_counter() - start)

    def _leave(self) -> None:
        self._leave_group()
        self._store = None

    def _send(self, client: InferenceServer, layout: PolicyLayout, bucket: Chunk, *, is_last: bool) -> None:
        update_info = {
            "names": [spec.name for spec in bucket.specs],
            "dtypes": [spec.dtype_name for spec in bucket.specs],
            "shapes": [list(spec.shape) for spec in bucket.specs],
            "group_name": GROUP_NAME,
            "is_last": is_last,
        }
        tensors = [layout.view(self._memory, spec) for spec in bucket.specs]
        broadcast = Collective(
            f"{self.backend} broadcast",
            lambda _: self._broadcast(tensors),
            timeout_s=self.timeout_s,
            end=self._leave_group,
            end_s=LEAVE_S,
        )
        broadcast.run_beside(lambda: client.update_weights(update_info))

    def _require_store(self) -> Store:
        assert self._store is not None
        return self._store

    def _join(self, meeting: dict[str, Any], is_cancelled: threading.Event) -> None:
        raise NotImplementedError

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        raise NotImplementedError

    def _leave_group(self) -> None:
        raise NotImplementedError


class SGLangGlooTransport(SGLangGroupTransport):
    """`WeightTransport` for an SGLang server on a CPU, over gloo. A worker that is killed ends a transfer at once, one that
    is stopped within `timeout_s`.
    """

    backend = "gloo"

    _group: ProcessGroupGloo | None = None

    def _join(self, meeting: dict[str, Any], is_cancelled: threading.Event) -> None:
        host, world_size = meeting["master_address"], meeting["world_size"]
        absence = (
            "They cannot reach the trainer, they are stopped, or they still wait for a trainer that is gone.",
            "Look at the server's log and restart it; name an address that it reaches with --vllm_group_host.",
        )
        keys = [arrived_key(rank) for rank in range(RANK_OFFSET, world_size)]
        # Only with everybody there: joining cannot be cancelled.
        self._wait_for_workers(in_group(self._require_store()), keys, is_cancelled, absence)
        # Another connection to the store: a broadcast that cannot be ended keeps the group, and would keep the port.
        store = connect_store(host, meeting["master_port"], GROUP_NAME, self.timeout_s)
        self._group = join_group(in_group(store), TRAINER_RANK, world_size, host, self.timeout_s)

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        group = self._group
        assert group is not None
        works: list[Work] = [start_broadcast(group, tensor) for tensor in tensors]
        for work in works:
            work.wait()

    def _leave_group(self) -> None:
        self._group = None


class SGLangNcclTransport(SGLangGroupTransport):
    """`WeightTransport` for an SGLang server on CUDA, over NCCL, from the CUDA `device` of the trainer's main process.

    Was not run on GPUs by the authors: it is the gloo transport with another group, which is made call by call as
    SGLang makes its end.
    """

    backend = "nccl"

    _group: Any = None

    def __init__(self, device: torch.device, timeout_s: float = 300.0, **options: Any):
        super().__init__(timeout_s, **options)
        self.device = device

    def _meet(self, client: InferenceServer) -> None:
        if self.device.type != "cuda":
            raise WeightSyncError(
                f"The SGLang server at {client.base_url} runs on CUDA, the trainer on {self.device}.",
                "NCCL moves data between CUDA devices only.",
                "Train on a GPU, or start the server with --device cpu.",
            )
        self.device = numbered(self.device)
        super()._meet(client)

    def _send(self, client: InferenceServer, layout: PolicyLayout, bucket: Chunk, *, is_last: bool) -> None:
        with watching_device(self.device):
            super()._send(client, layout, bucket, is_last=is_last)

    def _join(self, meeting: dict[str, Any], is_cancelled: threading.Event) -> None:
        from torch.distributed.distributed_c10d import Backend, _new_process_group_helper

        # A thread begins with device 0.
        torch.cuda.set_device(self.device)
        make: Callable[..., Any] = _new_process_group_helper
        self._group, _ = make(
            meeting["world_size"],
            TRAINER_RANK,
            [],
            Backend("nccl"),
            self._require_store(),
            group_name=GROUP_NAME,
            timeout=timedelta(seconds=self.timeout_s),
        )

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        torch.cuda.set_device(self.device)
        works = [start_broadcast(self._group, tensor.to(self.device, non_blocking=True)) for tensor in tensors]
        for work in works:
            work.wait()
        torch.cuda.synchronize(self.device)

    def _leave_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # Also while it waits for a worker.
            group.abort()
            torch.distributed.destroy_process_group(group)
