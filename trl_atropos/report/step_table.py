"""One line for every step, for logs."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .step_columns import COLUMNS, cell


class StepTableCallback(TrainerCallback):
    """Writes one line per logged step on `stream`, by default standard output: its number, then `COLUMNS`."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stdout

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the header. The first batch takes as long as the environments need."""
        if state.is_world_process_zero:
            titles = [title.rjust(int(spec.split(".")[0])) for title, _, spec in COLUMNS]
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
        cells = [cell(logs.get(name), spec) for _, name, spec in COLUMNS]
        self._write(f"{state.global_step}/{state.max_steps}".rjust(10) + "".join(cells))

    def _write(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()
