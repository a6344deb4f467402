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
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not listed in its stubs
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store, Work

from ...errors import WeightSyncError, WeightSyncTimeout
from ..base import PolicyLayout, TensorSpec, TransferReport
from .collective import Cancelled, Collective
from .gloo import RANK_OFFSET, TRAINER_RANK, Chunk, cut_chunks, join_group, start_broadcast
from .rendezvous import bind, local_address_towards, server_host
from .reports import POLL_INTERVAL_S


if TYPE_CHECKING:
    from ..inference_server import InferenceServer


GROUP_NAME = "trl_atropos"
"""Always the same, so that the group of a trainer that is gone can be taken down by the next one."""

BUCKET_BYTES = 256 * 2**20
"""How much of a policy a worker holds beside its weights while it loads."""


def arrived_key(rank: int) -> str:
    """The key under which gloo leaves the address of a rank when it begins to join."""
    return f"0/{rank}"


class SGLangGroupTransport:
    """What both groups have in common: the meeting, the buckets, and the requests beside them.

    `timeout_s` is the deadline in seconds of connecting and of every bucket. `host` is the address of this machine
    where the workers meet the trainer; the one that faces the server if not given. `port` 0 takes a free one. Buckets
    have at most `bucket_bytes`, a larger tensor is one of its own.
    """

    backend: str
    """Of torch.distributed, on both sides."""

    def __init__(
        self, timeout_s: float = 300.0, *, host: str | None = None, port: int = 0, bucket_bytes: int = BUCKET_BYTES
    ):
        self.timeout_s = timeout_s
        self.host = host
        self.port = port
        self.bucket_bytes = bucket_bytes
        self._client: InferenceServer | None = None
        self._layout: PolicyLayout | None = None
        self._memory = torch.zeros(0, dtype=torch.uint8)
        self._store: Store | None = None

    def open(self, client: InferenceServer, layout: PolicyLayout) -> torch.Tensor:
        """Meet the workers. See `WeightTransport.open`."""
        self.close()
        # Of a trainer that was connected before, which may have been killed at any point.
        client.shutdown_weight_transfer_engine()
        num_workers = client.get_world_size()
        world_size = num_workers + RANK_OFFSET
        host = self.host or local_address_towards(server_host(client.base_url))
        listener = bind(host, self.port)
        port = listener.getsockname()[1]
        timeout = timedelta(seconds=self.timeout_s)
        # As `init_custom_process_group` of SGLang makes it. The trainer does not wait for the workers here.
        store = TCPStore(
            host,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._store = store
        init_info = {
            "master_address": host,
            "master_port": port,
            "rank_offset": RANK_OFFSET,
            "world_size": world_size,
            "group_name": GROUP_NAME,
            "backend": self.backend,
        }
        rendezvous = Collective(
            f"{self.backend} rendezvous",
            lambda is_cancelled: self._join(PrefixStore(GROUP_NAME, store), world_size, host, is_cancelled),
            timeout_s=self.timeout_s,
            end_s=0.0,  # NCCL waits for the workers inside, and gloo ends by itself.
        )
        try:
            rendezvous.run_beside(lambda: client.init_weight_transfer_engine(init_info))
        except BaseException:
            self.close()
            raise
        self._client = client
        self._layout = layout
        if self._memory.numel() != layout.num_bytes:
            self._memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        return self._memory

    def prepare(self, specs: Sequence[TensorSpec]) -> None:
        """Nothing: the workers are told no checksums. See `WeightTransport.prepare`."""

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Broadcast tensors to every worker, bucket by bucket. See `WeightTransport.send`."""
        if self._client is None or self._layout is None:
            raise RuntimeError("The transport is not open: call open() first.")
        start = time.perf_counter()
        buckets = list(cut_chunks(self._layout, specs, self.bucket_bytes))
        for index, bucket in enumerate(buckets):
            self._send(self._client, bucket, is_last=index == len(buckets) - 1)
        # The workers do not say how long they loaded; each has when its request is answered.
        return TransferReport(sum(spec.num_bytes for spec in specs), load_s=time.perf_counter() - start)

    def close(self) -> None:
        """Leave the group and free the port. See `WeightTransport.close`."""
        self._client = None
        self._layout = None
        self._leave()
        self._store = None

    def _send(self, client: InferenceServer, bucket: Chunk, *, is_last: bool) -> None:
        layout, memory = self._layout, self._memory
        assert layout is not None
        update_info = {
            "names": [spec.name for spec in bucket.specs],
            "dtypes": [spec.dtype_name for spec in bucket.specs],
            "shapes": [list(spec.shape) for spec in bucket.specs],
            "group_name": GROUP_NAME,
            "is_last": is_last,
        }
        tensors = [layout.view(memory, spec) for spec in bucket.specs]
        broadcast = Collective(
            f"{self.backend} broadcast", lambda _: self._broadcast(tensors), timeout_s=self.timeout_s, end=self._leave
        )
        broadcast.run_beside(lambda: client.update_weights(update_info))

    def _join(self, store: Store, world_size: int, host: str, is_cancelled: threading.Event) -> None:
        raise NotImplementedError

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        raise NotImplementedError


class SGLangGlooTransport(SGLangGroupTransport):
    """`WeightTransport` for an SGLang server on a CPU, over gloo. A worker that is killed ends a transfer at once, one that
    is stopped within `timeout_s`.
    """

    backend = "gloo"

    _group: ProcessGroupGloo | None = None

    def _join(self, store: Store, world_size: int, host: str, is_cancelled: threading.Event) -> None:
        # SGLang's end comes from torch.distributed, which puts the name of the group and the device before its keys.
        prefixed = PrefixStore("cpu/", PrefixStore(f"{GROUP_NAME}/", store))
        keys = [arrived_key(rank) for rank in range(RANK_OFFSET, world_size)]
        deadline = time.monotonic() + self.timeout_s
        # Only with everybody there: joining cannot be cancelled.
        while not prefixed.check(keys):
            if is_cancelled.wait(POLL_INTERVAL_S):
                raise Cancelled
            if time.monotonic() > deadline:
                absent = [key for key in keys if not prefixed.check([key])]
                raise WeightSyncTimeout(
                    f"{len(absent)} of {len(keys)} workers did not come within {self.timeout_s:.0f} s.",
                    "They cannot reach the trainer, they are stopped, or they still wait for a trainer that is gone.",
                    "Look at the server's log and restart it; name an address that it reaches with --vllm_group_host.",
                )
        self._group = join_group(prefixed, TRAINER_RANK, world_size, host, self.timeout_s)

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        group = self._group
        assert group is not None
        works: list[Work] = [start_broadcast(group, tensor) for tensor in tensors]
        for work in works:
            work.wait()

    def _leave(self) -> None:
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

    def open(self, client: InferenceServer, layout: PolicyLayout) -> torch.Tensor:
        """Meet the workers. See `WeightTransport.open`."""
        if self.device.type != "cuda":
            raise WeightSyncError(
                f"The SGLang server at {client.base_url} runs on CUDA, the trainer on {self.device}.",
                "NCCL moves data between CUDA devices only.",
                "Train on a GPU, or start the server with --device cpu.",
            )
        return super().open(client, layout)

    def _join(self, store: Store, world_size: int, host: str, is_cancelled: threading.Event) -> None:
        from torch.distributed.distributed_c10d import Backend, _new_process_group_helper

        # A thread begins with device 0.
        torch.cuda.set_device(self.device)
        make: Callable[..., Any] = _new_process_group_helper
        self._group, _ = make(
            world_size,
            TRAINER_RANK,
            [],
            Backend("nccl"),
            store,
            group_name=GROUP_NAME,
            timeout=timedelta(seconds=self.timeout_s),
        )

    def _broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        torch.cuda.set_device(self.device)
        works = [start_broadcast(self._group, tensor.to(self.device, non_blocking=True)) for tensor in tensors]
        for work in works:
            work.wait()
        torch.cuda.synchronize(self.device)

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            # Also while it waits for a worker.
            group.abort()
            torch.distributed.destroy_process_group(group)
