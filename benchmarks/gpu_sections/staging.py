"""A policy on its way from the GPU into host memory, in the server's dtype: how fast, into which memory."""

from __future__ import annotations

import mmap
import os
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from trl_atropos.weight_sync.base import PolicyLayout
from trl_atropos.weight_sync.page_locks import PageLocks
from trl_atropos.weight_sync.transports.reports import checksum
from trl_atropos.weight_sync.weights.source import PolicyWeights
from trl_atropos.weight_sync.weights.staging import StagedPolicy

from .bench import Bench, qwen3


def run(bench: Bench) -> None:
    sizes = {} if bench.is_tiny else {"hidden_size": 2048, "intermediate_size": 6144}
    model = qwen3(bench, **sizes)
    source = PolicyWeights(model, torch.bfloat16)
    specs = source.manifest()
    layout = PolicyLayout(specs)
    bench.report(gb=layout.num_bytes / 1e9)
    for name in ("allocated", "shared"):
        memory = make_memory(name, layout.num_bytes)
        for is_locked in (False, True) if bench.is_cuda else (False,):
            staged = StagedPolicy(layout)
            if not is_locked:
                staged._lock_pages = lambda memories: None
            bench.attempt(
                lambda m=memory, s=staged: timed(bench, layout, lambda: s.stage(source, specs, [m])),
                memory=name,
                pages="locked, as it is" if is_locked else "not locked",
                is_pinned=memory.is_pinned(),
            )
            bench.report(memory=name, is_pinned_afterwards=memory.is_pinned())
            # Its locks end with it.
            del staged
    bench.report(memory="shared", is_pinned_without_locks=memory.is_pinned())
    views = [layout.view(memory, spec) for spec in specs]
    bench.attempt(lambda: timed(bench, layout, lambda: checksum(views)), way="checksum in host memory")
    on_device = memory.to(bench.device)
    words = on_device[: on_device.numel() // 8 * 8].view(torch.int64)
    bench.attempt(lambda: timed(bench, layout, lambda: int(words.sum())), way="checksum on the device")
    back = torch.empty_like(on_device)
    bench.attempt(lambda: timed(bench, layout, lambda: back.copy_(memory)), way="to the device, pages not locked")
    if bench.is_cuda:
        locks = PageLocks()
        locks.hold([memory])
        bench.attempt(lambda: timed(bench, layout, lambda: back.copy_(memory)), way="to the device, pages locked")
        bench.attempt(lambda: refused_lock(bench, memory), way="a lock that is refused")
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    merged = PolicyWeights(adapted, torch.bfloat16)

    def merge() -> None:
        for _ in merged.tensors(merged.manifest()):
            pass

    bench.attempt(lambda: bench.time(merge, repeats=3), way="LoRA merged, not copied")


def make_memory(name: str, num_bytes: int) -> torch.Tensor:
    if name == "allocated":
        return torch.zeros(num_bytes, dtype=torch.uint8)
    return shared_memory(num_bytes)


def refused_lock(bench: Bench, memory: torch.Tensor) -> dict[str, Any]:
    """A second lock on the same pages is an error, which has to be no error of what comes after it."""
    others = PageLocks()
    others.hold([memory[4096:]])
    bench.synchronize()
    return {"refused": len(others._refused), "sum": torch.ones(8, device=bench.device).sum().item()}


def shared_memory(num_bytes: int) -> torch.Tensor:
    descriptor = os.memfd_create("trl_atropos-bench")
    os.posix_fallocate(descriptor, 0, num_bytes)
    mapping = mmap.mmap(descriptor, num_bytes)
    os.close(descriptor)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def timed(bench: Bench, layout: PolicyLayout, function: Any) -> dict[str, Any]:
    result = bench.time(function, repeats=2, warmup=1)
    return {**result, "gb_s": layout.num_bytes / result["s"] / 1e9}
