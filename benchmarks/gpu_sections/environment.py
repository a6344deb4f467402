"""The machine: versions, the card, and the two ceilings that everything else is held against."""

from __future__ import annotations

import platform
import shutil
import subprocess

import accelerate
import peft
import torch
import transformers
import trl

from .bench import Bench


def run(bench: Bench) -> None:
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate, peft, trl)}
    bench.report(python=platform.python_version(), **versions, compiler=shutil.which("gcc") or shutil.which("cc"))
    if bench.is_cuda:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        bench.report(card=card, cuda=torch.version.cuda, nccl=".".join(map(str, torch.cuda.nccl.version())))
    size = 2**20 if bench.is_tiny else 2**31
    source = torch.randint(255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.time(lambda: target.copy_(source))["s"]
    bench.report(measure="copy on the device, read + written", gb_s=2 * size / seconds / 1e9)
    side = 256 if bench.is_tiny else 8192
    left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = bench.time(lambda: left @ right, repeats=10)["s"]
    bench.report(measure="bfloat16 product", tflop_s=2 * side**3 / seconds / 1e12)
