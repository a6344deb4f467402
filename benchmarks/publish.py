"""How long a publish takes, against what its bytes cost.

    python benchmarks/publish.py [--model DIR] [--repeats N] [--synthetic_gib 1 2 4] [--only PREFIX] [--weight_sync_beside false]

Starts real `trl vllm-serve` servers on the model (default: the quickstart's) and on made-up ones of 1, 2 and 4 GiB,
publishes to them, and prints one JSON line per case, all measured in one run, medians over the repeats:

    transport, mode   how the policy travels and what is sent
    total_s           the whole publish: gather, merge, stage, pause, transfer, finish, resume, verify
    probed_total_s    the same of the publishes that compare logprobs, too: the first and every `logprob_probe_interval`-th
    paused_s          the part during which the server does not generate
    bytes             what travelled
    floor_s           cast_s + memcpy_s + load_s: the same bytes cast from the trainer's dtype by one pass, copied by one pass,
                      and loaded by the worker (its own clock around `model.load_weights`, of the same publishes)
    peak_rss_bytes    largest growth of the trainer's resident memory during these publishes, over the staging memory of
                      `bytes` that is there from the first one on

A last line, `"mode": "load"`, streams from the server with 16 clients while the policy is published 20 times:

    num_requests, num_failed     of the clients
    ttft_s, ttft_publish_s       median time to the first token of requests that met no publish, and of those that did
    ttft_publish_max_s           the longest of the latter
    publish_s, paused_s          medians over the publishes

Ratios: total_vs_floor = total_s / floor_s, paused_vs_copy = paused_s / (memcpy_s + load_s), and for the adapter total_vs_full,
against the full publish over shared memory of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "e2e")]
# As in the quickstart: server and trainer share the cores, a waiting thread must sleep, not spin. Read by torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import requests  # noqa: E402
import torch  # noqa: E402
from one_server import make_link, make_publisher  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from resident_memory import watch_peak  # noqa: E402
from servers import serve  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig  # noqa: E402
from transformers.hf_argparser import string_to_bool  # noqa: E402

from trl_atropos.weight_sync.adapter_publisher import AdapterPublisher  # noqa: E402
from trl_atropos.weight_sync.probe import LogprobProbe  # noqa: E402
from trl_atropos.weight_sync.report import PublishReport  # noqa: E402
from trl_atropos.weight_sync.server_link import ServerLink  # noqa: E402
from trl_atropos.weight_sync.weights.adapter import take_adapter  # noqa: E402


WARM_UPS = 2
PROBE_INTERVAL = 4
"""Of the publishes here; a trainer's is `logprob_probe_interval`."""


@dataclass(frozen=True)
class Floor:
    """Seconds of one pass each over the bytes of a policy."""

    cast_s: float
    memcpy_s: float


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def copy_floor(tensors: Iterable[torch.Tensor], dtype: torch.dtype) -> Floor:
    """Cast every tensor to `dtype` and copy the result once more, in one pass each, into memory that is there already."""
    sources = [tensor.detach() for tensor in tensors]
    casts = [torch.empty(source.shape, dtype=dtype) for source in sources]
    copies = [torch.empty_like(cast) for cast in casts]

    def cast() -> None:
        for target, source in zip(casts, sources, strict=True):
            target.copy_(source)

    def copy() -> None:
        for target, source in zip(copies, casts, strict=True):
            target.copy_(source)

    for warm_up in (cast, copy):
        warm_up()
    return Floor(timed(cast), timed(copy))


def num_publishes(repeats: int) -> int:
    """The warm-ups, the repeats, and as many more as end with a publish that is probed: the first one is a warm-up."""
    return max(repeats + WARM_UPS, PROBE_INTERVAL) + 1


def split_reports(reports: list[PublishReport]) -> tuple[list[PublishReport], list[PublishReport]]:
    """After the warm-ups: those without and those with a logprob probe."""
    measured = reports[WARM_UPS:]
    return [r for r in measured if r.probe is None], [r for r in measured if r.probe is not None]


def measure(
    transport_name: str,
    mode: str,
    model: nn.Module,
    url: str,
    tokenizer: object,
    repeats: int,
    load_s: float | None = None,
    is_beside: bool = True,
) -> dict:
    """Publish `repeats` times after the warm-ups, and return the medians.

    `load_s` belongs to the floor. Over gloo the worker's clock also counts the arrival of the bytes, so that the loading of
    the same bytes from shared memory is taken.
    """
    link = link_server(url, model, mode, is_beside)
    publisher = make_publisher(link, model, tokenizer)
    reports: list[PublishReport] = []
    floors: list[Floor] = []
    peak = watch_peak()
    for version in range(num_publishes(repeats)):
        if version == WARM_UPS:
            peak = watch_peak()
        reports.append(publisher.publish(model, version))
    peak_rss_bytes = peak()
    reports, probed = split_reports(reports)
    published = [parameter for name, parameter in model.named_parameters() if "lora_" not in name]
    if mode == "merged":
        published = [
            parameter for name, parameter in model.named_parameters() if ".layers." in name and "lora_" not in name
        ]
    floors = [copy_floor(published, link.dtype) for _ in range(repeats)]
    publisher.close()
    median = statistics.median
    if load_s is None:
        load_s = median(report.phase_s["load"] for report in reports)
    memcpy_s = median(floor.memcpy_s for floor in floors)
    floor_s = median(floor.cast_s for floor in floors) + memcpy_s + load_s
    total_s, paused_s = (median(values) for values in zip(*((r.total_s, r.paused_s) for r in reports), strict=True))
    return {
        "transport": transport_name,
        "mode": mode,
        "total_s": round(total_s, 4),
        "probed_total_s": round(median(report.total_s for report in probed), 4),
        "paused_s": round(paused_s, 4),
        "bytes": reports[-1].num_bytes,
        "floor_s": round(floor_s, 4),
        "peak_rss_bytes": peak_rss_bytes,
        "total_vs_floor": round(total_s / floor_s, 3),
        "paused_vs_copy": round(paused_s / (memcpy_s + load_s), 3),
        "phases_s": {name: round(median(r.phase_s.get(name, 0.0) for r in reports), 4) for name in reports[0].phase_s},
        "load_s": round(load_s, 4),
        "repeats": len(reports),
    }


@dataclass
class Streamed:
    """One streamed request: when it began, when its first token came, and whether it ended well."""

    start: float
    first_token: float
    has_failed: bool


def stream_until(stop: threading.Event, url: str, model: str, seed: int) -> list[Streamed]:
    """Stream one completion after the other."""
    streamed = []
    while not stop.is_set():
        start = first_token = time.perf_counter()
        body = {"model": model, "prompt": [seed, 7, 11], "max_tokens": 16, "ignore_eos": True, "stream": True}
        with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=120) as answer:
            num_chunks = 0
            for line in answer.iter_lines():
                if line.startswith(b"data: {") and num_chunks == 0:
                    first_token = time.perf_counter()
                num_chunks += line.startswith(b"data: {")
            streamed.append(Streamed(start, first_token, answer.status_code != 200 or num_chunks == 0))
    return streamed


def link_server(url: str, model: nn.Module, mode: str = "merged", is_beside: bool = True) -> ServerLink:
    return make_link(
        url,
        model,
        torch.device("cpu"),
        timeout_s=300,
        weight_sync_mode=mode,
        weight_sync_beside=is_beside,
        logprob_probe_interval=PROBE_INTERVAL,
    )


def measure_load(
    model: nn.Module,
    url: str,
    tokenizer: object,
    num_clients: int = 16,
    num_publishes: int = 20,
    is_beside: bool = True,
) -> dict:
    """Publish while clients stream, and return what they noticed."""
    link = link_server(url, model, is_beside=is_beside)
    publisher = make_publisher(link, model, tokenizer)
    stop = threading.Event()
    windows, reports = [], []
    with ThreadPoolExecutor(max_workers=num_clients) as executor:
        futures = [executor.submit(stream_until, stop, url, link.client.model, seed) for seed in range(num_clients)]
        try:
            for version in range(num_publishes):
                start = time.perf_counter()
                reports.append(publisher.publish(model, version))
                windows.append((start, time.perf_counter()))
                # As long between publishes as in them.
                time.sleep(windows[-1][1] - start)
        finally:
            stop.set()
        streamed = [one for future in futures for one in future.result()]
    publisher.close()
    times: dict[bool, list[float]] = {False: [], True: []}
    for one in streamed:
        has_met = any(one.start < end and start < one.first_token for start, end in windows)
        times[has_met].append(one.first_token - one.start)
    return {
        "transport": "shm",
        "mode": "load",
        "clients": num_clients,
        "publishes": num_publishes,
        "num_requests": len(streamed),
        "num_failed": sum(one.has_failed for one in streamed),
        "ttft_s": round(statistics.median(times[False]), 4),
        "ttft_publish_s": round(statistics.median(times[True]), 4),
        "ttft_publish_max_s": round(max(times[True]), 4),
        "publish_s": round(statistics.median(report.total_s for report in reports), 4),
        "paused_s": round(statistics.median(report.paused_s for report in reports), 4),
    }


def measure_adapter(model_dir: Path, model: nn.Module, full_shm_s: float, directory: Path, repeats: int) -> dict:
    """Publish the adapter itself to a server with LoRA, and return the medians."""
    flags = (
        *("--enforce_eager", "True", "--enable-lora", "--max-lora-rank", "16", "--max-loras", "2"),
        *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    )
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    print(f"starting trl vllm-serve on {model_dir.name} for adapters", file=sys.stderr)
    with serve(model_dir, *flags, log_path=directory / "adapter.log", environment=environment) as url:
        link = link_server(url, model)
        publisher = AdapterPublisher([link], directory / "adapters")
        publisher.check(model)
        probe = LogprobProbe(AutoTokenizer.from_pretrained(model_dir), model.config.vocab_size)
        reports = []
        peak = watch_peak()
        for version in range(num_publishes(repeats)):
            if version == WARM_UPS:
                peak = watch_peak()
            adapter = take_adapter(model, link.dtype)
            reports.append(publisher.deliver(adapter, version, lambda: probe.reference(model, link.dtype)))
        peak_rss_bytes = peak()
    reports, probed = split_reports(reports)
    median = statistics.median
    total_s = median(report.total_s for report in reports)
    return {
        "transport": "directory",
        "mode": "adapter",
        "total_s": round(total_s, 4),
        "probed_total_s": round(median(report.total_s for report in probed), 4),
        "paused_s": 0.0,
        "bytes": reports[-1].num_bytes,
        "peak_rss_bytes": peak_rss_bytes,
        "total_vs_full": round(total_s / full_shm_s, 3),
        "phases_s": {name: round(median(r.phase_s.get(name, 0.0) for r in reports), 4) for name in reports[0].phase_s},
        "repeats": len(reports),
    }


def synthetic_llama(gib: float, tokenizer: Any, directory: Path) -> Path:
    """Save the config of an untied Llama of about this many GiB in bfloat16, with layers of about 100 MiB; no weights."""
    hidden_size, intermediate_size, vocab_size = 2048, 5632, len(tokenizer)
    layer = 4 * hidden_size**2 + 3 * hidden_size * intermediate_size
    num_layers = max(1, round((gib * 2**30 / 2 - 2 * vocab_size * hidden_size) / layer))
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def with_lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))


def show(line: dict) -> None:
    print(json.dumps(line), flush=True)


def measure_model(args: argparse.Namespace, directory: Path) -> None:
    """Full and merged publishes of the real model, over both transports, and its adapter."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    full_shm_s = float("nan")
    loads: dict[str, float] = {}
    for name in ("shm", "gloo"):
        print(f"starting trl vllm-serve on {args.model.name} for {name}", file=sys.stderr)
        log_path = directory / f"{name}.log"
        with serve(args.model, "--enforce_eager", "True", log_path=log_path, backend=f"trl_atropos_{name}") as url:
            for mode, make in (("full", load), ("merged", lambda: with_lora(load()))):
                line = measure(
                    name, mode, make(), url, tokenizer, args.repeats, loads.get(mode), args.weight_sync_beside
                )
                loads[mode] = line["load_s"]
                if (name, mode) == ("shm", "full"):
                    full_shm_s = line["total_s"]
                show(line)
            if name == "shm":
                show(measure_load(load(), url, tokenizer, is_beside=args.weight_sync_beside))
    show(measure_adapter(args.model, with_lora(load()), full_shm_s, directory, args.repeats))


def measure_synthetic(args: argparse.Namespace, directory: Path) -> None:
    """Full publishes of made-up models in bfloat16: cost against bytes, and memory against bytes."""
    for gib in args.synthetic_gib:
        model_dir = synthetic_llama(gib, AutoTokenizer.from_pretrained(args.model), directory / f"{gib}gib")
        flags = ("--load-format", "dummy", "--enforce_eager", "True")
        repeats = max(2, args.repeats // 3)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir), dtype=torch.bfloat16)
        total_s: dict[str, float] = {}
        load_s = None
        for name in ("shm", "gloo"):
            print(f"starting trl vllm-serve on a model of {gib} GiB for {name}", file=sys.stderr)
            log_path = directory / f"{gib}{name}.log"
            with serve(model_dir, *flags, log_path=log_path, backend=f"trl_atropos_{name}") as url:
                line = measure(name, "full", model, url, None, repeats, load_s, args.weight_sync_beside)
                load_s, total_s[name] = line["load_s"], line["total_s"]
                show({"synthetic_gib": gib, **line})
        # An adapter needs a server with the trainer's own base.
        model.save_pretrained(model_dir)
        line = measure_adapter(model_dir, with_lora(model), total_s["shm"], model_dir, repeats)
        show({"synthetic_gib": gib, **line})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--synthetic_gib", type=float, nargs="*", default=[1, 2, 4])
    parser.add_argument("--only", choices=("model", "synthetic"), help="Measure a part.")
    parser.add_argument(
        "--weight_sync_beside", type=string_to_bool, default=True, help="That of a trainer; false: load in the pause."
    )
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"{args.model} does not exist: run `trl-atropos model fetch smollm2 --output_dir {args.model}`")
    with tempfile.TemporaryDirectory() as name:
        if args.only != "synthetic":
            measure_model(args, Path(name))
        if args.only != "model":
            measure_synthetic(args, Path(name))


if __name__ == "__main__":
    main()
