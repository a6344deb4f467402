"""Training through `accelerate launch` with the files of `examples/accelerate_configs`, and a publish of what is sharded.

One rank on one card: what is said is that the configurations run on a GPU, with the kernels of each, and that what would be
published is the policy. Where NCCL may have several ranks on one card (from 2.30, with NCCL_MULTI_RANK_GPU_ENABLE=1) two
ranks share one, too. All launches run at the same time; `sharded_rank.py` is what they run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_atropos.cli.launch.processes import free_port

from .bench import Bench


ROOT = Path(__file__).resolve().parents[2]

SHARDED = (
    ("fsdp2", "full"),
    ("fsdp2", "lora"),
    ("fsdp2", "beta"),
    ("zero2", "full"),
    ("zero3", "full"),
    ("zero3", "lora"),
)
"""The name of a configuration, and a variant of `sharded_rank.VARIANTS`."""

LAUNCHES = (("one process", "full"), ("one process", "qlora"), *SHARDED, ("zero3", "beta"))
"""With one rank."""

LAUNCHES_OF_TWO = (("ddp", "full"), ("ddp", "lora"), *SHARDED)
"""With two."""

NEEDS = {"qlora": "bitsandbytes", "zero2": "deepspeed", "zero3": "deepspeed"}
"""Packages that a configuration or a variant needs besides."""

TIMEOUT_S = 100


def run(bench: Bench) -> None:
    run_all(bench, LAUNCHES if bench.is_cuda else LAUNCHES[:1], num_ranks=1)
    if bench.is_cuda and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        run_all(bench, LAUNCHES_OF_TWO, num_ranks=2)


def run_all(bench: Bench, launches: Sequence[tuple[str, str]], num_ranks: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        processes = {}
        for number, (config, variant) in enumerate(launches):
            missing = [
                needed
                for what, needed in NEEDS.items()
                if what in (config, variant) and importlib.util.find_spec(needed) is None
            ]
            if missing:
                bench.report(config=config, variant=variant, skipped=f"needs {missing[0]}")
                continue
            processes[config, variant] = launch(bench, config, variant, Path(directory) / str(number), num_ranks)
        for (config, variant), process in processes.items():
            bench.attempt(lambda p=process: result_of(p), config=config, variant=variant, num_ranks=num_ranks)


def launch(bench: Bench, config: str, variant: str, directory: Path, num_ranks: int) -> subprocess.Popen[str]:
    directory.mkdir()
    file = ROOT / "examples" / "accelerate_configs" / f"{config}.yaml"
    how = ["--config_file", str(file)] if file.exists() else ["--num_machines", "1", "--mixed_precision", "no"]
    if config == "ddp":
        how.append("--multi_gpu")
    if not bench.is_cuda:
        how.append("--cpu")
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", *how),
        *("--num_processes", str(num_ranks), "--main_process_port", str(free_port())),
        *("-m", "gpu_sections.sharded_rank", str(directory), variant, bench.device.type),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=ROOT
    )


def environment() -> dict[str, str]:
    """Of a process that runs a module of the sections, imports what this one does, and lets the others have the cores."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a launch printed as JSON in its last line that is some.

    Raises:
        RuntimeError: It ended with an error, of which this is the end.
    """
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise RuntimeError(f"not done after {TIMEOUT_S} s: {output[-1000:]}") from None
    results = [line for line in output.splitlines() if line.startswith('{"layout')]
    if process.returncode or not results:
        errors = [line for line in output.splitlines() if "Error" in line]
        raise RuntimeError(f"exit {process.returncode}: {errors[:2]} {output[-1500:]}")
    return json.loads(results[-1])
