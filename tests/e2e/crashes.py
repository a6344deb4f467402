"""A live run on `trl-atropos api` with two environments of Atropos, whose parts are killed at random points.

PYTHONPATH=tests python tests/e2e/crashes.py [--num_kills 100] [--seed 0] [--parts api environment trainer] [--max_s 300] DIRECTORY

kills each part so many times, or until `max_s` are over, checks that every acknowledged group was trained once, and prints what happened as one JSON line. `test_crashes.py` does it with a few kills.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from envs.numbered import GROUP_SIZE, make_tokens
from fork_server import ForkedProcess
from live_api import DurableApiProcess, LiveRun, PublishTarget
from resume_run import BATCH_SIZE, fingerprint
from servers import ROOT
from tiny_models import byte_tokenizer

from trl_atropos.wire.client import AtroposClient


PROGRAM = Path(__file__).with_name("envs") / "numbered.py"
PARTS = ("api", "environment", "trainer")
NUM_ENVIRONMENTS = 2
NUMBERS_OF_A_START = 500
"""Groups that one process of an environment may post; `make_tokens` has numbers for 250 processes."""

RECOVERY_S = 60.0
"""Longest time from a kill to the next step that is trained, and to the next group of every environment that was not killed."""

OPTIONS = {"max_steps": 100_000, "save_steps": 10, "learning_rate": 1e-4, "api_timeout_s": 60.0}


class Environment:
    """An environment of Atropos in a process of its own, and what all of its processes sent and saw taken."""

    def __init__(self, directory: Path, number: int, api_url: str, tokenizer: Path, first_number: Sequence[int]):
        self.record_path = directory / f"env{number}.txt"
        self.record_path.touch()
        self.log_path = directory / f"env{number}.log"
        self.api_url = api_url
        self.tokenizer = tokenizer
        self.first_numbers = iter(first_number)
        self.process: ForkedProcess | None = None

    def start(self) -> None:
        options = {
            "--env.rollout_server_url": self.api_url,
            "--env.tokenizer_name": self.tokenizer,
            "--env.first_number": next(self.first_numbers),
            "--env.record_path": self.record_path,
            "--openai.tokenizer_name": self.tokenizer,
            "--openai.model_name": self.tokenizer,
        }
        words = [str(word) for option in options.items() for word in option]
        with self.log_path.open("ab") as log:
            command = [sys.executable, str(PROGRAM), "serve", *words]
            self.process = ForkedProcess(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def numbers(self, word: str) -> list[int]:
        """The groups that were `sent`, or `taken`."""
        lines = self.record_path.read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith(f"{word} ")]


def rollouts_of(numbers: Sequence[int]) -> Counter[str]:
    return Counter(fingerprint(tokens) for number in numbers for tokens in make_tokens(number))


def crash(
    directory: Path, target: PublishTarget, kills: Sequence[str], seed: int, max_s: float = float("inf")
) -> dict[str, object]:
    """Run, kill these parts one after the other at random moments, check, and return what happened.

    Ends before the last kill when `max_s` seconds are over. After each kill the run must train again, and every
    environment that was not killed must still run.
    """
    generator = random.Random(seed)
    tokenizer = directory / "tokenizer"
    byte_tokenizer().save_pretrained(tokenizer)
    began = time.monotonic()
    recovery_s: dict[str, list[float]] = {part: [] for part in PARTS}
    with ExitStack() as stack:
        run = stack.enter_context(LiveRun(directory, target, DurableApiProcess, **OPTIONS))
        environments = []
        for number in range(NUM_ENVIRONMENTS):
            firsts = range(number * NUMBERS_OF_A_START, 125_000, NUM_ENVIRONMENTS * NUMBERS_OF_A_START)
            environments.append(Environment(directory, number, run.api.url, tokenizer, firsts))
        trainer = run.start(resume=False)
        stack.callback(lambda: trainer.kill())
        for environment in environments:
            environment.start()
            stack.callback(environment.kill)
        run.wait_for(lambda: all(environment.numbers("taken") for environment in environments))

        def has_trained_since(num_steps: int) -> bool:
            assert trainer.poll() is None, run.log
            return len(run.steps()) > num_steps

        for part in kills:
            if time.monotonic() - began > max_s:
                break
            time.sleep(generator.uniform(0.0, 0.5))
            victim = generator.choice(environments)
            start = time.monotonic()
            if part == "api":
                os.kill(run.api.server_pid(), signal.SIGKILL)
            elif part == "environment":
                victim.kill()
                victim.start()
            else:
                trainer.kill()
                assert run.join(trainer) == -signal.SIGKILL, run.log
                trainer = run.start()
            num_steps = len(run.steps())
            run.wait_for(lambda seen=num_steps: has_trained_since(seen), RECOVERY_S)
            recovery_s[part].append(time.monotonic() - start)
            for environment in environments:
                assert environment.is_running, environment.log_path.read_text()[-4000:]
        # All go on: nobody needed to be started again.
        num_taken = [len(environment.numbers("taken")) for environment in environments]
        run.wait_for(
            lambda: all(
                len(environment.numbers("taken")) > before
                for environment, before in zip(environments, num_taken, strict=True)
            ),
            RECOVERY_S,
        )
        for environment in environments:
            environment.kill()
        # Until less than a batch is left, and what was fetched is trained.
        run.wait_for(lambda: run.api.get("/status")["queue_size"] < BATCH_SIZE // GROUP_SIZE)
        run.wait_for(lambda: metric(run.api.url, "unacknowledged_batches") == 0)
        run.wait_for(lambda: run.trained().total() == run.journaled().total())
        trainer.kill()
        assert run.join(trainer) == -signal.SIGKILL, run.log
        state = run.api.get("/status")
        trained = run.trained()
        sent = rollouts_of([number for environment in environments for number in environment.numbers("sent")])
        taken = rollouts_of([number for environment in environments for number in environment.numbers("taken")])
        assert max(trained.values()) == max(sent.values()) == 1
        assert not trained - sent
        # Acknowledged and not trained: what makes no batch, less than one, is left in the queue.
        assert (taken - trained).total() <= state["queue_size"] * GROUP_SIZE
        assert run.journaled() == trained
        assert "event=post_refused" not in run.api.log_path.read_text()
        return {
            "num_kills": {part: len(seconds) for part, seconds in recovery_s.items()},
            "recovery_s_max": {part: round(max(seconds), 2) for part, seconds in recovery_s.items() if seconds},
            "num_groups_taken": taken.total() // GROUP_SIZE,
            "num_groups_trained": trained.total() // GROUP_SIZE,
            "num_steps": state["current_step"],
            "duration_s": round(time.monotonic() - began, 1),
        }


def metric(url: str, name: str) -> float:
    with AtroposClient(url) as client:
        return client.metrics()[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--num_kills", type=int, default=100, help="of each part")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_s", type=float, default=300.0)
    args = parser.parse_args()
    kills = [part for part in args.parts for _ in range(args.num_kills)]
    random.Random(args.seed).shuffle(kills)
    args.directory.mkdir(parents=True)
    with PublishTarget(args.directory / "served") as target:
        print(json.dumps(crash(args.directory / "run", target, kills, args.seed, args.max_s)))


if __name__ == "__main__":
    main()
