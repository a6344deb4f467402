"""The packed broadcast of vLLM on real streams, with our transport in front and a group that copies in NCCL's place."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from trl_atropos.weight_sync.base import PolicyLayout, TensorSpec
from trl_atropos.weight_sync.transports.nccl import NcclTransport

from .bench import Bench


class CopyingGroup:
    """Takes what is broadcast, on the stream on which NCCL would."""

    def __init__(self) -> None:
        self.received: list[torch.Tensor] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.received.append(tensor.clone())


def run(bench: Bench) -> None:
    path = os.environ.get("VLLM_PACKED_TENSOR")
    if not bench.is_cuda or path is None:
        bench.report(skipped="needs a GPU, and VLLM_PACKED_TENSOR, the path of vLLM's packed_tensor.py")
        return
    spec = importlib.util.spec_from_file_location("packed_tensor", path)
    assert spec is not None and spec.loader is not None
    packed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packed)
    sizes = [3, 70_000_000, 1, 5_000_001, 40_000_000, 9, 100_000_000]
    layout = PolicyLayout([TensorSpec(f"t{i}", torch.bfloat16, (size,)) for i, size in enumerate(sizes)])
    transport = NcclTransport(bench.device)
    transport._layout = layout
    transport._memory = torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=True)

    def once(number: int) -> dict[str, Any]:
        fresh = torch.randint(255, (layout.num_bytes,), dtype=torch.uint8, device=bench.device)
        transport._memory.copy_(fresh, non_blocking=True)
        group = CopyingGroup()
        torch.cuda.synchronize()
        packed.packed_nccl_broadcast_producer(
            iterator=transport.tensors_on_device(layout.specs),
            group=group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=64 * 2**20,
            num_buffers=2,
        )
        arrived = torch.cat(group.received)
        sent = torch.cat([layout.view(fresh, spec).view(torch.uint8) for spec in layout.specs])
        return {"wrong_bytes": int((arrived != sent).sum()), "broadcasts": len(group.received)}

    rounds = [once(number) for number in range(30)]
    bench.report(
        rounds=len(rounds), wrong_bytes=sum(r["wrong_bytes"] for r in rounds), broadcasts=rounds[0]["broadcasts"]
    )
    bench.report(measure="packed broadcast", gb=layout.num_bytes / 1e9, **bench.time(lambda: once(0)))
