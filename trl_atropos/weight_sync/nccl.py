"""A policy travels over NCCL to a stock `trl vllm-serve`, through TRL's communicator and vLLM's packed broadcast.

Needs CUDA on both sides.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import WeightSyncError, WeightSyncTimeout
from .base import TensorSpec, WeightSource, check_same_tensor


if TYPE_CHECKING:
    from .vllm_client import AtroposVLLMClient


class NcclTransport:
    """`WeightTransport` for a server with `--weight-transfer-config '{"backend": "nccl"}'`, TRL's default.

    The HTTP request runs on the calling thread, under its deadline; the broadcast, which nothing can interrupt, runs on
    a daemon thread whose error is read.

    Args:
        device (`torch.device`):
            The CUDA device of the trainer's main process.
        timeout_s (`float`):
            How long the broadcast may go on after the workers have answered.
    """

    def __init__(self, device: torch.device, timeout_s: float = 300.0):
        self.device = device
        self.timeout_s = timeout_s
        self._client: AtroposVLLMClient | None = None
        self._specs: Sequence[TensorSpec] = ()
        self._source: WeightSource | None = None

    def open(self, client: AtroposVLLMClient, manifest: Sequence[TensorSpec]) -> None:
        """Join the workers in an NCCL group. See `WeightTransport.open`."""
        if self.device.type != "cuda":
            raise WeightSyncError(
                f"The vLLM server at {client.base_url} receives weights over NCCL, the trainer runs on {self.device}.",
                "NCCL moves data between CUDA devices only.",
                """Start the server with --weight-transfer-config '{"backend": "trl_atropos_shm"}' (same host).""",
            )
        self._client = client
        self._specs = manifest
        client.init_communicator(self.device)

    def stage(self, source: WeightSource) -> None:
        """Wait for the optimizer step. See `WeightTransport.stage`.

        The tensors are cast one by one while they are sent: a second copy of the policy may not fit on the device.
        """
        # The packing runs on streams of its own, which do not wait for the one that the optimizer used.
        torch.cuda.synchronize(self.device)
        self._source = source

    def send(self) -> None:
        """Broadcast the policy to every worker. See `WeightTransport.send`."""
        if self._client is None or self._source is None:
            raise RuntimeError("The transport is not open or nothing is staged.")
        errors: list[BaseException] = []
        thread = threading.Thread(target=self._broadcast, args=(errors,), name="nccl-broadcast", daemon=True)
        thread.start()
        self._client.update_weights(
            {
                "names": [spec.name for spec in self._specs],
                "dtype_names": [spec.dtype_name for spec in self._specs],
                "shapes": [list(spec.shape) for spec in self._specs],
            }
        )
        thread.join(self.timeout_s)
        if thread.is_alive():
            raise WeightSyncTimeout(
                f"The NCCL broadcast still runs {self.timeout_s:.0f} s after every worker has answered.",
                "The two sides disagree about what was sent.",
                "Restart the vLLM server, then train with --resume_from_checkpoint.",
            )
        if errors:
            raise WeightSyncError(
                f"The NCCL broadcast failed: {type(errors[0]).__name__}: {errors[0]}.",
                "The workers hold a part of the policy.",
                "Restart the vLLM server, then train with --resume_from_checkpoint.",
            ) from errors[0]

    def close(self) -> None:
        """Leave the group. See `WeightTransport.close`."""
        if self._client is not None:
            self._client.close_communicator()
        self._source = None

    def _broadcast(self, errors: list[BaseException]) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        assert self._client is not None
        try:
            torch.cuda.set_device(self.device)
            packed_nccl_broadcast_producer(
                iterator=self._cast(), group=self._client.communicator, src=0, post_iter_func=lambda item: item[1]
            )
        except BaseException as exc:
            # Read by `send` on the main thread.
            errors.append(exc)

    def _cast(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._source is not None
        for spec, (name, tensor) in zip(self._specs, self._source, strict=True):
            check_same_tensor(spec, name, tensor)
            yield name, tensor.to(spec.dtype).contiguous()
