"""Trainer side of `trl_atropos_shm`: a policy travels through shared memory to a server on the same host.

The segment is private to the user, named unpredictably, and unlinked as soon as every worker has mapped it. From then
on it has no name: the kernel frees it with the last process that maps it, also after SIGKILL of either side.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import WeightSyncError
from .base import TensorSpec, WeightSource, check_same_tensor
from .shm_segment import REPORT_BYTES, align, segment_path


if TYPE_CHECKING:
    from .vllm_client import AtroposVLLMClient


class SharedMemoryTransport:
    """`WeightTransport` for a server with `--weight-transfer-config '{"backend": "trl_atropos_shm"}'` on this host.

    `stage` casts and copies into the segment in one pass while the server goes on serving; `send` only tells the
    workers to load from it.

    Attributes:
        load_s (`float`):
            Seconds that the slowest worker took to load the last policy.
    """

    def __init__(self) -> None:
        self.load_s = 0.0
        self._client: AtroposVLLMClient | None = None
        self._specs: Sequence[TensorSpec] = ()
        self._offsets: list[int] = []
        self._data_bytes = 0
        self._num_workers = 0
        self._mapping: mmap.mmap | None = None
        self._sequence = 0

    def open(self, client: AtroposVLLMClient, manifest: Sequence[TensorSpec]) -> None:
        """Create the segment, let every worker map it, then remove its name. See `WeightTransport.open`."""
        self.close()
        self._client = client
        self._specs = manifest
        self._offsets, self._data_bytes = _layout(manifest)
        self._num_workers = client.get_world_size()
        name = f"trl_atropos-{secrets.token_hex(16)}"
        path = segment_path(name)
        self._mapping = _create_segment(path, self._data_bytes + REPORT_BYTES * self._num_workers)
        try:
            client.init_weight_transfer_engine(
                {"segment": name, "data_bytes": self._data_bytes, "num_workers": self._num_workers}
            )
        finally:
            os.unlink(path)

    def stage(self, source: WeightSource) -> None:
        """Cast and copy the policy into the segment. See `WeightTransport.stage`."""
        mapping = self._require_open()
        data = memoryview(mapping)[: self._data_bytes]
        for spec, offset, (name, tensor) in zip(self._specs, self._offsets, source, strict=True):
            check_same_tensor(spec, name, tensor)
            view = torch.frombuffer(data, dtype=spec.dtype, count=tensor.numel(), offset=offset).view(spec.shape)
            view.copy_(tensor)
        self._sequence += 1

    def send(self) -> None:
        """Have every worker load the segment and check the workers' reports. See `WeightTransport.send`."""
        self._require_open()
        assert self._client is not None
        self._client.update_weights(
            {
                "sequence": self._sequence,
                "names": [spec.name for spec in self._specs],
                "dtype_names": [spec.dtype_name for spec in self._specs],
                "shapes": [list(spec.shape) for spec in self._specs],
                "offsets": self._offsets,
            }
        )
        reports = [self._report(worker) for worker in range(self._num_workers)]
        expected = (self._sequence, len(self._specs), sum(spec.num_bytes for spec in self._specs))
        for worker, report in enumerate(reports):
            loaded = (report.get("sequence"), report.get("num_tensors"), report.get("num_bytes"))
            if loaded != expected:
                raise WeightSyncError(
                    f"Worker {worker} reports (transfer, tensors, bytes) {loaded}, the trainer staged {expected}.",
                    "A worker that did not load this transfer would answer with another policy than its neighbours.",
                    "Restart the vLLM server, then restart training with --resume_from_checkpoint.",
                )
        self.load_s = max(report["load_s"] for report in reports)

    def close(self) -> None:
        """Unmap the segment. See `WeightTransport.close`."""
        if self._mapping is not None:
            mapping, self._mapping = self._mapping, None
            # After an interrupted `stage` a traceback still views the segment; the mapping goes with the last view.
            with contextlib.suppress(BufferError):
                mapping.close()

    def _require_open(self) -> mmap.mmap:
        if self._mapping is None:
            raise RuntimeError("The transport is not open: call open() first.")
        return self._mapping

    def _report(self, worker: int) -> dict:
        offset = self._data_bytes + worker * REPORT_BYTES
        payload = self._require_open()[offset : offset + REPORT_BYTES].rstrip(b"\0")
        try:
            return json.loads(payload)
        except ValueError:
            # Empty, or cut off by a worker that died: `send` compares it with what was staged and refuses it.
            return {}


def _layout(manifest: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Return the byte offset of every tensor and the size of the tensor area."""
    offsets = []
    end = 0
    for spec in manifest:
        start = align(end)
        offsets.append(start)
        end = start + spec.num_bytes
    return offsets, align(end)


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
            "Enlarge it (mount -o remount,size=..., or --shm-size / --ipc=host for a container).",
        ) from exc
    finally:
        os.close(descriptor)
