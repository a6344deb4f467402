"""Publishes to tiny models of many families in vLLM on this device: does what is published arrive, in every layer?

Runs `tests/process/served_architectures.py`, which holds what it answers against the trainer's own logprobs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from .bench import Bench
from .serving import ROOT


FAMILIES = (
    "Gemma3", "Mistral", "Phi3", "Qwen3Moe", "Mixtral", "Olmoe", "GptOss", "DeepseekV2", "Qwen3Next", "Lfm2", "FalconH1",
    "GraniteMoeHybrid",
)  # fmt: skip

TINY_FAMILIES = ("Gemma3",)


def run(bench: Bench) -> None:
    if importlib.util.find_spec("vllm") is None:
        bench.report(skipped="needs vLLM")
        return
    tests = ROOT / "tests"
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tests), *filter(None, sys.path)]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with tempfile.TemporaryDirectory() as directory:
        script = str(tests / "process" / "served_architectures.py")
        families = TINY_FAMILIES if bench.is_tiny else FAMILIES
        commands = {
            family: ([script, f"{directory}/first", family], [script, "--swapped", f"{directory}/other", family])
            for family in families
        }
        processes = {
            family: [
                subprocess.Popen(
                    [sys.executable, *command],
                    stdout=subprocess.PIPE,
                    stderr=log_of(bench, f"{family}{number}"),
                    text=True,
                    env={**os.environ, **environment},
                )
                for number, command in enumerate(both)
            ]
            for family, both in commands.items()
        }
        for family, both in processes.items():
            bench.attempt(lambda b=both: differences(*(json.loads(one.communicate()[0]) for one in b)), family=family)


def log_of(bench: Bench, name: str) -> Any:
    """Where a process writes what is no result: to a file of the folder of logs, if there is one."""
    if "GPU_BENCH_LOGS" not in os.environ:
        return subprocess.DEVNULL
    return open(Path(os.environ["GPU_BENCH_LOGS"]) / f"{bench.section}-{name}.log", "wb")


def differences(answers: dict[str, Any], swapped: dict[str, Any]) -> dict[str, Any]:
    """Mean absolute differences of logprobs in nats: the same weights published, others against the trainer's, the first, and
    a server that was started with the others, whose answers are in `swapped`; a part of them, beside the served policy and in
    its place; others over the half of a policy.
    """
    for each in (answers, swapped):
        if "error" in each:
            raise RuntimeError(each["error"])
    answers["fresh"] = swapped["start"]
    return {
        "why_not_beside": answers["why_not_beside"],
        **{
            name: mean_difference(answers[left], answers[right])
            for name, left, right in (
                ("same_weights", "again", "start"),
                ("back", "back", "start"),
                ("meanwhile", "meanwhile", "start"),
                ("other_to_fresh", "other", "fresh"),
                ("part_again", "part_again", "part"),
                ("healed", "healed", "other"),
                ("start_to_trainer", "start", "start_trainer"),
                ("other_to_trainer", "other", "other_trainer"),
                ("other_to_start", "other", "start"),
            )
            if answers[left]
        },
    }


def mean_difference(left: list[list[float]], right: list[list[float]]) -> float:
    pairs = list(zip(chain(*left), chain(*right), strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
