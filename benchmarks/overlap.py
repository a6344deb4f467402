"""How much of the time trainer and server stand idle on the quickstart, with and without a batch fetched ahead.

    python benchmarks/overlap.py [--max_steps N] [--repeats N]

Runs `trl-atropos launch` on the quickstart's files, alternating between `--num_prefetched_batches` 0 and 1, and prints one
JSON line per setting, all of one run of this script, means over the repeats:

    num_prefetched_batches
    trainer_idle      share of the steps' time that the trainer waited for a batch
    server_idle       share of the steps' time at which the server had no request (sampled from /metrics every 50 ms)
    step_s            mean time of a step
    rollouts_per_s    rollouts trained per second of the steps' time
    staleness         mean, in publishes

and a last line with `step_s_ratio`: the step with a batch ahead over the one without.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import requests


ROOT = Path(__file__).resolve().parent.parent
LAUNCH_FILE = ROOT / "examples" / "configs" / "quickstart_launch.yaml"
SAMPLE_S = 0.05
RUNNING = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", re.MULTILINE)


def measure(model: Path, num_prefetched: int, max_steps: int, run_dir: Path) -> dict[str, float]:
    """One run of the quickstart."""
    command = [
        *(str(Path(sys.executable).parent / "trl-atropos"), "launch", "-c", str(LAUNCH_FILE)),
        *("--model_name_or_path", str(model), "--run_dir", str(run_dir)),
        f"--trainer_args=--num_prefetched_batches {num_prefetched} --max_steps {max_steps}",
    ]
    sampler: Sampler | None = None
    num_lines = 0
    url = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"vllm\s+ready at (\S+)", line)
            url = found[1] if found else url
            if re.match(rf"\s*\d+/{max_steps} ", line):
                print(line.rstrip(), file=sys.stderr)
                num_lines += 1
                sampler = sampler or Sampler(url)
                if num_lines == max_steps:
                    sampler.stop()
    if process.returncode != 0 or sampler is None:
        raise SystemExit(f"the launch ended with exit code {process.returncode}; its logs are in {run_dir / 'logs'}")
    history = json.loads((run_dir / "model" / "trainer_state.json").read_text())["log_history"]
    # The first step has no start of its own: environments begin in it.
    steps = [entry for entry in history if "step_time" in entry and "loss" in entry][1:]
    time_s = sum(step["step_time"] for step in steps)
    return {
        "trainer_idle": sum(step["perf/batch_wait_s"] for step in steps) / time_s,
        "server_idle": sum(value == 0 for value in sampler.samples) / len(sampler.samples),
        "step_s": time_s / len(steps),
        "rollouts_per_s": (steps[-1]["num_rollouts_trained"] - steps[0]["num_rollouts_trained"])
        / (time_s - steps[0]["step_time"]),
        "staleness": statistics.mean(step["staleness/mean"] for step in steps),
    }


class Sampler:
    """Asks the server every 50 ms how many requests it has."""

    def __init__(self, url: str):
        self.url = url
        self.samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            text = requests.get(f"{self.url}/metrics", timeout=30).text
            self.samples.append(sum(map(float, RUNNING.findall(text))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--max_steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    results: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as directory:
        for repeat in range(args.repeats):
            for num_prefetched, found in results.items():
                print(f"run {repeat + 1} of {args.repeats}, num_prefetched_batches {num_prefetched}", file=sys.stderr)
                run_dir = Path(directory) / f"{repeat}-{num_prefetched}"
                found.append(measure(args.model, num_prefetched, args.max_steps, run_dir))
    means = {
        number: {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
        for number, runs in results.items()
    }
    for number, values in means.items():
        line = {"num_prefetched_batches": number, **{name: round(value, 4) for name, value in values.items()}}
        print(json.dumps({**line, "repeats": args.repeats, "max_steps": args.max_steps}), flush=True)
    print(json.dumps({"step_s_ratio": round(means[1]["step_s"] / means[0]["step_s"], 4)}))


if __name__ == "__main__":
    main()
