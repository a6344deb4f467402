"""Where the time of one training step goes: kernels, launches, and calls that wait for the GPU."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from trl_atropos import AtroposTrainer
from trl_atropos.types import Rollout

from .attention import ALL_VARIANTS, Variant, using
from .bench import Bench, case_lengths, make_rollouts
from .train_step import make_trainer, one_step


def run(bench: Bench) -> None:
    trainer, wrapped = make_trainer(bench)
    for case in ("16/8/4",) if bench.is_tiny else ("128/32/8", "512/512/8"):
        rollouts = make_rollouts(*case_lengths(case), trainer.model.config.vocab_size)
        bench.report(case=case, **profiled(bench, trainer, wrapped, ALL_VARIANTS[0], rollouts))
        if bench.is_cuda:
            bench.report(
                case=case, synchronising_calls=synchronising_calls(trainer, wrapped, ALL_VARIANTS[0], rollouts)
            )


def profiled(
    bench: Bench, trainer: AtroposTrainer, wrapped: Any, variant: Variant, rollouts: list[Rollout]
) -> dict[str, Any]:
    """Seconds of a step without the profiler, and what the profiler saw in another one."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * bench.is_cuda]
    with using(variant, trainer.model):
        for _ in range(2):
            one_step(trainer, wrapped, rollouts)
        bench.synchronize()
        start = time.perf_counter()
        one_step(trainer, wrapped, rollouts)
        bench.synchronize()
        seconds = time.perf_counter() - start
        with profile(activities=activities) as seen:
            one_step(trainer, wrapped, rollouts)
            bench.synchronize()
    events = seen.key_averages()
    kernels = sorted(events, key=lambda event: -event.self_device_time_total)[:10]
    operations = sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]
    return {
        "s": seconds,
        "kernels_s": sum(event.self_device_time_total for event in events) / 1e6,
        "launches": sum(event.count for event in events if "LaunchKernel" in event.key),
        "kernels": {event.key[:60]: [event.count, round(event.self_device_time_total / 1e3, 2)] for event in kernels},
        "operations": {
            event.key[:60]: [event.count, round(event.self_cpu_time_total / 1e3, 2)] for event in operations
        },
    }


def synchronising_calls(
    trainer: AtroposTrainer, wrapped: Any, variant: Variant, rollouts: list[Rollout]
) -> dict[str, int]:
    """Where one step waits for the GPU, and how often."""
    with using(variant, trainer.model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        one_step(trainer, wrapped, rollouts)
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}" for warning in caught)
