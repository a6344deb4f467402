"""Publishes over NCCL to a stock `trl vllm-serve`: on one card, trainer and worker are two ranks of it.

NCCL from 2.30 allows that, with NCCL_MULTI_RANK_GPU_ENABLE=1: bytes go through the card's memory, where two cards would use
NVLink or PCIe, so that seconds say nothing about those. With an older NCCL the error and its time are what is measured.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from one_server import make_publisher
from transformers import PreTrainedTokenizerBase

from trl_atropos.errors import WeightSyncError

from .bench import Bench
from .serving import EAGER, Server, link_server, load_policy, measure, save_policy, serve


FIRST_WITH_SEVERAL_RANKS = 23_000
"""NCCL 2.30."""

KILLED_AFTER_S = 3.0


def run(bench: Bench) -> None:
    if importlib.util.find_spec("vllm") is None or not bench.is_cuda:
        bench.report(skipped="needs vLLM and a GPU")
        return
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    version = NCCLLibrary().ncclGetRawVersion()
    bench.report(nccl=version)
    # Read by NCCL in both processes.
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        model_dir = Path(name) / "model"
        tokenizer = save_policy(bench, model_dir)
        with serve(bench, model_dir, {"nccl": ("nccl", EAGER), "killed": ("nccl", EAGER)}) as servers:
            lives, dies = servers.values()
            measure(bench, "two ranks on one card", lives, model_dir, tokenizer)
            if version >= FIRST_WITH_SEVERAL_RANKS:
                bench.attempt(lambda: kill(bench, dies, model_dir, tokenizer), server="killed in the broadcast")
                measure(bench, "the other one, afterwards", lives, model_dir, tokenizer)


def kill(bench: Bench, server: Server, model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The engine stops before a broadcast and is killed in it: when does the trainer know, and does its GPU still work?"""
    server.wait()
    model = load_policy(bench, model_dir)
    link = link_server(bench, server.url, model, on_publish_failure="abort")
    publisher = make_publisher(link, model, tokenizer)
    publisher.publish(model, 1)
    layout = link.transport._layout
    link.pause()
    link.client.begin_weight_update()
    for process in server.engine_processes():
        process.suspend()
    killer = threading.Timer(KILLED_AFTER_S, server.kill)
    killer.start()
    start = time.perf_counter()
    try:
        link.transport.send(layout.specs)
    except WeightSyncError as exc:
        raised, error_s = f"{type(exc).__name__}: {exc}", time.perf_counter() - start
    else:
        raise RuntimeError("a broadcast to a server that was killed has succeeded")
    killer.join()
    link.close()
    start = time.perf_counter()
    ones = torch.ones(1000, device=bench.device).sum().item()
    return {"raised": raised, "error_s": error_s, "sum": ones, "sum_s": time.perf_counter() - start}
