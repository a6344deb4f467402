"""What the transports over a process group of trainer and workers have in common: the meeting and the staging memory."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.distributed_c10d import Store

from ...errors import DeviceLostError, WeightSyncError, WeightSyncTimeout
from ..base import PolicyLayout
from .collective import Cancelled
from .rendezvous import bind, local_address_towards, server_host
from .reports import POLL_INTERVAL_S


if TYPE_CHECKING:
    from ..inference_server import InferenceServer


TRAINER_RANK = 0
RANK_OFFSET = 1
"""Rank of worker 0."""


class GroupTransport:
    """The part of a `WeightTransport` that opens and closes. The trainer is rank 0 and master of the rendezvous, the workers
    are ranks 1 to N.

    A derived class joins them in `_meet` and lets go of group and port in `_leave`.

    `timeout_s` is the deadline in seconds of everything that waits for a worker. `host` is the address of this machine
    where the workers meet the trainer, and the only one that it listens on; the one that faces the server if not given.
    `port` 0 takes a free one.
    """

    def __init__(self, timeout_s: float = 300.0, *, host: str | None = None, port: int = 0):
        self.timeout_s = timeout_s
        self.host = host
        self.port = port
        self._client: InferenceServer | None = None
        self._layout: PolicyLayout | None = None
        self._memory = torch.zeros(0, dtype=torch.uint8)

    def open(self, client: InferenceServer, layout: PolicyLayout) -> torch.Tensor:
        """Meet the workers. See `WeightTransport.open`."""
        self.close()
        try:
            self._meet(client)
        except BaseException:
            self.close()
            raise
        self._client = client
        self._layout = layout
        if self._memory.numel() != layout.num_bytes:
            self._memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        return self._memory

    def close(self) -> None:
        """Leave the group and free the port. See `WeightTransport.close`."""
        self._client = None
        self._layout = None
        self._leave()

    def _meet(self, client: InferenceServer) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        raise NotImplementedError

    def _require_open(self) -> tuple[InferenceServer, PolicyLayout]:
        if self._client is None or self._layout is None:
            raise RuntimeError("The transport is not open: call open() first.")
        return self._client, self._layout

    def _listen(self, client: InferenceServer) -> tuple[socket.socket, dict[str, Any]]:
        """Bind the port of the meeting.

        Returns the listening socket, and where and with how many the workers meet: `master_address`, `master_port`,
        `rank_offset`, `world_size`.
        """
        world_size = client.get_world_size() + RANK_OFFSET
        host = self.host or local_address_towards(server_host(client.base_url))
        listener = bind(host, self.port)
        meeting = {
            "master_address": host,
            "master_port": listener.getsockname()[1],
            "rank_offset": RANK_OFFSET,
            "world_size": world_size,
        }
        return listener, meeting

    def _wait_for_workers(
        self, store: Store, keys: Sequence[str], is_cancelled: threading.Event, absence: tuple[str, str]
    ) -> None:
        """Wait until every worker has set its key, the first key being that of worker 0.

        `absence` says why a worker may not come, and how to mend that.

        Raises:
            `Cancelled`: once the event is set.
            [`WeightSyncTimeout`]: naming the workers that did not come.
        """
        deadline = time.monotonic() + self.timeout_s
        while not store.check(list(keys)):
            if is_cancelled.wait(POLL_INTERVAL_S):
                raise Cancelled
            if time.monotonic() > deadline:
                absent = [worker for worker, key in enumerate(keys) if not store.check([key])]
                raise WeightSyncTimeout(
                    f"Workers {absent} of {len(keys)} did not come within {self.timeout_s:.0f} s.", *absence
                )


@contextmanager
def watching_device(device: torch.device) -> Iterator[None]:
    """Within the context, an error of sending from a CUDA device looks whether that was lost, too.

    A kernel of NCCL that waits for a worker reads that worker's memory, where both GPUs reach each other. Seen on an H200: it
    goes with the worker that is killed, and with it every other kernel of this process.

    Raises:
        [`DeviceLostError`]: if it was.
    """
    try:
        yield
    except WeightSyncError as exc:
        try:
            is_in_use: Callable[[], bool] = torch.cuda.is_initialized
            if is_in_use():
                # Says what has failed, and waits for nothing.
                torch.cuda.current_stream(device).query()
        except RuntimeError as lost:
            raise DeviceLostError(
                f"{exc.what} The trainer's {device} was lost with it ({str(lost).splitlines()[0]}).",
                f"{exc.why} A worker that ended in the middle of a broadcast has taken memory with it that this process was reading.",
                "Start the trainer again with --resume_from_checkpoint; the server's log says why the worker ended.",
            ) from exc
        raise


def numbered(device: torch.device) -> torch.device:
    """The CUDA device with its number: one without is the current one of this thread, where another thread has its own."""
    return device if device.index is not None else torch.device(device.type, torch.cuda.current_device())
