"""Each a `trl vllm-serve` of a policy with random weights, beside this process on the same device, and publishes to it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import requests
import torch
from one_server import make_link, make_publisher
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from trl_atropos.cli.launch.processes import free_port
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.report import PublishReport
from trl_atropos.weight_sync.server_link import ServerLink

from .bench import Bench, qwen3


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from tiny_models import byte_tokenizer  # noqa: E402


START_S = 240.0
"""How long a server may take to start, in seconds: it may compile, beside others."""

EAGER = ("--enforce_eager", "True")

Servers = Mapping[str, tuple[str, tuple[str, ...]]]
"""Their names, and each one's backend and flags."""


class Server:
    """The process of a server, which may start beside others, and ends with this one.

    Its output is in `log_path`; `start_s` is how long it took to be healthy, in seconds.
    """

    def __init__(self, bench: Bench, model_dir: Path, log_path: Path, backend: str, *flags: str):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        self.start_s: float | None = None
        self._start = time.perf_counter()
        command = [
            *(sys.executable, "-m", "trl_atropos.cli.launch.guard"),
            *(sys.executable, "-c", "from trl.cli import main; main()", "vllm-serve", "--model", str(model_dir)),
            *("--host", "127.0.0.1", "--port", str(port), "--max_model_len", "2048" if bench.is_cuda else "256"),
            *("--weight-transfer-config", f'{{"backend": "{backend}"}}'),
            *("--middleware", "trl_atropos.serving.generate_endpoint.GenerateEndpoint"),
            # Told, because what is free changes while others start beside it.
            *(("--gpu_memory_utilization", "0.1", "--kv-cache-memory-bytes", "8G") if bench.is_cuda else ()),
            *flags,
        ]
        environment = {
            # It finds this package, where that is not installed.
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                # The guard ends the server when this end of it is closed.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self._waiting.start()

    def _wait(self) -> None:
        while time.perf_counter() - self._start < START_S and self.process.poll() is None:
            try:
                if requests.get(f"{self.url}/health", timeout=2).status_code == 200:
                    self.start_s = time.perf_counter() - self._start
                    return
            except requests.exceptions.RequestException:
                pass
            time.sleep(0.2)

    def wait(self) -> dict[str, Any]:
        """Wait until it is healthy, and return how long that took, or raise an error that says why it is not."""
        self._waiting.join()
        if self.start_s is None:
            lines = self.log_path.read_text(errors="replace").splitlines()
            errors = [line[-300:] for line in lines if "Error" in line]
            raise RuntimeError(f"the server did not start: {errors[:2]} ... {lines[-2:]}")
        return {"start_s": self.start_s}

    def engine_processes(self) -> list[psutil.Process]:
        """Those of the engine; guard and API are not among them."""
        guard = psutil.Process(self.process.pid)
        return [process for process in guard.children(recursive=True) if process.ppid() != guard.pid]

    def kill(self) -> None:
        """End every process of it at once."""
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


@contextmanager
def serve(bench: Bench, model_dir: Path, servers: Servers) -> Iterator[dict[str, Server]]:
    """Servers by their names, which start at the same time. Their output goes to the folder that `GPU_BENCH_LOGS` names, if
    that is set.
    """
    logs = Path(os.environ.get("GPU_BENCH_LOGS", model_dir.parent))
    started = {}
    try:
        for name, (backend, flags) in servers.items():
            log_path = logs / f"{bench.section}-{name}.log"
            started[name] = Server(bench, model_dir, log_path, backend, *flags)
        yield started
    finally:
        for server in started.values():
            server.kill()


def save_policy(bench: Bench, directory: Path) -> PreTrainedTokenizerBase:
    """Save a policy with random weights in bfloat16, and return its tokenizer."""
    # The least that the server attends to on a CPU.
    sizes = {"head_dim": 32} if bench.is_tiny else {}
    # Weights are large, so that wrong ones show in the logprobs.
    model = qwen3(bench, **sizes, initializer_range=0.05, eos_token_id=256, pad_token_id=256, bos_token_id=None)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    return tokenizer


def load_policy(bench: Bench, directory: Path) -> nn.Module:
    """As a trainer has it: in float32, on the device."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(bench.device)


def with_lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))


def measure(
    bench: Bench, name: str, server: Server, model_dir: Path, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> None:
    """Report how fast it generates, and publishes of the whole policy and then of an adapter that is merged, with these options
    of publishing.
    """
    bench.attempt(lambda: {**server.wait(), **generate(server)}, server=name)
    model = load_policy(bench, model_dir)
    for what, make in (("full", lambda: model), ("lora", lambda: with_lora(model))):
        bench.attempt(lambda m=make: publish(bench, server, m(), tokenizer, **options), server=name, publishes=what)


def generate(server: Server, number: int = 128) -> dict[str, Any]:
    """Tokens a second of requests that are sent at once, after a few that compile what is compiled."""
    body = {"model": AtroposVLLMClient(server.url).model, "max_tokens": 128, "ignore_eos": True}
    for count in (2, number):
        start = time.perf_counter()
        prompts = [[seed, 7, 11] for seed in range(count)]
        answer = requests.post(f"{server.url}/v1/completions", json={**body, "prompt": prompts}, timeout=120)
        answer.raise_for_status()
        num_tokens = answer.json()["usage"]["completion_tokens"]
        assert num_tokens == count * 128
    return {"tokens_s": num_tokens / (time.perf_counter() - start)}


def link_server(bench: Bench, url: str, model: nn.Module, **options: Any) -> ServerLink:
    """Every publish compares logprobs."""
    return make_link(url, model, bench.device, timeout_s=60, logprob_probe_interval=1, **options)


def publish(
    bench: Bench,
    server: Server,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    number: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Publish changed weights a few times, and return the medians over all but the first."""
    server.wait()
    publisher = make_publisher(link_server(bench, server.url, model, **options), model, tokenizer)
    reports: list[PublishReport] = []
    try:
        for version in range(1, number + 1):
            change(model, version)
            reports.append(publisher.publish(model, version))
    finally:
        publisher.close()
    later = reports[1:]
    median = statistics.median
    return {
        "num_bytes": later[-1].num_bytes,
        "first_s": reports[0].total_s,
        "total_s": median(report.total_s for report in later),
        "paused_s": median(report.paused_s for report in later),
        "phase_s": {name: median(report.phase_s.get(name, 0.0) for report in later) for name in later[-1].phase_s},
        "mean_abs_logprob_diff": max(report.probe.mean_abs_diff for report in reports if report.probe is not None),
    }


@torch.no_grad()
def change(model: nn.Module, seed: int) -> None:
    """Move every trained weight, far enough that the policy before would not pass for this one."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            parameter.add_(noise, alpha=0.01)
