"""Trainer side of `trl_atropos_shm`: a policy travels through shared memory to a server on the same host.

The segment is private to the user, named unpredictably, and unlinked as soon as every worker has mapped it. From then
on it has no name: the kernel frees it with the last process that maps it, also after SIGKILL of either side. A trainer
that is killed before, within the milliseconds in which the workers map it, leaves a name behind; whoever opens the next
segment knows by its lock that its trainer is gone, and removes it.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...errors import WeightSyncError
from ..base import PolicyLayout, TensorSpec, TransferReport
from .reports import (
    POLL_INTERVAL_S,
    WorkerReport,
    check_reports,
    checksum,
    describe_tensors,
    expected_report,
    say_why_not_beside,
)
from .shm_segment import ENLARGE, REPORT_BYTES, SEGMENT_DIR, SEGMENT_PATTERN, segment_path


if TYPE_CHECKING:
    from ..inference_server import InferenceServer


logger = logging.getLogger(__name__)

MAP_S = 60.0
"""How long the workers are given to map a segment after the server has answered, in seconds."""


class SharedMemoryTransport:
    """`WeightTransport` for a server with `--weight-transfer-config '{"backend": "trl_atropos_shm"}'` on this host.

    The staging memory is the segment that the workers load from, so `send` moves no bytes at all.

    `timeout_s` is how long to wait for the workers' reports after the server has answered, in seconds. What comes
    before has the client's deadline.
    """

    def __init__(self, timeout_s: float = 300.0) -> None:
        self.timeout_s = timeout_s
        self._client: InferenceServer | None = None
        self._layout: PolicyLayout | None = None
        self._mapping: mmap.mmap | None = None
        self._num_workers = 0
        self._sequence = 0
        self._checksum: int | None = None
        self._why_not_beside = ""

    def open(self, client: InferenceServer, layout: PolicyLayout) -> torch.Tensor:
        """Create the segment, let every worker map it, then remove its name. See `WeightTransport.open`."""
        self.close()
        num_workers = client.get_world_size()
        _remove_abandoned_segments()
        name = f"trl_atropos-{secrets.token_hex(16)}"
        path = segment_path(name)
        mapping = _create_segment(path, layout.num_bytes + REPORT_BYTES * num_workers)
        self._layout, self._num_workers, self._mapping = layout, num_workers, mapping
        try:
            client.init_weight_transfer_engine(
                {"segment": name, "data_bytes": layout.num_bytes, "num_workers": num_workers}
            )
            self._wait_until_mapped(client.base_url)
        except BaseException:
            self.close()
            raise
        finally:
            os.unlink(path)
        self._client = client
        return self._memory()

    def prepare(self, specs: Sequence[TensorSpec]) -> None:
        """Sum what is going to be sent. See `WeightTransport.prepare`."""
        layout, memory = self._require_layout(), self._memory()
        self._checksum = checksum(layout.view(memory, spec) for spec in specs)

    @property
    def can_build(self) -> bool:
        """Whether every worker can. See `BuildsBeside.can_build`."""
        return not self._why_not_beside

    def send(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Have every worker load tensors from the segment and check the reports. See `WeightTransport.send`."""
        return self._send(specs, is_beside=False)

    def build(self, specs: Sequence[TensorSpec]) -> TransferReport:
        """Have every worker load tensors beside its policy. See `BuildsBeside.build`."""
        return self._send(specs, is_beside=True)

    def _send(self, specs: Sequence[TensorSpec], *, is_beside: bool) -> TransferReport:
        layout = self._require_layout()
        assert self._client is not None
        if self._checksum is None:
            self.prepare(specs)
        # Of what is staged now, so of one transfer.
        sent, self._checksum = self._checksum, None
        assert sent is not None
        self._sequence += 1
        self._client.update_weights(
            {
                "sequence": self._sequence,
                "is_complete": len(specs) == len(layout.specs),
                "is_beside": is_beside,
                **describe_tensors(specs),
                "offsets": [layout.offsets[spec.name] for spec in specs],
                "checksum": sent,
            }
        )
        expected = expected_report(self._sequence, specs, sent)
        # The answer to a request that only begins the loading does not say that the server has come to the end of it.
        check_server = self._client.get_weight_version if is_beside else None
        return check_reports(self._read_report, self._num_workers, expected, self.timeout_s, check_server)

    def close(self) -> None:
        """Let go of the segment. See `WeightTransport.close`."""
        self._client = None
        self._layout = None
        self._checksum = None
        # Not closed: the staging memory stays readable, and the mapping goes with the last view of it.
        self._mapping = None

    def _wait_until_mapped(self, url: str) -> None:
        """Wait until every worker says in its slot that it has mapped the segment, and whether it can build beside its policy.

        The server's answer alone does not: after a request that failed, it may be older than the mapping of a worker
        (`check_reports`), which would then look for a name that is gone.
        """
        deadline = time.monotonic() + min(self.timeout_s, MAP_S)
        self._why_not_beside = ""
        for worker in range(self._num_workers):
            while (report := self._read_report(worker)) is None:
                if time.monotonic() > deadline:
                    raise WeightSyncError(
                        f"Worker {worker} of the server at {url} has not mapped the shared-memory segment after "
                        f"{min(self.timeout_s, MAP_S):.0f} s.",
                        "The server has answered, and the worker may still be busy with a request that failed before, or "
                        f"does not see the trainer's {SEGMENT_DIR}.",
                        "Look at the server's log and restart it; containers: --ipc=host.",
                    )
                time.sleep(POLL_INTERVAL_S)
            self._why_not_beside = self._why_not_beside or report.why_not_beside
        say_why_not_beside(url, self._why_not_beside)

    def _require_layout(self) -> PolicyLayout:
        if self._layout is None:
            raise RuntimeError("The transport is not open: call open() first.")
        return self._layout

    def _memory(self) -> torch.Tensor:
        assert self._mapping is not None and self._layout is not None
        return torch.frombuffer(self._mapping, dtype=torch.uint8)[: self._layout.num_bytes]

    def _read_report(self, worker: int) -> WorkerReport | None:
        assert self._mapping is not None and self._layout is not None
        offset = self._layout.num_bytes + worker * REPORT_BYTES
        return WorkerReport.from_json(self._mapping[offset : offset + REPORT_BYTES].rstrip(b"\0"))


def _create_segment(path: str, num_bytes: int) -> mmap.mmap:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise WeightSyncError(
            f"A shared-memory segment cannot be created in {os.path.dirname(path)}: {exc}.",
            "The policy travels to the server through it.",
            "Mount a writable tmpfs there (containers: --ipc=host or --shm-size), on Linux.",
        ) from exc
    try:
        # Held by the mapping, so until this process ends or lets go of it.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Reserving now turns a full /dev/shm into an error here instead of a SIGBUS in the middle of a publish.
        os.posix_fallocate(descriptor, 0, num_bytes)
        return mmap.mmap(descriptor, num_bytes)
    except OSError as exc:
        os.unlink(path)
        free = os.statvfs(os.path.dirname(path))
        raise WeightSyncError(
            f"A shared-memory segment of {num_bytes / 2**20:.0f} MiB does not fit: {exc}; "
            f"{free.f_bavail * free.f_frsize / 2**20:.0f} MiB are free in {os.path.dirname(path)}.",
            "The segment holds one copy of the policy in the server's dtype.",
            ENLARGE,
        ) from exc
    finally:
        os.close(descriptor)


def _remove_abandoned_segments() -> None:
    for name in os.listdir(SEGMENT_DIR):
        if not SEGMENT_PATTERN.fullmatch(name):
            continue
        path = segment_path(name)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            # Of another user, or gone already.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            logger.warning(f"Removed {path}, which a killed trainer left behind.")
        except (BlockingIOError, FileNotFoundError):
            # In use by a trainer that is alive, or removed by its owner just now.
            continue
        finally:
            os.close(descriptor)
