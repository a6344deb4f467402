"""Run upstream's environment files, unmodified, and train a step on what each sends.

Usage: python tests/upstream/run.py CHECKOUT [--files FILE...] [--jobs 2] [--table docs/upstream_environments.md]

CHECKOUT is a clone of NousResearch/atropos; paths of files are those inside of its `environments/`. Each file runs through
`trl-atropos env FILE serve` beside `trl-atropos api` and an oracle (oracle.py), on data of our own (standins.py), as its recipe says (recipes.py).
The first group that arrives is kept, or of those of 15 seconds the first whose rewards differ, and an offline run makes one
optimizer step on each. One JSON line a file; what came of files of earlier runs stays in the working directory, and --table writes
all of it: it wants those that --probe runs, too. With requirements/upstream.txt installed beside:

    packaging/install_beside.sh .venv .venv-upstream requirements/upstream.txt
    PYTHONPATH=$PWD:$PWD/tests .venv-upstream/bin/python tests/upstream/run.py CHECKOUT
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# First: imported before torch, it makes threads on a CPU sleep while they wait for each other.
from trl_atropos import AtroposConfig, AtroposTrainer
from trl_atropos.errors import TrlAtroposError


# isort: split
import fork_server
import requests
from fork_server import ForkedProcess
from oracle import Answers, Oracle, Policy
from page import make_page, render_page
from recipes import RECIPES, Recipe
from standins import Standins


ROOT = Path(__file__).parents[2]
MAX_LENGTH = 4096
"""Tokens of a rollout, as registered with the API."""

TIMEOUT_S = 75.0
"""For the group of a file."""

ERROR_RATE = 0.5
START_TIMEOUT_S = 60.0
MAX_STEPS = 16
"""Of one run; results are kept after each."""

STOP_TIMEOUT_S = 10.0
SETTLE_S = 15.0
"""After a first group whose rewards are equal another one is waited for."""

PROBE = Recipe(("Yes.",), ("No.",))
"""For a file without a recipe: what does it say?"""


def environment_files(environments: Path) -> dict[str, list[str]]:
    """Files that define an environment, with the names of the classes: what derives from `BaseEnv`, by name."""
    bases: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for file in sorted(environments.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
                bases[file.relative_to(environments).as_posix()].append((node.name, names))
    known = {"BaseEnv", "TeacherDistillationEnv"}
    while True:
        found = {name for classes in bases.values() for name, parents in classes if known.intersection(parents)}
        if found <= known:
            break
        known |= found
    files = {
        file: [name for name, parents in classes if known.intersection(parents)] for file, classes in bases.items()
    }
    return {file: names for file, names in files.items() if names}


def only_evaluates(file: Path) -> bool:
    """Whether `collect_trajectories` of the environment in a file does nothing but return nothing."""
    functions = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.AsyncFunctionDef) and node.name.startswith("collect_traj")
    ]
    return bool(functions) and all(
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        or (isinstance(statement, ast.Return) and ast.unparse(statement.value or ast.List([])) in ("[]", "(None, [])"))
        for function in functions
        for statement in function.body
    )


class Workplace:
    """A directory in which files run: upstream's `environments/`, and the data of our own."""

    def __init__(self, directory: Path, environments: Path, model: Path):
        self.directory = directory.resolve()
        self.repository = environments.resolve().parent
        self.logs = self.directory / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.data = self.directory / "data"
        # Anew each time: it takes a second, and some files write into it.
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.copytree(environments, self.data / "environments")
        self.standins = Standins(self.data, model)
        self.standins.add_missing_files(self.data / "environments")
        fights = self.data / "environments" / "community" / "ufc_prediction_env" / "large_dataset.csv"
        if fights.is_file():
            self.standins.read_fights(fights)
        self.results_path = self.directory / "results.json"

    def log(self, file: str, suffix: str) -> Path:
        return self.logs / (re.sub(r"\W+", "_", file.removesuffix(".py")) + suffix)

    def read_results(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.results_path.read_text()) if self.results_path.is_file() else {}

    def write_results(self, results: dict[str, dict[str, Any]]) -> None:
        self.results_path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")

    def variables(self, recipe: Recipe) -> dict[str, str]:
        """Environment variables of a file's process: no network, no keys, and nobody is logged in to W&B."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "WANDB_", "HF_"))}
        path = [str(ROOT), *([str(self.repository)] if recipe.from_repository else [])]
        return kept | {
            **self.standins.variables,
            **dict(recipe.variables),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.directory / "hf"),
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
        }


@contextmanager
def process(command: Sequence[str], **options: Any) -> Any:
    """A program of Python with its children, ended together."""
    started = ForkedProcess(command, start_new_session=True, stderr=subprocess.STDOUT, **options)
    try:
        yield started
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(started.pid, number)
                started.wait(STOP_TIMEOUT_S)


@contextmanager
def trajectory_api(log_path: Path, num_rollouts: int) -> Any:
    """`trl-atropos api` with a trainer that is registered and asked for its first batch, so that environments may come."""
    database = log_path.with_suffix(".db")
    for old in log_path.parent.glob(f"{database.name}*"):
        old.unlink()
    command = [sys.executable, "-m", "trl_atropos.cli.main", "api", "--db", str(database), "--port", "0"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    with log_path.open("wb") as log, process(command, stdout=log, env=variables) as api:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"Trajectory API on (\S+),", log_path.read_text())):
            if api.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The API did not start:\n{log_path.read_text()}")
            time.sleep(0.1)
        url = found[1]
        registration = {
            **{"wandb_group": "upstream", "wandb_project": "upstream", "batch_size": num_rollouts},
            **{"max_token_len": MAX_LENGTH, "checkpoint_dir": "", "save_checkpoint_interval": 0},
            **{"starting_step": 0, "num_steps": 1000},
        }
        requests.post(f"{url}/register", json=registration, timeout=30).raise_for_status()
        assert requests.get(f"{url}/batch", timeout=30).json() == {"batch": None}
        yield url


def own_options(file: str, recipe: Recipe, source: str) -> list[str]:
    """The options by which a file differs from the others."""
    options = ["--env.group_size", str(recipe.num_rollouts), "--env.max_token_length", str(recipe.max_tokens)]
    if "managed_server(" in source:
        options += ["--openai.server_type", "vllm"]
    return [*options, *recipe.options]


def deliver(
    file: str,
    recipe: Recipe,
    place: Workplace,
    policy: Policy,
    timeout_s: float = TIMEOUT_S,
    error_rate: float = ERROR_RATE,
) -> dict[str, Any]:
    """Run a file until a group arrives, it ends or the time is over; return what came of it."""
    start = time.monotonic()
    log_path = place.log(file, ".log")
    path = place.data / "environments" / file
    options = own_options(file, recipe, path.read_text(encoding="utf-8"))
    answers = Answers(recipe.right, recipe.wrong, place.standins.facts)
    group, status = None, None
    with (
        Oracle(policy, answers, error_rate) as oracle,
        trajectory_api(place.log(file, ".api.log"), recipe.num_rollouts) as api_url,
        log_path.open("wb") as log,
    ):
        command = [
            *(sys.executable, "-m", "trl_atropos.cli.main", "env", str(path), "serve"),
            *("--env.rollout_server_url", api_url, "--env.tokenizer_name", policy.name),
            *("--openai.base_url", f"{oracle.url}/v1", "--openai.model_name", policy.name),
            *("--env.total_steps", "1000", "--env.steps_per_eval", "0", "--env.ensure_scores_are_not_same", "false"),
            *("--env.max_batches_offpolicy", "2", "--env.max_num_workers", "2"),
            *(option.replace("ORACLE", oracle.url) for option in options),
        ]
        with process(command, stdout=log, cwd=place.data, env=place.variables(recipe)) as environment:
            deadline = start + timeout_s
            while time.monotonic() < deadline:
                if recipe.waits_for_a_step:
                    requests.post(f"{api_url}/scored_data", json=other_group(recipe.num_rollouts), timeout=30)
                for one in requests.get(f"{api_url}/batch", timeout=30).json()["batch"] or []:
                    if one.get("env_id") is None:
                        continue
                    # One that teaches something, if it comes soon.
                    deadline = min(deadline, time.monotonic() + SETTLE_S)
                    if group is None or len(set(group["scores"])) == 1:
                        group = one
                if group is not None and len(set(group["scores"])) > 1:
                    break
                status = environment.poll()
                if status is not None:
                    break
                time.sleep(0.5)
        num_answers, temperatures = oracle.num_answers, oracle.temperatures
    text = log_path.read_text(errors="replace")
    result = {
        "file": file,
        "outcome": "nothing" if group is None else "delivered",
        "options": options,
        "shims": re.findall(r"^shim (\w+):", text, re.M),
        "num_answers": num_answers,
        "seconds": round(time.monotonic() - start, 1),
    }
    if group is None:
        return result | {"exit_status": status, "said": what_it_said(text)}
    place.log(file, ".group.json").write_text(json.dumps(group))
    return result | {
        "num_rollouts": len(group["tokens"]),
        "rewards": [round(float(score), 3) for score in group["scores"]],
        "num_trained_tokens": sum(mask != -100 for masks in group["masks"] for mask in masks),
        "max_length": max(map(len, group["tokens"])),
        "has_logprobs": bool(group.get("inference_logprobs")),
        # Those of one that samples its answers at several are not trained at one.
        "temperature": temperatures.pop() if len(temperatures) == 1 else 1.0,
    }


def other_group(num_rollouts: int) -> dict[str, Any]:
    """A group of another environment, whose fetch is a step."""
    scores = [float(number) for number in range(num_rollouts)]
    return {"tokens": [[1, 2]] * num_rollouts, "masks": [[-100, 2]] * num_rollouts, "scores": scores}


def what_it_said(text: str) -> list[str]:
    """Why no group came, in the words of `trl-atropos env`, or else the last lines that name an error."""
    reports = re.findall(r"No group was sent.*?Why:\n((?:  - .*\n?)+)", text)
    if reports:
        return [line.removeprefix("  - ")[:300] for line in reports[-1].splitlines()]
    lines = [line.strip()[:300] for line in text.splitlines() if line.strip()]
    return [line for line in lines if re.search(r"[Ee]rror|not installed|exception", line)][-2:] or lines[-2:]


def train(place: Workplace, policy: Policy, temperatures: Mapping[str, float]) -> Iterator[dict[str, dict[str, Any]]]:
    """One optimizer step on the group of each file, at the temperature of its sampling; yield metrics of each run, by file.

    A run trains groups of one size, so that each is a step, and of one temperature.
    """
    groups = {file: json.loads(place.log(file, ".group.json").read_text()) for file in temperatures}
    alike: dict[tuple[int, float], list[str]] = defaultdict(list)
    for file, group in groups.items():
        alike[len(group["tokens"]), temperatures[file]].append(file)
    for (size, temperature), all_members in alike.items():
        for start in range(0, len(all_members), MAX_STEPS):
            members = all_members[start : start + MAX_STEPS]
            yield train_run(place, policy, size, temperature, {file: groups[file] for file in members})


def train_run(
    place: Workplace, policy: Policy, size: int, temperature: float, groups: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Train a step on each of these groups of one size; return the metrics of each, or why it was refused."""
    files = list(groups)
    data_path = place.directory / "groups.jsonl"
    lines = [json.dumps({**group, "env_id": number}) for number, group in enumerate(groups.values())]
    data_path.write_text("\n".join(lines) + "\n")
    output_dir = place.directory / "trained"
    shutil.rmtree(output_dir, ignore_errors=True)
    config = AtroposConfig(
        output_dir=str(output_dir),
        data_path=str(data_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size,
        max_length=MAX_LENGTH,
        temperature=temperature,
        max_steps=len(files),
        # The policy stays that whose logprobs were sent, so that they can be compared in every step.
        learning_rate=1e-7,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        inference_logprobs="use",
        # What cannot be trained is told, one file after the other.
        max_dropped_fraction=0.99,
    )
    trainer = AtroposTrainer(policy.name, config, processing_class=policy.tokenizer)
    steps: dict[str, dict[str, Any]] = {}
    try:
        trainer.train()
    except TrlAtroposError as exc:
        # Of a run of groups that are all refused.
        steps = {file: {"refused": str(exc)} for file in files}
    for line in trainer.state.log_history:
        for number, file in enumerate(files):
            if line.get(f"env/env_{number}/batch_frac", 0) > 0:
                kept = ("loss", "grad_norm", "num_trained_tokens")
                steps[file] = {key: value for key, value in line.items() if key in kept or key.startswith("sampling/")}
    quarantine = output_dir / "quarantine.jsonl"
    for line in quarantine.read_text().splitlines() if quarantine.is_file() else []:
        refused = json.loads(line)
        steps[files[refused["env_id"]]] = {"refused": refused["error"]}
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="directory of a clone of NousResearch/atropos")
    parser.add_argument(
        "--files", nargs="+", metavar="FILE", help="of environments/ (default: all that have a recipe)"
    )
    parser.add_argument("--probe", action="store_true", help="run the files that have no recipe, to see what they say")
    parser.add_argument("--jobs", type=int, default=2, help="files at once (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument(
        "--error_rate", type=float, default=ERROR_RATE, help="share of wrong answers (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout_s", type=float, default=TIMEOUT_S, help="for the group of a file (default: %(default)s)"
    )
    parser.add_argument("--directory", type=Path, default=ROOT / "runs" / "upstream", help="(default: runs/upstream)")
    parser.add_argument("--missing", action="store_true", help="run only what --directory has no group of yet")
    parser.add_argument("--limit_s", type=float, help="begin no further file after so many seconds")
    parser.add_argument("--no_train", action="store_true", help="make no optimizer steps")
    parser.add_argument("--table", type=Path, help="the page that is written, of all results in --directory")
    args = parser.parse_args()
    defined = environment_files(args.checkout / "environments")
    evaluating = {file: only_evaluates(args.checkout / "environments" / file) for file in defined}
    files = args.files or [file for file in defined if not evaluating[file] and (file in RECIPES) != args.probe]
    if unknown := [file for file in files if file not in defined]:
        parser.error(f"no such environment: {', '.join(unknown)}")
    place = Workplace(args.directory, args.checkout / "environments", args.model)
    # What files are forked from takes a while to import everything, which is none of their time.
    fork_server.run([sys.executable, "-m", "trl_atropos.cli.main", "env", "--list-shims"], timeout=START_TIMEOUT_S * 4)
    policy = Policy(args.model.resolve())
    results = place.read_results()
    lock, num_done, start = threading.Lock(), 0, time.monotonic()

    def run(file: str) -> None:
        nonlocal num_done
        if args.limit_s is not None and time.monotonic() - start > args.limit_s:
            return
        result = deliver(file, RECIPES.get(file, PROBE), place, policy, args.timeout_s, args.error_rate)
        with lock:
            num_done += 1
            print(f"{num_done}/{len(to_run)} {file}: {result['outcome']}, {result['seconds']:.0f} s", file=sys.stderr)
            results[file] = result
            place.write_results(results)

    to_run = [
        file for file in files if not args.missing or results.get(file, {}).get("outcome", "nothing") == "nothing"
    ]
    # What was not run yet comes first.
    to_run.sort(key=lambda file: file in results)
    with ThreadPoolExecutor(args.jobs) as pool:
        # Exceptions of a thread are raised here.
        list(pool.map(run, to_run))
    delivered = {
        file: results[file]["temperature"] for file in files if results.get(file, {}).get("outcome") == "delivered"
    }
    if not args.no_train:
        for steps in train(place, policy, delivered):
            for file, step in steps.items():
                results[file]["step"] = step
                if step.get("grad_norm", 0) > 0:
                    results[file]["outcome"] = "trained"
            place.write_results(results)
    for file in files:
        if file in results:
            print(json.dumps(results[file]))
    if args.table:
        args.table.write_text(render_page(make_page(evaluating, results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
