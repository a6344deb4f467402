"""How long a publish takes, against what its bytes cost.

    python benchmarks/publish.py [--model DIR] [--repeats N]

Starts a real `trl vllm-serve` on the model (default: the quickstart's), publishes to it, and prints one JSON line per
case, all measured in one run, medians over the repeats:

    transport, mode   how the policy travels and what is sent
    total_s           the whole publish: stage, pause, transfer, finish, resume, verify
    paused_s          the part during which the server does not generate
    bytes             size of the policy on the wire
    floor_s           cast_s + memcpy_s + load_s: the same bytes cast from fp32 by one pass, copied by one pass, and loaded by
                      the worker (its own clock around `model.load_weights`, of the same publishes)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
# As in the quickstart: server and trainer share the cores, a waiting thread must sleep, not spin. Read by torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from servers import serve  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from trl_atropos.preflight import inspect_server  # noqa: E402
from trl_atropos.weight_sync.probe import LogprobProbe  # noqa: E402
from trl_atropos.weight_sync.publisher import PolicyPublisher  # noqa: E402
from trl_atropos.weight_sync.shm import SharedMemoryTransport  # noqa: E402
from trl_atropos.weight_sync.vllm_client import AtroposVLLMClient  # noqa: E402


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def copy_floor_s(model: nn.Module, dtype: torch.dtype) -> float:
    """Seconds to cast every parameter to `dtype` and to copy the result once more, in one pass each."""
    sources = [parameter.detach().float() for parameter in model.parameters()]
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
    return timed(cast) + timed(copy)


def measure(mode: str, model: nn.Module, client: AtroposVLLMClient, tokenizer: object, repeats: int) -> dict:
    """Publish `repeats` times after two warm-ups, and return the medians."""
    config = model.config.get_text_config()
    facts = inspect_server(client, model.config, max_length=10**9)
    transport = SharedMemoryTransport()
    publisher = PolicyPublisher(client, transport, LogprobProbe(tokenizer, config.vocab_size), facts.dtype, 4.0)
    reports, loads, floors = [], [], []
    for version in range(repeats + 2):
        report = publisher.publish(model, version)
        if version >= 2:
            reports.append(report)
            loads.append(transport.load_s)
            floors.append(copy_floor_s(model.get_base_model() if mode == "merged" else model, facts.dtype))
    publisher.close()
    median = statistics.median
    return {
        "transport": "shm",
        "mode": mode,
        "total_s": round(median(report.total_s for report in reports), 4),
        "paused_s": round(median(report.paused_s for report in reports), 4),
        "bytes": reports[0].num_bytes,
        "floor_s": round(median(load + floor for load, floor in zip(loads, floors, strict=True)), 4),
        "phases_s": {
            name: round(median(report.phase_s[name] for report in reports), 4) for name in reports[0].phase_s
        },
        "load_s": round(median(loads), 4),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"{args.model} does not exist: run `trl-atropos model fetch smollm2 --output_dir {args.model}`")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as directory:
        print(f"starting trl vllm-serve on {args.model}", file=sys.stderr)
        with serve(args.model, "--enforce_eager", "True", log_path=Path(directory) / "server.log") as url:
            client = AtroposVLLMClient(url)
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            print(json.dumps(measure("full", model, client, tokenizer, args.repeats)), flush=True)
            lora = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
            print(json.dumps(measure("merged", lora, client, tokenizer, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
