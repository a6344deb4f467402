"""A small AtroposTrainer that notes what it trains, for tests that kill it.

An attempt is a fork of a process that has imported everything, so that a start takes a second and not ten.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from fork_server import ForkedProcess
from launcher import start_call
from tiny_models import tiny_gpt2
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from trl_atropos import AtroposConfig, AtroposTrainer
from trl_atropos.errors import TrlAtroposError
from trl_atropos.report.callback import ReportCallback
from trl_atropos.types import Rollout
from trl_atropos.wire.client import AtroposClient
from trl_atropos.wire.journal import MARKS_NAME, Journal


NUM_STEPS = 12
GROUP_SIZE = 2
BATCH_SIZE = 4
ATTEMPT_TIMEOUT_S = 120.0

OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    # Random numbers, moments of the optimizer and a schedule: a resume must bring all of them back.
    "disable_dropout": False,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": NUM_STEPS,
    "save_steps": 3,
    "save_total_limit": 2,
    "max_length": 32,
    "sequence_layout": "padded",
}


def make_group(number: int, **fields: Any) -> dict[str, Any]:
    """A group of two rollouts that no other number has: its digits to the base 50 are their prompts."""
    tokens = [
        [1, 10 + number // 50, 10 + number % 50, 2, 3 + rollout, *[5 + number % 3] * (1 + number % 4)]
        for rollout in range(GROUP_SIZE)
    ]
    return {
        "tokens": tokens,
        "masks": [[-100, -100, -100, *row[3:]] for row in tokens],
        "scores": [float((number + rollout) % 3) for rollout in range(GROUP_SIZE)],
        "inference_logprobs": [[1.0, 1.0, 1.0, *[-4.0] * len(row[3:])] for row in tokens],
        **fields,
    }


def fingerprint(input_ids: list[int]) -> str:
    """What a rollout is known by in records."""
    return hashlib.sha256(json.dumps(input_ids).encode()).hexdigest()[:16]


def fingerprints(group: dict[str, Any]) -> Counter[str]:
    return Counter(map(fingerprint, group["tokens"]))


def rollouts_of(numbers: Iterable[int]) -> Counter[str]:
    """The rollouts of these groups of `make_group`."""
    return sum((fingerprints(make_group(number)) for number in numbers), Counter())


class Records(TrainerCallback):
    """Writes down, apart from journal and checkpoints, where each attempt began and what each of its steps trained."""

    def __init__(self, path: Path, progress: Any):
        self.path = path
        self.progress = progress
        self.rollouts: list[str] = []
        self.micro_batches: list[list[int]] = []

    def take(self, micro_batch: list[Rollout]) -> None:
        """Note what is about to be trained."""
        self.rollouts += [fingerprint(rollout.input_ids.tolist()) for rollout in micro_batch]
        self.micro_batches.append([rollout.num_tokens for rollout in micro_batch])

    def write(self, **entry: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.write(begin=state.global_step)
        self.progress.began = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.write(step=state.global_step, rollouts=self.rollouts, micro_batches=self.micro_batches)
        self.rollouts, self.micro_batches = [], []


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained_rollouts(path: Path) -> Counter[str]:
    """The rollouts in the final policy: what was trained after the checkpoint that was resumed from is not in it."""
    steps: dict[int, list[str]] = {}
    for record in read_records(path):
        if "begin" in record:
            steps = {step: rollouts for step, rollouts in steps.items() if step <= record["begin"]}
        else:
            steps[record["step"]] = record["rollouts"]
    return Counter(rollout for rollouts in steps.values() for rollout in rollouts)


class RecordingTrainer(AtroposTrainer):
    """Dies at a moment, if one is given.

    Args:
        records ([`Records`]):
            Is told every rollout that is handed out to be trained.
        moment (`tuple[str, int]`, *optional*):
            What, and after how many times of it: `"append"` with half a line of the journal written, `"fetched"` with the
            whole batch written, `"mark"` with half a mark written, `"weights"` and `"state"` in the middle of a checkpoint,
            `"published"` right after a publish. At `"sigterm"`, in the middle of a step, it gets that signal instead.
    """

    def __init__(self, records: Records, moment: tuple[str, int] | None, *args: Any, **kwargs: Any):
        super().__init__(*args, callbacks=[records], **kwargs)
        # It takes longer than all steps: most kills would come after the training.
        self.remove_callback(ReportCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, JITCheckpointCallback) and callback.jit_manager is not None:
                # It waits for whether SIGKILL follows; there are not so many steps.
                callback.jit_manager.kill_wait = 0
        self.records = records
        self.moment, self.num_left = moment or ("", 0)

    def reach(self, moment: str) -> bool:
        """Whether this is the time to die."""
        self.num_left -= moment == self.moment
        return moment == self.moment and self.num_left == 0

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        def recorded() -> Iterator[Any]:
            for item in epoch_iterator:
                for micro_batch in item:
                    self.records.take(micro_batch)
                yield item

        return super().get_batch_samples(recorded(), num_batches, device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.reach("sigterm"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return super().training_step(*args, **kwargs)

    def publish_policy(self) -> None:
        super().publish_policy()
        if self.reach("published"):
            die()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.reach("weights"):
            die()
        super()._save_optimizer_and_scheduler(output_dir)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_with_half(path: Path, num_bytes: int) -> None:
    """What a kill in the middle of a write leaves of a file."""
    os.truncate(path, path.stat().st_size - num_bytes)
    die()


class Progress(ctypes.Structure):
    """What an attempt shows to the process that kills it, in a file that both map. Times are of `time.monotonic`."""

    _fields_: ClassVar = [("began", ctypes.c_double), ("ended", ctypes.c_double), ("is_fetching", ctypes.c_bool)]


def map_progress(directory: Path) -> Progress:
    """The [`Progress`] of the attempts of a run."""
    with open(directory / "progress", "r+b") as file:
        return Progress.from_buffer(mmap.mmap(file.fileno(), 0))


def arm(trainer: RecordingTrainer, progress: Any) -> None:
    """Put the moments into what the trainer calls, and note while a batch is on its way from the API to the journal."""
    fetch_batch, append, mark, save_state = (
        AtroposClient.fetch_batch,
        Journal.append,
        Journal.mark,
        TrainerState.save_to_json,
    )

    def armed_fetch_batch(client: AtroposClient, *name: Any) -> Any:
        progress.is_fetching = True
        batch = fetch_batch(client, *name)
        progress.is_fetching = batch is not None
        return batch

    def armed_append(journal: Journal, raw_groups: Any) -> int:
        number = append(journal, raw_groups)
        if trainer.reach("append"):
            die_with_half(sorted(journal.directory.glob("rollouts-*"))[-1], num_bytes=20)
        progress.is_fetching = False
        if trainer.reach("fetched"):
            die()
        return number

    def armed_mark(journal: Journal, event: str, batch: int, **values: Any) -> None:
        mark(journal, event, batch, **values)
        if trainer.reach("mark"):
            die_with_half(journal.directory / MARKS_NAME, num_bytes=5)

    def armed_save_state(state: TrainerState, path: str) -> None:
        save_state(state, path)
        if trainer.reach("state"):
            die_with_half(Path(path), num_bytes=100)

    AtroposClient.fetch_batch = armed_fetch_batch  # type: ignore[method-assign]
    Journal.append = armed_append  # type: ignore[method-assign]
    Journal.mark = armed_mark  # type: ignore[method-assign]
    TrainerState.save_to_json = armed_save_state  # type: ignore[method-assign]


@dataclass(frozen=True)
class Attempt:
    """What a process does.

    Args:
        directory (`Path`):
            Of the run; see [`Run`].
        options (`dict`):
            Of `AtroposConfig`, beyond `OPTIONS`.
        moment (`tuple[str, int]`, *optional*):
            See [`RecordingTrainer`].
        resume (`bool`):
            Whether `resume_from_checkpoint` is given.
        max_file_bytes (`int`, *optional*):
            Size beyond which no file can be written.
        rank (`int`), world_size (`int`), port (`int`):
            Of the process group, if there is one.
    """

    directory: Path
    options: dict[str, Any]
    moment: tuple[str, int] | None = None
    resume: bool = True
    max_file_bytes: int | None = None
    rank: int = 0
    world_size: int = 1
    port: int = 0

    def __call__(self) -> None:
        """Train until the end, an error or a kill."""
        progress = map_progress(self.directory)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        # A fork of a process whose pool of threads had run would hang in its first operation.
        torch.set_num_threads(1)
        if self.world_size > 1:
            self.join_process_group()
        args = AtroposConfig(output_dir=str(self.directory / "out"), **{**OPTIONS, **self.options})
        records = Records(self.directory / f"records{self.rank}.jsonl", progress)
        trainer = RecordingTrainer(records, self.moment, tiny_gpt2(), args)
        arm(trainer, progress)
        if self.max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.max_file_bytes, self.max_file_bytes))
        try:
            trainer.train(resume_from_checkpoint=self.resume)
            progress.ended = time.monotonic()
        except TrlAtroposError as exc:
            error = {"type": type(exc).__name__, "what": exc.what, "why": exc.why, "fix": exc.fix}
            (self.directory / f"error{self.rank}.json").write_text(json.dumps(error))
            logging.exception("The attempt ended")
            # Not sys.exit: a rank must not wait for others while it cleans up.
            os._exit(1)

    def join_process_group(self) -> None:
        """Become a rank of gloo, and note whom it connects to from Python: gloo itself does not."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_WORLD_SIZE=str(self.world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.port),
            ACCELERATE_USE_CPU="true",
            GLOO_SOCKET_IFNAME="lo",
        )
        path = self.directory / f"connections{self.rank}.txt"
        path.touch()

        def note(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "socket.connect" and isinstance(arguments[1], tuple):
                with open(path, "a") as file:
                    file.write(f"http://{arguments[1][0]}:{arguments[1][1]}\n")

        sys.addaudithook(note)


class Run:
    """The attempts of one run.

    Args:
        directory (`Path`):
            Gets `out`, `log.txt` and, for each rank, `records0.jsonl` and `error0.json` if it ended with an error.
        options:
            Of `AtroposConfig`, beyond `OPTIONS`.
    """

    def __init__(self, directory: Path, **options: Any):
        self.directory = directory
        self.output_dir = directory / "out"
        self.records_path = directory / "records0.jsonl"
        self.options = options
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "progress").write_bytes(bytes(ctypes.sizeof(Progress)))
        self.progress = map_progress(directory)

    def start(self, **attempt: Any) -> ForkedProcess:
        """Start an attempt in a process of its own. `attempt`: more of [`Attempt`]."""
        self.progress.began = self.progress.ended = 0.0
        self.progress.is_fetching = False
        with open(self.directory / "log.txt", "ab") as log:
            return start_call(Attempt(self.directory, self.options, **attempt), stdout=log, stderr=log)

    def finish(self, **attempt: Any) -> float:
        """Run an attempt that nobody kills; returns how long its training took, in seconds."""
        assert self.join(self.start(**attempt)) == 0, self.log
        return self.progress.ended - self.progress.began

    def kill_after(self, seconds: float) -> bool:
        """Run an attempt and kill it so long after training began; returns whether it lived until then."""
        process = self.start()
        self.wait_for(lambda: self.progress.began > 0.0)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, self.progress.began + seconds - time.monotonic()))
        process.kill()
        exitcode = self.join(process)
        assert exitcode in (0, -signal.SIGKILL), self.log
        return exitcode != 0

    def join(self, process: ForkedProcess) -> int:
        """Wait for the end of an attempt and return its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ATTEMPT_TIMEOUT_S)
        assert process.returncode is not None, f"it still runs:\n{self.log}"
        return process.returncode

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = ATTEMPT_TIMEOUT_S) -> None:
        """Return as soon as this is so."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.005)

    @property
    def log(self) -> str:
        return (self.directory / "log.txt").read_text()[-8000:]

    def error(self, rank: int = 0) -> dict[str, str]:
        """`type`, `what`, `why` and `fix` of the error that ended an attempt."""
        return json.loads((self.directory / f"error{rank}.json").read_text())

    def steps(self) -> list[int]:
        """The steps of all attempts so far, in the order in which they were made."""
        return [record["step"] for record in read_records(self.records_path) if "step" in record]

    def trained(self) -> Counter[str]:
        """The rollouts in the final policy, of all ranks."""
        return sum(map(trained_rollouts, self.directory.glob("records*.jsonl")), Counter())

    def journaled(self) -> Counter[str]:
        """What the journal holds, by a reader that shares nothing with the trainer's."""
        lines = [
            json.loads(line)
            for path in sorted((self.output_dir / "journal").glob("rollouts-*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        return sum(map(fingerprints, lines), Counter())
