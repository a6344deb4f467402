"""Trainer callbacks: publish the policy, mark what is trained, and show every step as a line of a table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .report.callback import ReportCallback


class PublishPolicyCallback(TrainerCallback):
    """Publishes once before the first batch and then every `weight_sync_steps` optimizer steps, the last included.

    Args:
        publish (`Callable[[], None]`):
            Publishes the policy; called on every rank.
        weight_sync_steps (`int`):
            See `AtroposConfig`.
    """

    def __init__(self, publish: Callable[[], None], weight_sync_steps: int):
        self.publish = publish
        self.weight_sync_steps = weight_sync_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the starting policy."""
        self.publish()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish where it is due."""
        if state.global_step % self.weight_sync_steps == 0 or control.should_training_stop:
            self.publish()


class TrainedBatchCallback(TrainerCallback):
    """Says after each optimizer step that its batch is trained.

    Args:
        mark_trained (`Callable[[], None]`):
            Called on every rank.
    """

    def __init__(self, mark_trained: Callable[[], None]):
        self.mark_trained = mark_trained

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the batch of the step."""
        self.mark_trained()


def add_watching_callbacks(trainer: Trainer) -> None:
    """Replace what transformers shows of a run by what shows an Atropos run.

    Args:
        trainer (`Trainer`):
            Changed.
    """
    trainer.pop_callback(PrinterCallback)
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(StepTableCallback())
    trainer.add_callback(ReportCallback())


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward", "8.3f"),
    ("std", "reward_std", "7.3f"),
    ("loss", "loss", "9.4f"),
    ("stale", "staleness/mean", "7.2f"),
    ("wait s", "perf/batch_wait_s", "8.2f"),
    ("publish s", "perf/weight_sync_s", "10.2f"),
    ("step s", "step_time", "8.2f"),
)


class StepTableCallback(TrainerCallback):
    """Writes one line per logged step: step, reward, reward_std, loss, staleness, seconds of wait, publish and step.

    Args:
        stream (`TextIO`, *optional*):
            Where to write; standard output if not given.
    """

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the header. The first batch takes as long as the environments need."""
        if state.is_world_process_zero:
            titles = [title.rjust(int(width.split(".")[0])) for title, _, width in COLUMNS]
            self._write("Waiting for the first batch.")
            self._write("step".rjust(10) + "".join(titles))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line of a step."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        cells = [_cell(logs.get(name), width) for _, name, width in COLUMNS]
        self._write(f"{state.global_step}/{state.max_steps}".rjust(10) + "".join(cells))

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


def _cell(value: float | None, width: str) -> str:
    return "?".rjust(int(width.split(".")[0])) if value is None else format(value, width)
