"""Trainer side of `trl_atropos_gloo`: a policy travels over TCP to servers on any host, with or without a GPU.

The trainer is rank 0 and master of the rendezvous, the workers are ranks 1 to N. The workers' reports come back as JSON
through the rendezvous store; nothing is pickled. Neither side is authenticated or encrypted: use it inside a network
that you trust.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not listed in its stubs
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store, Work

from ...errors import WeightSyncTimeout
from ..base import PolicyLayout, TensorSpec, TransferReport, align
from .collective import Cancelled, Collective
from .rendezvous import bind, local_address_towards, server_host
from .reports import (
    CHECKSUM_MODULUS,
    POLL_INTERVAL_S,
    WorkerReport,
    check_reports,
    checksum,
    describe_tensors,
    expected_report,
)


if TYPE_CHECKING:
    from ..inference_server import InferenceServer


TRAINER_RANK = 0
RANK_OFFSET = 1
"""Rank of worker 0."""

CHUNK_BYTES = 32 * 2**20
"""Small enough that loading one chunk hides the arrival of the next."""
NUM_THREADS = 2
"""Of gloo: the worker's receive of the next chunk goes on beside a collective that has just ended."""


def joined_key(worker: int) -> str:
    """The key that a worker sets before it joins the group."""
    return f"joined/{worker}"


def receiving_key(sequence: int, worker: int) -> str:
    """The key that a worker sets before it receives."""
    return f"receiving/{sequence}/{worker}"


def report_key(sequence: int, worker: int) -> str:
    """The key under which a worker leaves its report after it has loaded."""
    return f"report/{sequence}/{worker}"


def connect_store(host: str, port: int, name: str, timeout_s: float, listen_fd: int | None = None) -> Store:
    """Open the rendezvous store at the trainer's address and port.

    `name` is that of this meeting: a worker that comes late to the one before, on the same port, is not counted here.
    `timeout_s` is the deadline of every operation in seconds. `listen_fd`, which only the trainer gives, is the
    listening socket, which becomes the store's.
    """
    store = TCPStore(
        host,
        port,
        is_master=listen_fd is not None,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
    return PrefixStore(name, store)


def join_group(store: Store, rank: int, world_size: int, host: str, timeout_s: float) -> ProcessGroupGloo:
    """Join trainer and workers.

    The trainer has rank 0 and the N workers have the ranks 1 to N, so `world_size` is N + 1. `host` is the address of
    this side, the only one that it listens on; left alone, gloo looks up the name of the machine, which containers
    often cannot resolve. `timeout_s` is the deadline of every operation in seconds.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = NUM_THREADS
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    return ProcessGroupGloo(store, rank, world_size, options)


def start_broadcast(group: ProcessGroupGloo, data: torch.Tensor) -> Work:
    """Start to broadcast a buffer: rank 0 sends it, all others receive into it."""
    options = BroadcastOptions()
    options.rootRank = TRAINER_RANK
    options.rootTensor = 0
    work: Work = group.broadcast([data], options)  # type: ignore[attr-defined]
    return work


@dataclass(frozen=True)
class Chunk:
    """Consecutive tensors that lie side by side in the staging memory, from byte offset `start` on."""

    start: int
    specs: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        """Size with the padding between the tensors, in bytes."""
        return sum(align(spec.num_bytes) for spec in self.specs)


def cut_chunks(layout: PolicyLayout, specs: Sequence[TensorSpec], chunk_bytes: int) -> Iterator[Chunk]:
    """Group tensors into chunks of at most `chunk_bytes`; a larger tensor is a chunk of its own."""
    start = end = 0
    taken: list[TensorSpec] = []
    for spec in specs:
        offset = layout.offsets[spec.name]
        stop = offset + align(spec.num_bytes)
        if taken and (offset != end or stop - start > chunk_bytes):
            yield Chunk(start, tuple(taken))
            taken = []
        if not taken:
            start = offset
        taken.append(spec)
        end = stop
    if taken:
        yield Chunk(start, tuple(taken))


class GlooTransport:
    """`WeightTransport` for a server with `--weight-transfer-config '{"backend": "trl_atropos_gloo"}'`.

    The policy is sent in chunks of `chunk_bytes` straight from the staging memory; a worker loads one chunk while it
    receives the next. Tensors are not split, so a larger one is a chunk of its own.

    `timeout_s` is the deadline in seconds of connecting and of every chunk: a worker that is killed or stopped ends a
    transfer within it. `host` is the address of this machine where the workers meet the trainer, and the only one that
    it listens on; the one that faces the server if not given. `port` 0 takes a free one.
    """

    def __init__(
        self, timeout_s: float = 300.0, *, host: str | None = None, port: int = 0, chunk_bytes: int = CHUNK_BYTES
    ):
        self.timeout_s = timeout_s
        self.host = host
        self.port = port
        self.chunk_bytes = chunk_bytes
        self._client: InferenceServer | None = None
        self._layout: PolicyLayout | None = None
        self._memory = torch.zeros(0, dtype=torch.uint8)
        self._store: Store | None = None
        self._group: ProcessGroupGloo | None = None
        self._num_workers = 0
        self._sequence = 0
        self._checksums: list[int] | None = None

    def open(self, client: InferenceServer, layout: PolicyLayout) -> torch.Tensor:
        """Meet the workers. See `WeightTransport.open`."""
        self.close()
        num_workers = client.get_world_size()
        host = self.host or local_address_towards(server_host(client.base_url))
        listener = bind(host, self.port)
        port = listener.getsockname()[1]
        # In no local variable: the traceback of an error would keep the port.
        name = secrets.token_hex(16)
        self._store = connect_store(host, port, name, self.timeout_s, listener.detach())
        self._num_workers = num_workers
        init_info = {
            "master_address": host,
            "master_port": port,
            "name": name,
            "rank_offset": RANK_OFFSET,
            "world_size": num_workers + RANK_OFFSET,
            "timeout_s": self.timeout_s,
        }
        rendezvous = Collective(
            "gloo rendezvous",
            lambda is_cancelled: self._join(host, is_cancelled),
            timeout_s=self.timeout_s,
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
        """Sum what is going to be sent, chunk by chunk. See `WeightTransport.prepare`."""
        layout = self._require_layout()
        self._checksums = [
            checksum(layout.view(self._memory, spec) for spec in chunk.specs)
            for chunk in cut_chunks(layout, specs, self.chunk_bytes)
        ]

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Broadcast tensors to every worker and check the reports. See `WeightTransport.send`."""
        client, layout = self._client, self._require_layout()
        assert client is not None
        if self._checksums is None:
            self.prepare(specs)
        # Of what is staged now, so of one transfer.
        checksums, self._checksums = self._checksums, None
        assert checksums is not None
        self._sequence += 1
        chunks = list(cut_chunks(layout, specs, self.chunk_bytes))
        update_info = {
            "sequence": self._sequence,
            "is_complete": len(specs) == len(layout.specs),
            **describe_tensors(specs),
            "offsets": [layout.offsets[spec.name] - chunk.start for chunk in chunks for spec in chunk.specs],
            "chunk_num_tensors": [len(chunk.specs) for chunk in chunks],
            "chunk_num_bytes": [chunk.num_bytes for chunk in chunks],
            "checksums": checksums,
        }
        broadcast = Collective(
            "gloo broadcast",
            lambda is_cancelled: self._broadcast(chunks, is_cancelled),
            timeout_s=self.timeout_s,
        )
        broadcast.run_beside(lambda: client.update_weights(update_info))
        sent = expected_report(self._sequence, specs, sum(checksums) % CHECKSUM_MODULUS)
        report = check_reports(self._read_report, self._num_workers, sent, self.timeout_s)
        for worker in range(self._num_workers):
            self._require_store().delete_key(report_key(self._sequence, worker))
        return report

    def close(self) -> None:
        """Leave the group and free the port. See `WeightTransport.close`."""
        self._client = None
        self._layout = None
        self._checksums = None
        self._group = None
        self._store = None

    def _require_layout(self) -> PolicyLayout:
        if self._layout is None:
            raise RuntimeError("The transport is not open: call open() first.")
        return self._layout

    def _require_store(self) -> Store:
        assert self._store is not None
        return self._store

    def _join(self, host: str, is_cancelled: threading.Event) -> None:
        # Only with everybody there: joining cannot be cancelled.
        self._wait_for([joined_key(worker) for worker in range(self._num_workers)], is_cancelled)
        world_size = self._num_workers + RANK_OFFSET
        self._group = join_group(self._require_store(), TRAINER_RANK, world_size, host, self.timeout_s)

    def _broadcast(self, chunks: Sequence[Chunk], is_cancelled: threading.Event) -> None:
        keys = [receiving_key(self._sequence, worker) for worker in range(self._num_workers)]
        # A worker that never begins to receive would hold the first chunk until the timeout.
        self._wait_for(keys, is_cancelled)
        for key in keys:
            self._require_store().delete_key(key)
        try:
            for chunk in chunks:
                if is_cancelled.is_set():
                    raise Cancelled
                assert self._group is not None
                start_broadcast(self._group, self._memory[chunk.start : chunk.start + chunk.num_bytes]).wait()
        except BaseException:
            # Ends the connections, for those workers that wait for the next chunk.
            self._group = None
            raise

    def _wait_for(self, keys: list[str], is_cancelled: threading.Event) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not self._require_store().check(keys):
            if is_cancelled.wait(POLL_INTERVAL_S):
                raise Cancelled
            if time.monotonic() > deadline:
                absent = [worker for worker, key in enumerate(keys) if not self._require_store().check([key])]
                raise WeightSyncTimeout(
                    f"Workers {absent} of {len(keys)} did not come within {self.timeout_s:.0f} s.",
                    "They cannot reach the trainer, or they are stopped.",
                    "Look at the server's log; name an address that the server reaches with --vllm_group_host.",
                )

    def _read_report(self, worker: int) -> WorkerReport | None:
        key = report_key(self._sequence, worker)
        if not self._require_store().check([key]):
            return None
        return WorkerReport.from_json(self._require_store().get(key))
