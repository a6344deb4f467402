"""The first day on a GPU: is it exact, does it run, how fast, how much memory; in ten minutes on one card.

    python benchmarks/gpu.py [--device cuda] [--tiny] [--sections NAME ...] [--out FILE]

Each section is a process with a time limit; one that fails does not end the others. Every result is one JSON object on a
line of its own, printed as it comes and appended to `--out`; a section ends with `{"section": ..., "exit": 0, "s": ...}`.
`--device cpu --tiny` runs the same code on a small model, to see that it runs: its numbers say nothing.

Needs torch, transformers, accelerate and peft, and trl and datasets, which `packaging/gpu_bundle.sh` brings to a machine
without a network.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent

SECTIONS = {
    "environment": 60,
    "nccl": 240,
    "graphs": 300,
    "served": 200,
    "server": 300,
    "exactness": 200,
    "training": 120,
    "sharded": 120,
    "architectures": 120,
    "train_step": 180,
    "train_step_trl": 90,
    "profile": 60,
    "head": 60,
    "staging": 60,
    "streams": 60,
}
"""Name and time limit in seconds, in the order of their value."""

MARGIN_S = 5
"""How long before its limit a section that goes on says what it waits for."""

NUM_LAST_LINES = 40
"""How much a section that failed says."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small models and few repeats: does it run?")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--section", choices=list(SECTIONS), help="internal: run one here")
    args = parser.parse_args()
    if args.section is not None:
        run_here(args.section, args.device, args.tiny)
        return
    failed = [name for name in args.sections if not run_section(name, args)]
    if failed:
        sys.exit(f"These sections failed: {', '.join(failed)}. Their last lines are in {args.out}.")


def run_section(name: str, args: argparse.Namespace) -> bool:
    """Runs a section in a process of its own, and says whether it came to its end."""
    command = [sys.executable, __file__, "--section", name, "--device", args.device, *["--tiny"] * args.tiny]
    start = time.perf_counter()
    with args.out.open("a") as out:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        watchdog = threading.Timer(SECTIONS[name], process.kill)
        watchdog.start()
        other: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                other.append(line.rstrip())
                continue
            print(line, end="", flush=True)
            out.write(line)
        exit_code = process.wait()
        watchdog.cancel()
        end = {"section": name, "exit": exit_code, "s": round(time.perf_counter() - start, 1)}
        if exit_code:
            end["last_lines"] = other[-NUM_LAST_LINES:]
        print(json.dumps(end), flush=True)
        out.write(json.dumps(end) + "\n")
    return exit_code == 0


def run_here(name: str, device: str, is_tiny: bool) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if device == "cpu":
        # No DeepSpeed looking for an accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.path[:0] = [str(ROOT)]
    # Where it hangs is among its last lines.
    faulthandler.dump_traceback_later(SECTIONS[name] - MARGIN_S, exit=True)
    import torch
    from gpu_sections.bench import Bench

    importlib.import_module(f"gpu_sections.{name}").run(Bench(name, torch.device(device), is_tiny))


if __name__ == "__main__":
    main()
