"""A policy on its way from the GPU into host memory, in the server's dtype: how fast, into which memory."""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from trl_atropos.weight_sync.base import PolicyLayout
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
    memories = {"pageable": torch.zeros(layout.num_bytes, dtype=torch.uint8)}
    if bench.is_cuda:
        start = time.perf_counter()
        memories["pinned"] = torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=True)
        bench.report(measure="pinning", s=time.perf_counter() - start)
    memories["shared"] = shared_memory(layout.num_bytes)
    for name in ("pageable", "pinned", "shared", "shared, registered"):
        if name == "shared, registered":
            if not bench.is_cuda:
                continue
            start = time.perf_counter()
            memory = memories["shared"]
            code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            bench.report(measure="registering", s=time.perf_counter() - start, code=int(code))
            memories[name] = memory
        if name not in memories:
            continue
        memory = memories[name]
        staged = StagedPolicy(layout)
        bench.attempt(
            lambda m=memory, s=staged: timed(bench, layout, lambda: s.stage(source, specs, [m])),
            way="as it is",
            memory=name,
        )
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    merged = PolicyWeights(adapted, torch.bfloat16)

    def merge() -> None:
        for _ in merged.tensors(merged.manifest()):
            pass

    bench.attempt(lambda: bench.time(merge, repeats=3), way="LoRA merged, not copied")


def shared_memory(num_bytes: int) -> torch.Tensor:
    descriptor = os.memfd_create("trl_atropos-bench")
    os.posix_fallocate(descriptor, 0, num_bytes)
    mapping = mmap.mmap(descriptor, num_bytes)
    os.close(descriptor)
    return torch.frombuffer(mapping, dtype=torch.uint8)


def timed(bench: Bench, layout: PolicyLayout, function: Any) -> dict[str, Any]:
    result = bench.time(function, repeats=2, warmup=1)
    return {**result, "gb_s": layout.num_bytes / result["s"] / 1e9}
