"""What the trainer and the workers of our own backends tell each other about one transfer."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ...errors import WeightSyncError
from ..base import TensorSpec, TransferReport


logger = logging.getLogger(__name__)

CHECKSUM_MODULUS = 2**64
WORD_BYTES = 8

POLL_INTERVAL_S = 0.001

CHECK_INTERVAL_S = 1.0

MAX_ERROR_CHARS = 500
"""Of which each may be six bytes of the slot of a report."""


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Sum the bytes of tensors as little words of 8 bytes, each tensor padded with zeros, modulo 2**64.

    It runs at the speed of memory. It finds bytes that are missing, stale or torn, not two words that changed places.
    The tensors are contiguous, in host memory, and start at multiples of 8 bytes.
    """
    total = 0
    for tensor in tensors:
        data = tensor.detach().flatten().view(torch.uint8)
        num_whole = data.numel() // WORD_BYTES * WORD_BYTES
        total += int(data[:num_whole].view(torch.int64).sum())
        total += int.from_bytes(bytes(data[num_whole:].tolist()), "little")
    return total % CHECKSUM_MODULUS


def describe_tensors(specs: Sequence[TensorSpec]) -> dict[str, list[Any]]:
    """The fields of every `update_info` that say what is sent, one entry per tensor and in loading order."""
    return {
        "names": [spec.name for spec in specs],
        "dtype_names": [spec.dtype_name for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }


def view_tensor(memory: torch.Tensor, offset: int, dtype_name: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor inside a buffer of uint8 with one dimension.

    `offset` counts bytes and is a multiple of the size of one element; `dtype_name` is spelt like `"bfloat16"`.

    Raises:
        `ValueError`: if there is no such dtype, or the tensor does not lie inside the buffer.
    """
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype_name!r} is not a dtype.")
    end = offset + math.prod(shape) * dtype.itemsize
    if not 0 <= offset <= end <= memory.numel():
        raise ValueError(f"A tensor at bytes {offset} to {end} does not lie in a buffer of {memory.numel()} bytes.")
    return memory[offset:end].view(dtype).view(tuple(shape))


@dataclass(frozen=True)
class WorkerReport:
    """What one worker says of one transfer.

    `sequence` is the number of the transfer. The worker loaded `num_tensors` tensors of together `num_bytes` bytes
    without padding; `checksum` is that of their bytes as they arrived. Loading took `load_s` seconds, over gloo with
    the receiving. `error` says why it loaded nothing, and `why_not_beside`, in the report of a connection, why it cannot
    load a policy beside the served one; both are empty otherwise.
    """

    sequence: int
    num_tensors: int
    num_bytes: int
    checksum: int
    load_s: float = 0.0
    error: str = ""
    why_not_beside: str = ""

    def to_json(self) -> bytes:
        """The report as JSON in ASCII, for the way back to the trainer; it has room for the beginning of an error."""
        return json.dumps(asdict(replace(self, error=self.error[:MAX_ERROR_CHARS]))).encode()

    @staticmethod
    def from_json(payload: bytes) -> WorkerReport | None:
        """Read a report; None if there is none, or if it was cut off by the end of the worker."""
        try:
            values = json.loads(payload)
        except ValueError:
            return None
        if not isinstance(values, dict) or values.keys() != {field.name for field in fields(WorkerReport)}:
            return None
        return WorkerReport(**values)


def expected_report(sequence: int, specs: Sequence[TensorSpec], checksum: int) -> WorkerReport:
    """What every worker has to report."""
    return WorkerReport(sequence, len(specs), sum(spec.num_bytes for spec in specs), checksum)


def check_reports(
    read: Callable[[int], WorkerReport | None],
    num_workers: int,
    expected: WorkerReport,
    timeout_s: float,
    check_server: Callable[[], object] | None = None,
) -> TransferReport:
    """Collect the reports of all workers and compare them with what was sent.

    The server's answer does not prove that the reports are there: after a request that failed on several workers,
    vLLM's executor takes a worker's answer to the last request for its answer to this one.

    `read` returns the report of a worker, None if there is none yet. `timeout_s` is how long to wait for all of them,
    in seconds. `check_server`, if given, raises an error if the server has ended; it is called about once a second.

    Raises:
        [`WeightSyncError`]: naming the first worker that reports anything else.
    """
    deadline = time.monotonic() + timeout_s
    next_check = time.monotonic() + CHECK_INTERVAL_S
    sent = _identity(expected)
    load_s = 0.0
    for worker in range(num_workers):
        report = read(worker)
        while (report is None or report.sequence != expected.sequence) and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)
            report = read(worker)
            if check_server is not None and time.monotonic() > next_check:
                check_server()
                next_check = time.monotonic() + CHECK_INTERVAL_S
        _raise_if_failed(worker, report, expected.sequence)
        loaded = _identity(report) if report is not None else "nothing"
        if report is None or loaded != sent:
            raise WeightSyncError(
                f"Worker {worker} reports (transfer, tensors, bytes, checksum) {loaded}, the trainer sent {sent}.",
                "A worker that did not load this transfer would answer with another policy than its neighbours.",
                "Restart the vLLM server, then restart training with --resume_from_checkpoint.",
            )
        load_s = max(load_s, report.load_s)
    return TransferReport(expected.num_bytes, load_s, has_checksums=True)


def _identity(report: WorkerReport) -> tuple[int, int, int, int]:
    return report.sequence, report.num_tensors, report.num_bytes, report.checksum


def raise_what_failed(
    read: Callable[[int], WorkerReport | None], num_workers: int, sequence: int, timeout_s: float
) -> None:
    """Raise what a worker reports of the transfer `sequence`, which has failed; nothing if none does within `timeout_s`.

    `read` is that of `check_reports`.

    Raises:
        [`WeightSyncError`]: naming the worker.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for worker in range(num_workers):
            _raise_if_failed(worker, read(worker), sequence)
        time.sleep(POLL_INTERVAL_S)


def _raise_if_failed(worker: int, report: WorkerReport | None, sequence: int) -> None:
    if report is not None and report.sequence == sequence and report.error:
        raise WeightSyncError(
            f"Worker {worker} could not load the policy: {report.error}",
            "What it says of it in full is in the server's log.",
            "Restart the vLLM server if it does not take the next publish.",
        )


def say_why_not_beside(url: str, why: str) -> None:
    """Log why the server at `url` cannot load a policy beside the one that it serves; nothing if `why` is empty."""
    if why:
        logger.info(
            f"The server at {url} is paused for as long as a policy is loaded, because it cannot be loaded beside the served "
            f"one: {why}."
        )
