"""What a batch costs between the socket and the model, against plain `json.loads` of the same bytes.

    python benchmarks/ingest.py [--repeats 15] [--layout tree] [--fetches 8]

Two cases in one JSON line; times are medians over the repeats, all measured in one run, in turns.

A batch of 64 rollouts x 2048 tokens in groups of 8, as `/batch` answers it (`tokens`, `masks`, `scores`, `inference_logprobs`):

    num_bytes        of the answer
    json_s           plain `json.loads`
    parse_s          what the client does with the answer
    validate_s       `parse_batch`
    collate_s        advantages, and the tensors of 8 micro-batches
    ratio_vs_json    (parse_s + validate_s + collate_s) / json_s
    journal_s        appending the batch to the journal, until it is on the disk
    write_s          writing and syncing the same bytes to the same disk, nothing else
    teacher_ratio_vs_json   `parse_batch` of 16 rollouts x 512 tokens with a teacher's 20 likeliest tokens each, over
                            plain `json.loads` of the same groups

Batches of about 4 MB from a real API (another process), fetched, journalled and validated on a thread as the trainer does
it, while the main thread multiplies matrices on one core:

    fetched_bytes        of one answer
    fetch_s              for a batch, beside the multiplications
    main_thread_speed    multiplications per second while a batch comes / just before; 1: not slowed down
    longest_stall_s      longest multiplication while a batch comes, less a usual one
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "e2e")]

import requests  # noqa: E402
import torch  # noqa: E402
from live_api import ApiProcess  # noqa: E402

from trl_atropos.data.micro_batches import RolloutCollator, deal_by_count  # noqa: E402
from trl_atropos.data.steps import with_advantages  # noqa: E402
from trl_atropos.policy.layouts import LAYOUTS  # noqa: E402
from trl_atropos.types import RolloutBatch  # noqa: E402
from trl_atropos.wire.client import AtroposClient, Registration  # noqa: E402
from trl_atropos.wire.journal import Journal  # noqa: E402
from trl_atropos.wire.parse import WireLimits, parse_batch  # noqa: E402


GROUP_SIZE = 8
NUM_TOKENS = 2048
NUM_PROMPT_TOKENS = 512
VOCAB_SIZE = 151_936
LIMITS = WireLimits(vocab_size=VOCAB_SIZE, max_length=NUM_TOKENS)
ABSENT = dict.fromkeys(
    ("advantages", "ref_logprobs", "messages", "generation_params", "overrides", "group_overrides", "images")
)
NUM_TAUGHT_TOKENS = 512
TEACHER_WIDTH = 20
TAUGHT_LIMITS = WireLimits(vocab_size=VOCAB_SIZE, max_length=NUM_TAUGHT_TOKENS, reads_teacher=True)
MATRIX_SIZE = 512


def make_group(rng: random.Random) -> dict[str, Any]:
    """Rollouts that share a prompt, with logprobs as a server writes them: float32 values in full."""
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)]
    completions = [[rng.randrange(VOCAB_SIZE) for _ in range(NUM_TOKENS - len(prompt))] for _ in range(GROUP_SIZE)]
    logprobs = torch.tensor([[-rng.expovariate(1.0) for _ in completion] for completion in completions]).tolist()
    return {
        "tokens": [prompt + completion for completion in completions],
        "masks": [[-100] * len(prompt) + completion for completion in completions],
        "scores": [rng.random() for _ in completions],
        "inference_logprobs": [[1.0] * len(prompt) + values for values in logprobs],
        "env_id": 0,
        **ABSENT,
    }


def make_taught_group(rng: random.Random) -> dict[str, Any]:
    """Rollouts with a teacher's 20 likeliest tokens at every position but the first, each of probability 1/20."""
    tokens = [rng.randrange(VOCAB_SIZE) for _ in range(NUM_TAUGHT_TOKENS)]
    likeliest = [[], *(rng.sample(range(VOCAB_SIZE), TEACHER_WIDTH) for _ in tokens[1:])]
    logprobs = [[], *([-math.log(TEACHER_WIDTH)] * TEACHER_WIDTH for _ in tokens[1:])]
    return {
        "tokens": [tokens] * GROUP_SIZE,
        "masks": [tokens] * GROUP_SIZE,
        "scores": [rng.random() for _ in range(GROUP_SIZE)],
        "distill_token_ids": [likeliest] * GROUP_SIZE,
        "distill_logprobs": [logprobs] * GROUP_SIZE,
    }


def parse(payload: bytes) -> list[dict[str, Any]]:
    """What `AtroposClient.fetch_batch` does with the bytes of an answer."""
    response = requests.Response()
    response.raw = BytesIO(payload)
    response.encoding = "utf-8"
    return response.json()["batch"]


def collate(batch: RolloutBatch, layout: str) -> list[dict[str, Any]]:
    rollouts = with_advantages(batch.groups, "group")
    (micro_batches,) = deal_by_count(
        rollouts,
        micro_batch_size=GROUP_SIZE,
        num_micro_batches=-(-len(rollouts) // GROUP_SIZE),
        world_size=1,
    )
    collator = RolloutCollator(layout=layout, temperature=1.0)
    return [collator(micro_batch) for micro_batch in micro_batches]


def write_synced(path: Path, payload: bytes) -> None:
    with open(path, "ab") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def measure_stages(repeats: int, layout: str, directory: Path) -> dict[str, Any]:
    rng = random.Random(0)
    payload = json.dumps({"batch": [make_group(rng) for _ in range(8)]}, separators=(",", ":")).encode()
    taught_payload = json.dumps([make_taught_group(rng) for _ in range(2)])
    journal = Journal(directory / "journal")
    seconds: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in range(1 + repeats):
        timed("json_s", lambda: json.loads(payload))
        raw_groups = timed("parse_s", lambda: parse(payload))
        batch = timed("validate_s", lambda raw_groups=raw_groups: parse_batch(raw_groups, LIMITS))
        timed("collate_s", lambda batch=batch: collate(batch, layout))
        timed("journal_s", lambda raw_groups=raw_groups: journal.append(raw_groups))
        timed("write_s", lambda: write_synced(directory / "plain", payload))
        assert len(batch.rollouts) == 64 and not batch.rejected
        taught = timed("teacher_json_s", lambda: json.loads(taught_payload))
        batch = timed("teacher_validate_s", lambda taught=taught: parse_batch(taught, TAUGHT_LIMITS))
        assert len(batch.rollouts) == 16 and not batch.rejected
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first is a warm-up
    ours = medians["parse_s"] + medians["validate_s"] + medians["collate_s"]
    return {
        "num_bytes": len(payload),
        **{name: round(value, 4) for name, value in medians.items()},
        "ratio_vs_json": round(ours / medians["json_s"], 2),
        "teacher_ratio_vs_json": round(medians["teacher_validate_s"] / medians["teacher_json_s"], 2),
    }


def take_batch(client: AtroposClient, journal: Journal) -> RolloutBatch:
    raw_groups = client.fetch_batch()
    assert raw_groups is not None
    journal.append(raw_groups)
    return parse_batch(raw_groups, LIMITS)


def multiply_until(is_over: Callable[[], bool]) -> list[float]:
    """Seconds of each multiplication of matrices until then."""
    matrix = torch.randn(MATRIX_SIZE, MATRIX_SIZE)
    seconds = []
    while not is_over():
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return seconds


def for_seconds(duration_s: float) -> Callable[[], bool]:
    end = time.perf_counter() + duration_s
    return lambda: time.perf_counter() >= end


def measure_fetching(fetches: int, directory: Path) -> dict[str, Any]:
    rng = random.Random(1)
    # A rollout takes 58 kB of JSON.
    groups = [make_group(rng) for _ in range(9)]
    num_rollouts = sum(len(group["tokens"]) for group in groups)
    journal = Journal(directory / "fetched")
    registration = Registration("", "", num_rollouts, NUM_TOKENS + 1, "", 1, 0, 1)
    with (
        ApiProcess(directory / "run-api.log") as api,
        AtroposClient(api.url) as client,
        ThreadPoolExecutor(max_workers=1) as thread,
    ):
        client.register(registration)
        for _ in range(fetches + 1):
            for group in groups:
                api.post(group)
        take_batch(client, journal)  # the API forms all batches now
        speeds, stalls_s, fetch_s = [], [], []
        for _ in range(fetches):
            # Just before each fetch, because other processes of the machine come and go.
            usual_s = statistics.mean(multiply_until(for_seconds(0.5)))
            start = time.perf_counter()
            pending = thread.submit(take_batch, client, journal)
            beside = multiply_until(pending.done)
            fetch_s.append(time.perf_counter() - start)
            assert len(pending.result().rollouts) == num_rollouts
            speeds.append(usual_s / statistics.mean(beside))
            stalls_s.append(max(beside) - usual_s)
    fetched_bytes = len(json.dumps({"batch": groups}, separators=(",", ":")))
    return {
        "fetched_bytes": fetched_bytes,
        "fetch_s": round(statistics.median(fetch_s), 3),
        "main_thread_speed": round(statistics.median(speeds), 3),
        "longest_stall_s": round(statistics.median(stalls_s), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--layout", choices=LAYOUTS, default="tree")
    parser.add_argument("--fetches", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        result = measure_stages(args.repeats, args.layout, Path(directory))
        print(json.dumps({**result, **measure_fetching(args.fetches, Path(directory))}), flush=True)


if __name__ == "__main__":
    main()
