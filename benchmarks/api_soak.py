"""Many groups through one `trl-atropos api`: memory and latency must not grow with what has passed.

    python benchmarks/api_soak.py [--num_groups 200000] [--interval_groups 20000] [--num_posters 2] [--directory DIR]

Small groups of two rollouts of 32 tokens are posted in lists of `--groups_per_post`, as environments do that send several at once;
one trainer that names itself fetches batches of 256 rollouts and acknowledges each. Prints one JSON line an interval, the percentiles
being those of the interval, and a last one that compares the first interval with the last. Every group must arrive once and in
order of its poster; the exit code is 1 if one does not.

Posters wait while more than `MAX_QUEUED_GROUPS` groups are queued, as BaseEnv does, so that the queue stays short: what a long one
costs is in benchmarks/api.py. `/status` is asked twenty times a second meanwhile, by the process that reads the batches: its times
have waits of that process in them.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from api import STATUS_INTERVAL_S, exchange, percentile, running_api


BATCH_SIZE = 256
GROUP_SIZE = 2
NUM_TOKENS = 32
MAX_QUEUED_GROUPS = 2000
PAUSE_S = 0.005
GZIP = {"Accept-Encoding": "gzip"}
GZIP_MAGIC = b"\x1f\x8b"
MAX_GROUPS_OF_A_POSTER = 10_000_000


def make_group(serial: int, rng: random.Random) -> dict[str, Any]:
    """A group that is known by its first token."""
    rows = [[serial, *(rng.randrange(1000) for _ in range(NUM_TOKENS - 1))] for _ in range(GROUP_SIZE)]
    return {
        "tokens": rows,
        "masks": [[-100] * 8 + row[8:] for row in rows],
        "scores": [rng.random() for _ in rows],
        "inference_logprobs": [[1.0] * 8 + [-rng.expovariate(1.0) for _ in row[8:]] for row in rows],
        "env_id": None,
    }


def post_all(port: int, number: int, num_groups: int, groups_per_post: int, is_full: Event, times: Any) -> None:
    """Post groups with serials of this poster, and put the seconds of each post into `times`."""
    rng = random.Random(number)
    first = number * MAX_GROUPS_OF_A_POSTER
    for begin in range(0, num_groups, groups_per_post):
        while is_full.is_set():
            time.sleep(PAUSE_S)
        serials = range(first + begin, first + min(begin + groups_per_post, num_groups))
        body = gzip.compress(json.dumps([make_group(serial, rng) for serial in serials]).encode(), 1)
        start = time.perf_counter()
        exchange(port, "POST", "/scored_data_list", body, {"Content-Encoding": "gzip"})
        times.put(time.perf_counter() - start)


class Trainer(threading.Thread):
    """Fetches and acknowledges until it has all groups; `latencies` are of `/batch`, and `error` says what was wrong."""

    def __init__(self, port: int, num_groups: int):
        super().__init__(daemon=True)
        self.port = port
        self.num_left = num_groups
        self.num_trained = 0
        self.latencies: list[float] = []
        self.error: str | None = None
        self._next: dict[int, int] = {}

    def run(self) -> None:
        for number in itertools.count():
            if self.num_left < BATCH_SIZE // GROUP_SIZE or self.error is not None:
                return
            groups = None
            while groups is None:
                start = time.perf_counter()
                answer = exchange(self.port, "GET", f"/batch?trainer=soak&number={number}", headers=GZIP)
                latency = time.perf_counter() - start
                # A short answer comes as it is.
                text = gzip.decompress(answer) if answer.startswith(GZIP_MAGIC) else answer
                groups = json.loads(text)["batch"]
                if groups is None:
                    time.sleep(PAUSE_S)
            self.latencies.append(latency)
            receipt = {"trainer": "soak", "number": number, "num_groups": len(groups)}
            exchange(self.port, "POST", "/acknowledge", json.dumps(receipt).encode())
            for group in groups:
                poster, serial = divmod(group["tokens"][0][0], MAX_GROUPS_OF_A_POSTER)
                if serial != self._next.get(poster, 0):
                    self.error = f"group {serial} of poster {poster} came instead of {self._next.get(poster, 0)}"
                self._next[poster] = serial + 1
            self.num_trained += len(groups)
            self.num_left -= len(groups)


def soak(args: argparse.Namespace) -> bool:
    context = multiprocessing.get_context("fork")
    is_full, times = context.Event(), context.Queue()
    lines: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as name,
        running_api("trl-atropos", Path(name)) as (port, process),
    ):
        registration = {
            **{"wandb_group": "", "wandb_project": "", "batch_size": BATCH_SIZE, "max_token_len": NUM_TOKENS + 1},
            **{"checkpoint_dir": "", "save_checkpoint_interval": 1, "starting_step": 0, "num_steps": 1},
        }
        exchange(port, "POST", "/register", json.dumps(registration).encode())
        share = args.num_groups // args.num_posters
        posters = [
            context.Process(
                target=post_all, args=(port, number, share, args.groups_per_post, is_full, times), daemon=True
            )
            for number in range(args.num_posters)
        ]
        trainer = Trainer(port, share * args.num_posters)
        (server,) = process.children()
        for worker in (*posters, trainer):
            worker.start()
        statuses: list[float] = []
        start = interval = time.perf_counter()
        num_before = 0
        while True:
            before = time.perf_counter()
            status = json.loads(exchange(port, "GET", "/status"))
            statuses.append(time.perf_counter() - before)
            if status["queue_size"] > MAX_QUEUED_GROUPS:
                is_full.set()
            else:
                is_full.clear()
            if any(poster.exitcode for poster in posters):
                raise RuntimeError("A poster failed; what it raised is above.")
            is_over = not trainer.is_alive()
            if trainer.num_trained - num_before >= args.interval_groups or (
                is_over and trainer.num_trained > num_before
            ):
                now, num_trained = time.perf_counter(), trainer.num_trained
                posts = [times.get() for _ in range(times.qsize())]
                batches, trainer.latencies = trainer.latencies, []
                lines.append(
                    {
                        "num_groups": num_trained,
                        "elapsed_s": round(now - start, 1),
                        "groups_per_s": round((num_trained - num_before) / (now - interval), 1),
                        "rss_mb": round(server.memory_info().rss / 1e6, 1),
                        "num_threads": server.num_threads(),
                        "num_open_files": server.num_fds(),
                        "database_mb": round(sum(path.stat().st_size for path in Path(name).glob("api.db*")) / 1e6, 1),
                        "queue_groups": status["queue_size"],
                        "post_p50_ms": percentile(posts, 0.5),
                        "post_p99_ms": percentile(posts, 0.99),
                        "batch_p50_ms": percentile(batches, 0.5),
                        "batch_p99_ms": percentile(batches, 0.99),
                        "status_p50_ms": percentile(statuses, 0.5),
                        "status_p99_ms": percentile(statuses, 0.99),
                    }
                )
                print(json.dumps(lines[-1]), flush=True)
                interval, num_before, statuses = now, num_trained, []
            if is_over:
                break
            time.sleep(STATUS_INTERVAL_S)
        for poster in posters:
            poster.join()
    growth = {
        f"{name}_growth": round(lines[-1][name] / lines[0][name], 2)
        for name in ("rss_mb", "database_mb", "post_p50_ms", "batch_p50_ms", "status_p50_ms", "groups_per_s")
        if lines[0][name] and lines[-1][name]
    }
    print(json.dumps({"num_groups": trainer.num_trained, "error": trainer.error, **growth}))
    return trainer.error is None and trainer.num_left < BATCH_SIZE // GROUP_SIZE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_groups", type=int, default=200_000)
    parser.add_argument("--interval_groups", type=int, default=20_000)
    parser.add_argument("--groups_per_post", type=int, default=8)
    parser.add_argument("--num_posters", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    return 0 if soak(parser.parse_args()) else 1


if __name__ == "__main__":
    sys.exit(main())
