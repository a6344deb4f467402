"""Trainer side of `trl_atropos_gloo`: a policy travels over TCP to servers on any host, with or without a GPU.

The trainer is rank 0 and master of the rendezvous, the workers are ranks 1 to N. The workers' reports come back as JSON
through the rendezvous store; nothing is pickled. Neither side is authenticated or encrypted: use it inside a network
that you trust.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not listed in its stubs
from torch.distributed.distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, Store, Work

from ...errors import WeightSyncError
from ..base import PolicyLayout, TensorSpec, TransferReport, align
from .collective import SAY_S, Cancelled, Collective
from .group import TRAINER_RANK, GroupTransport
from .reports import (
    CHECKSUM_MODULUS,
    WorkerReport,
    check_reports,
    checksum,
    describe_tensors,
    expected_report,
    raise_what_failed,
    say_why_not_beside,
)


if TYPE_CHECKING:
    from ..inference_server import InferenceServer


CHUNK_BYTES = 32 * 2**20
"""Small enough that loading one chunk hides the arrival of the next."""
NUM_THREADS = 2
"""Of gloo: the worker's receive of the next chunk goes on beside a collective that has just ended."""


def joined_key(worker: int) -> str:
    """The key that a worker sets before it joins the group: to why it cannot load a policy beside the one that it serves."""
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


class GlooTransport(GroupTransport):
    """`WeightTransport` for a server with `--weight-transfer-config '{"backend": "trl_atropos_gloo"}'`.

    The policy is sent in chunks of `chunk_bytes` straight from the staging memory; a worker loads one chunk while it
    receives the next. Tensors are not split, so a larger one is a chunk of its own.

    `timeout_s` is the deadline in seconds of connecting and of every chunk: a worker that is killed or stopped ends a
    transfer within it. `host` and `port` are those of `GroupTransport`.
    """

    def __init__(
        self, timeout_s: float = 300.0, *, host: str | None = None, port: int = 0, chunk_bytes: int = CHUNK_BYTES
    ):
        super().__init__(timeout_s, host=host, port=port)
        self.chunk_bytes = chunk_bytes
        self._store: Store | None = None
        self._group: ProcessGroupGloo | None = None
        self._num_workers = 0
        self._sequence = 0
        self._checksums: list[int] | None = None
        self._why_not_beside = ""

    def _meet(self, client: InferenceServer) -> None:
        listener, meeting = self._listen(client)
        host, port = meeting["master_address"], meeting["master_port"]
        # In no local variable: the traceback of an error would keep the port.
        name = secrets.token_hex(16)
        self._store = connect_store(host, port, name, self.timeout_s, listener.detach())
        self._num_workers = meeting["world_size"] - meeting["rank_offset"]
        rendezvous = Collective(
            "gloo rendezvous",
            lambda is_cancelled: self._join(host, meeting["world_size"], is_cancelled),
            timeout_s=self.timeout_s,
        )
        init_info = {**meeting, "name": name, "timeout_s": self.timeout_s}
        rendezvous.run_beside(lambda: client.init_weight_transfer_engine(init_info))
        whys = [self._require_store().get(joined_key(worker)).decode() for worker in range(self._num_workers)]
        self._why_not_beside = next(filter(None, whys), "")
        say_why_not_beside(client.base_url, self._why_not_beside)

    def prepare(self, specs: Sequence[TensorSpec]) -> None:
        """Sum what is going to be sent, chunk by chunk. See `WeightTransport.prepare`."""
        _, layout = self._require_open()
        self._checksums = [
            checksum(layout.view(self._memory, spec) for spec in chunk.specs)
            for chunk in cut_chunks(layout, specs, self.chunk_bytes)
        ]

    @property
    def can_build(self) -> bool:
        """Whether every worker can. See `BuildsBeside.can_build`."""
        return not self._why_not_beside

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Broadcast tensors to every worker and check the reports. See `WeightTransport.send`."""
        return self._send(specs, is_beside=False)

    def build(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Broadcast tensors to every worker, which loads them beside its policy. See `BuildsBeside.build`."""
        return self._send(specs, is_beside=True)

    def _send(self, specs: Sequence[TensorSpec], *, is_beside: bool) -> TransferReport:
        client, layout = self._require_open()
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
            "is_beside": is_beside,
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
        try:
            broadcast.run_beside(lambda: client.update_weights(update_info))
        except WeightSyncError:
            if is_beside:
                # The request, which would say why, was answered before.
                raise_what_failed(self._read_report, self._num_workers, self._sequence, SAY_S)
            raise
        sent = expected_report(self._sequence, specs, sum(checksums) % CHECKSUM_MODULUS)
        # The answer to a request that only begins the loading does not say that the server has come to the end of it.
        check_server = client.get_weight_version if is_beside else None
        report = check_reports(self._read_report, self._num_workers, sent, self.timeout_s, check_server)
        for worker in range(self._num_workers):
            self._require_store().delete_key(report_key(self._sequence, worker))
        return report

    def _leave(self) -> None:
        self._checksums = None
        self._group = None
        self._store = None

    def _require_store(self) -> Store:
        assert self._store is not None
        return self._store

    def _join(self, host: str, world_size: int, is_cancelled: threading.Event) -> None:
        # Only with everybody there: joining cannot be cancelled.
        self._wait_for([joined_key(worker) for worker in range(self._num_workers)], is_cancelled)
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
        absence = (
            "They cannot reach the trainer, or they are stopped.",
            "Look at the server's log; name an address that the server reaches with --vllm_group_host.",
        )
        self._wait_for_workers(self._require_store(), keys, is_cancelled, absence)

    def _read_report(self, worker: int) -> WorkerReport | None:
        key = report_key(self._sequence, worker)
        if not self._require_store().check([key]):
            return None
        return WorkerReport.from_json(self._require_store().get(key))
