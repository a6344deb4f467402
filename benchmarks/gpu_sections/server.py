"""Servers on this device, beside the trainer: publishes over shared memory and gloo, and sleep mode, which lends memory."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from one_server import make_publisher
from transformers import PreTrainedTokenizerBase

from .bench import Bench
from .serving import EAGER, Server, Servers, change, generate, link_server, load_policy, measure, save_policy, serve


SERVERS: Servers = {"shm": ("trl_atropos_shm", EAGER), "gloo": ("trl_atropos_gloo", EAGER)}

IN_THE_PAUSE = "shm, in the pause"
"""One whose workers load in the pause, which the others over shared memory do beside the served policy."""

GPU_SERVERS: Servers = {
    IN_THE_PAUSE: ("trl_atropos_shm", EAGER),
    "sleep": ("trl_atropos_shm", (*EAGER, "--enable-sleep-mode")),
}


def run(bench: Bench) -> None:
    run_each(bench, SERVERS | (GPU_SERVERS if bench.is_cuda else {}))


def run_each(bench: Bench, specs: Servers) -> None:
    """Start servers at the same time, and measure one after the other."""
    if importlib.util.find_spec("vllm") is None:
        bench.report(skipped="needs vLLM")
        return
    with tempfile.TemporaryDirectory() as name:
        model_dir = Path(name) / "model"
        tokenizer = save_policy(bench, model_dir)
        with serve(bench, model_dir, specs) as servers:
            for name, server in servers.items():
                if name == "sleep":
                    bench.attempt(lambda s=server: sleeping(bench, s, model_dir, tokenizer), server=name)
                else:
                    measure(bench, name, server, model_dir, tokenizer, weight_sync_beside=name != IN_THE_PAUSE)
                    bench.attempt(
                        lambda s=server: in_background(bench, s, model_dir, tokenizer),
                        server=name,
                        publishes="in background",
                    )
                server.kill()


def in_background(bench: Bench, server: Server, model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Steps of training while what the step before has made is on its way; every publish is proven."""
    server.wait()
    model = load_policy(bench, model_dir)
    link = link_server(bench, server.url, model, weight_sync_background=True, weight_sync_mode="full")
    publisher = make_publisher(link, model, tokenizer)
    input_ids = torch.arange(1024, device=bench.device).reshape(4, 256) % 256
    blocked_s, step_s, diffs = [], [], []
    for step in range(1, 7):
        start = time.perf_counter()
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        model.zero_grad()
        change(model, step)
        metrics = publisher.publish_step(model, step)
        step_s.append(time.perf_counter() - start)
        # Of the first publish, which is waited for, there are none.
        blocked_s += [value for name, value in metrics.items() if name == "perf/weight_sync_blocked_s"]
        diffs += [value for name, value in metrics.items() if name == "logprob_probe/mean_abs_diff"]
    diffs.append(publisher.finish()["logprob_probe/mean_abs_diff"])
    publisher.close()
    return {
        "blocked_s": statistics.median(blocked_s),
        "step_s": statistics.median(step_s[2:]),
        "num_proven": len(diffs),
        "mean_abs_logprob_diff": max(diffs),
    }


def sleeping(bench: Bench, server: Server, model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Three turns: the server sleeps, is woken by a publish, and generates."""
    start = server.wait()
    model = load_policy(bench, model_dir)
    free: dict[str, list[float]] = {"asleep": [], "awake": []}
    seconds: dict[str, list[float]] = {"sleep": [], "publish": []}
    diffs = []
    publisher = make_publisher(link_server(bench, server.url, model, vllm_enable_sleep_mode=True), model, tokenizer)
    publisher.publish(model, 1)
    for version in range(2, 5):
        before = time.perf_counter()
        publisher.sleep()
        seconds["sleep"].append(time.perf_counter() - before)
        free["asleep"].append(torch.cuda.mem_get_info()[0] / 1e9)
        change(model, version)
        report = publisher.publish(model, version)
        assert report.probe is not None
        seconds["publish"].append(report.total_s)
        diffs.append(report.probe.mean_abs_diff)
        free["awake"].append(torch.cuda.mem_get_info()[0] / 1e9)
        generate(server, number=8)
    publisher.close()
    return {**start, "free_gb": free, "s": seconds, "mean_abs_logprob_diff": max(diffs)}
