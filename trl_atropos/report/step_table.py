"""One line for every step, for logs."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
        cells = [cell(logs.get(name), width) for _, name, width in COLUMNS]
        self._write(f"{state.global_step}/{state.max_steps}".rjust(10) + "".join(cells))

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


def cell(value: float | None, width: str) -> str:
    """A number of a table, or `?` where there is none.

    Args:
        value (`float`, *optional*):
            The number.
        width (`str`):
            Its format, of `COLUMNS`.
    """
    return "?".rjust(int(width.split(".")[0])) if value is None else format(value, width)
