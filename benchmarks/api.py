"""`trl-atropos api` against atroposlib's `run-api`, in one run: groups posted by 8 processes, with and without a trainer.

Prints one JSON line a case and one with the ratios. Rollouts have 2048 tokens with logprobs, as BaseEnv sends them: gzip, a
fresh connection each. The trainer reads the bytes of batches of 64 rollouts as fast as they come, and parses nothing; in the
case `receipts` it names itself and acknowledges. `/status` is asked twenty times a second meanwhile.

    python benchmarks/api.py [--duration_s 10] [--group_sizes 8 64] [--trainers none plain receipts] [--directory DIR]
    python benchmarks/api.py --restart_bytes 5000000000 --directory DIR

With `--restart_bytes` nothing of that is done: a queue of so many bytes is written, and the line says how long the command takes
from its start to its first answer, with the file in the page cache.

Everything shares the cores of the machine: clients slow the server down, and the same for both. `syncs_per_s` is how often the
disk of `--directory` syncs a page, the rate at which posts can be durable one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil


HOST = "127.0.0.1"
NUM_POSTERS = 8
NUM_TOKENS = 2048
NUM_PROMPT_TOKENS = 512
VOCAB_SIZE = 151_936
BATCH_SIZE = 64
NUM_BODIES = 2
STATUS_INTERVAL_S = 0.05
DEADLINE_S = 60.0


def make_body(rng: random.Random, group_size: int) -> bytes:
    """One group as BaseEnv posts it."""
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)]
    completions = [[rng.randrange(VOCAB_SIZE) for _ in range(NUM_TOKENS - len(prompt))] for _ in range(group_size)]
    group = {
        "tokens": [prompt + completion for completion in completions],
        "masks": [[-100] * len(prompt) + completion for completion in completions],
        "scores": [rng.random() for _ in completions],
        "inference_logprobs": [
            [1.0] * len(prompt) + [-rng.expovariate(1.0) for _ in completion] for completion in completions
        ],
        **dict.fromkeys(("ref_logprobs", "overrides", "group_overrides", "distill_token_ids", "distill_logprobs")),
        "env_id": None,
    }
    return gzip.compress(json.dumps(group).encode())


def exchange(port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """One request on a connection of its own; the body of the answer as it came."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=DEADLINE_S)) as connection:
        connection.request(method, path, body or None, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{method} {path} answered {response.status}: {content[:300]!r}")
        return content


def post_until(port: int, bodies: list[bytes], is_over: Event, counts: Any, number: int) -> None:
    while not is_over.is_set():
        exchange(port, "POST", "/scored_data", bodies[counts[number] % len(bodies)], {"Content-Encoding": "gzip"})
        counts[number] += 1


@contextlib.contextmanager
def running_api(kind: str, directory: Path) -> Iterator[tuple[int, psutil.Process]]:
    """The API on a free port, and its process."""
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    module = "atroposlib.cli.run_api" if kind == "run-api" else "trl_atropos.cli.main"
    arguments = [] if kind == "run-api" else ["api", "--db", str(directory / "api.db"), "--max_queue_bytes", "100G"]
    with (directory / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--host", HOST, "--port", str(port)], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                exchange(port, "GET", "/info")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield port, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=DEADLINE_S)


def train_until(port: int, is_over: Event, gives_receipts: bool, latencies: list[float]) -> None:
    number = 0
    while not is_over.is_set():
        start = time.perf_counter()
        query = f"?trainer=benchmark&number={number}" if gives_receipts else ""
        answer = exchange(port, "GET", f"/batch{query}", headers={"Accept-Encoding": "gzip"})
        if len(answer) < 100:
            time.sleep(0.01)
            continue
        latencies.append(time.perf_counter() - start)
        if gives_receipts:
            receipt = {"trainer": "benchmark", "number": number}
            exchange(port, "POST", "/acknowledge", json.dumps(receipt).encode())
        number += 1


def percentile(values: list[float], share: float) -> float | None:
    """In milliseconds; None without a value."""
    if not values:
        return None
    return round(1000 * sorted(values)[min(int(share * len(values)), len(values) - 1)], 1)


def measure(kind: str, group_size: int, trainer: str, bodies: list[bytes], duration_s: float, root: Path) -> dict:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(dir=root) as name, running_api(kind, Path(name)) as (port, process):
        registration = {
            **{"wandb_group": "", "wandb_project": "", "batch_size": BATCH_SIZE, "max_token_len": NUM_TOKENS + 1},
            **{"checkpoint_dir": "", "save_checkpoint_interval": 1, "starting_step": 0, "num_steps": 1},
        }
        exchange(port, "POST", "/register", json.dumps(registration).encode())
        is_over = context.Event()
        counts = context.Array("q", NUM_POSTERS, lock=False)
        posters = [
            context.Process(target=post_until, args=(port, bodies, is_over, counts, number), daemon=True)
            for number in range(NUM_POSTERS)
        ]
        batch_latencies: list[float] = []
        threads = []
        if trainer != "none":
            threads.append(
                threading.Thread(target=train_until, args=(port, is_over, trainer == "receipts", batch_latencies))
            )
        start = time.perf_counter()
        for worker in (*posters, *threads):
            worker.start()
        status_latencies = []
        while time.perf_counter() - start < duration_s:
            before = time.perf_counter()
            exchange(port, "GET", "/status")
            status_latencies.append(time.perf_counter() - before)
            time.sleep(STATUS_INTERVAL_S)
        num_groups = sum(counts)
        elapsed_s = time.perf_counter() - start
        tree = [process, *process.children(recursive=True)]
        rss = max(one.memory_info().rss for one in tree)
        is_over.set()
        for worker in (*posters, *threads):
            worker.join(timeout=DEADLINE_S)
    return {
        "api": kind,
        "group_size": group_size,
        "trainer": trainer,
        "rollouts_per_s": round(num_groups * group_size / elapsed_s, 1),
        "status_p50_ms": percentile(status_latencies, 0.5),
        "status_p99_ms": percentile(status_latencies, 0.99),
        "batch_p50_ms": percentile(batch_latencies, 0.5),
        "num_batches": len(batch_latencies),
        "rss_mb": round(rss / 1e6),
    }


def measure_restart(num_bytes: int, rng: random.Random, root: Path) -> dict[str, Any]:
    """Write a queue through the API's own store, and start the API on it."""
    from trl_atropos.api import store as jobs
    from trl_atropos.api.scored_data import read_group

    with tempfile.TemporaryDirectory(dir=root) as name:
        body = make_body(rng, 8)
        group = read_group(gzip.decompress(body), body)
        num_groups = -(-num_bytes // len(group.body))
        start = time.perf_counter()
        store = jobs.Store(Path(name) / "api.db")
        for first in range(1, num_groups + 1, 64):
            groups = [group] * min(64, num_groups + 1 - first)
            store.submit(jobs.insert_groups(first, groups, [False] * len(groups), first.to_bytes(8, "big"))).result()
        store.close()
        filled_s = time.perf_counter() - start
        start = time.perf_counter()
        with running_api("trl-atropos", Path(name)) as (port, process):
            restart_s = time.perf_counter() - start
            queued = json.loads(exchange(port, "GET", "/status"))["queue_size"]
            (server,) = process.children()
            rss = server.memory_info().rss
        if queued != num_groups:
            raise RuntimeError(f"{num_groups} groups were written, the API shows {queued}.")
        return {
            "case": "restart",
            "queue_bytes": num_groups * len(group.body),
            "queue_groups": num_groups,
            "filled_s": round(filled_s, 1),
            "restart_s": round(restart_s, 2),
            "rss_mb": round(rss / 1e6),
        }


def measure_syncs(directory: Path) -> float:
    """How often a page is written and synced in a second."""
    with tempfile.TemporaryFile(dir=directory) as file:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            os.pwrite(file.fileno(), b"x" * 4096, 0)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - start)
    return round(1 / statistics.median(times), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration_s", type=float, default=10.0)
    parser.add_argument("--group_sizes", type=int, nargs="+", default=[8, 64])
    parser.add_argument(
        "--trainers", nargs="+", choices=["none", "plain", "receipts"], default=["none", "plain", "receipts"]
    )
    parser.add_argument("--restart_bytes", type=int, help="measure the restart with a queue of so many bytes instead")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    rng = random.Random(0)
    if args.restart_bytes is not None:
        print(json.dumps(measure_restart(args.restart_bytes, rng, args.directory)))
        return
    results: dict[tuple[str, int, str], dict[str, Any]] = {}
    for group_size in args.group_sizes:
        bodies = [make_body(rng, group_size) for _ in range(NUM_BODIES)]
        for trainer in args.trainers:
            for kind in ("run-api", "trl-atropos"):
                if trainer == "receipts" and kind == "run-api":
                    continue
                result = measure(kind, group_size, trainer, bodies, args.duration_s, args.directory)
                results[kind, group_size, trainer] = result
                print(json.dumps(result), flush=True)
    ratios: dict[str, float] = {}
    for (kind, group_size, trainer), ours in results.items():
        if kind == "run-api":
            continue
        theirs = results.get(("run-api", group_size, "none" if trainer == "none" else "plain"))
        if theirs is None:
            continue
        for name in ("rollouts_per_s", "batch_p50_ms"):
            if ours[name] and theirs[name]:
                ratios[f"{name}_{group_size}_{trainer}"] = round(ours[name] / theirs[name], 2)
    print(json.dumps({"syncs_per_s": measure_syncs(args.directory), "num_cpus": os.cpu_count(), **ratios}))


if __name__ == "__main__":
    main()
