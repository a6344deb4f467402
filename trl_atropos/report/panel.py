"""A live panel on a terminal: how far the run is, what it does now, the last steps, and what it said."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from .step_columns import COLUMNS, cell


MAX_STEPS = 10
MAX_MESSAGES = 4
MAX_POINTS = 60
OTHER_LINES = 16
"""Lines of the panel beside those of the steps."""

BLOCKS = "▁▂▃▄▅▆▇█"
LIBRARIES = ("", "transformers", "trl", "trl_atropos", "accelerate", "huggingface_hub")
"""The loggers whose handlers write to the terminal."""

NUMBERS: tuple[tuple[str, str, str], ...] = (
    ("policy version", "policy_version", ".0f"),
    ("rollouts trained", "num_rollouts_trained", ",.0f"),
    ("dropped", "num_rollouts_dropped", ",.0f"),
    ("refused groups", "data/num_quarantined", ",.0f"),
    ("failed publishes", "perf/weight_sync_failures", ".0f"),
    ("probe, nats", "logprob_probe/mean_abs_diff", ".4f"),
    ("ratio", "sampling/importance_sampling_ratio/mean", ".3f"),
    ("entropy, nats", "entropy", ".2f"),
)


def sparkline(values: list[float]) -> str:
    """Show the newest numbers, at most 60, as a line of blocks, the least one lowest."""
    shown = [value for value in values[-MAX_POINTS:] if value == value]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in shown)


class RunPanel:
    """The lines that tell how a run goes, and the terminal that shows them."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.doing = "starting"
        self._since = time.monotonic()
        self._began = time.monotonic()
        self._first_step = 0
        self._step, self._max_steps = 0, 1
        self._rows: deque[tuple[int, Mapping[str, Any]]] = deque(maxlen=MAX_STEPS)
        self._rewards: list[float] = []
        self._messages: deque[str] = deque(maxlen=MAX_MESSAGES)
        self._live: Live | None = None
        self._handler = _MessageHandler(self._messages)
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._had_progress_bars = True

    def start(self, step: int, max_steps: int) -> None:
        """Show the panel. Until `stop`, messages of the libraries stand above it.

        `step` is the number of optimizer steps that are behind a run that was resumed, and `max_steps` that of the
        whole run.
        """
        self._step = self._first_step = step
        self._max_steps = max_steps
        self._began = time.monotonic()
        self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4)
        before = {sys.stderr: "stderr", sys.stdout: "stdout"}
        self._live.start()
        # A handler keeps the stream that it was made with, and would write into the panel.
        for name in LIBRARIES:
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream in before:
                    self._redirected.append((handler, handler.stream))
                    handler.setStream(getattr(sys, before[handler.stream]))
        logging.getLogger("trl_atropos").addHandler(self._handler)
        self._had_progress_bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def stop(self) -> None:
        """Leave the last state of the panel on the terminal, and give it back. Does nothing the second time."""
        if self._live is None:
            return
        live, self._live = self._live, None
        live.refresh()
        live.stop()
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected.clear()
        logging.getLogger("trl_atropos").removeHandler(self._handler)
        if self._had_progress_bars:
            transformers_logging.enable_progress_bar()

    def does(self, what: str) -> None:
        """Say what the run does from now on."""
        self.doing, self._since = what, time.monotonic()

    def add_step(self, step: int, logs: Mapping[str, Any]) -> None:
        """Take the log line of a step."""
        self._step = step
        self._rows.append((step, logs))
        reward = logs.get("reward")
        if isinstance(reward, int | float):
            self._rewards.append(float(reward))

    def render(self) -> RenderableType:
        """The panel as it stands now."""
        doing = self.doing if self._live is None else f"{self.doing} for {time.monotonic() - self._since:.0f} s"
        parts: list[RenderableType] = [self._progress(), Text(doing)]
        if self._rewards:
            line = f"reward {self._rewards[0]:.3f} {sparkline(self._rewards)} {self._rewards[-1]:.3f}"
            parts.append(Text(line, style="green", no_wrap=True, overflow="ellipsis"))
        parts.append(self._steps())
        if self._rows:
            parts.append(self._numbers(self._rows[-1][1]))
        parts += [Text(message, style="yellow", no_wrap=True, overflow="ellipsis") for message in self._messages]
        return Panel(Group(*parts), title="trl_atropos", border_style="cyan")

    def _progress(self) -> RenderableType:
        elapsed = time.monotonic() - self._began
        done = self._step - self._first_step
        left = elapsed / done * (self._max_steps - self._step) if done else None
        eta = "?" if left is None else _clock(left)
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_row(
            f"step {self._step}/{self._max_steps}",
            ProgressBar(total=self._max_steps, completed=self._step),
            f"{_clock(elapsed)}, {eta} left",
        )
        return grid

    def _steps(self) -> RenderableType:
        table = Table(box=None, header_style="bold", padding=(0, 1))
        table.add_column("step", justify="right", no_wrap=True)
        # From the left, as many as fit: a cut number would be a wrong one.
        width, shown = 8, []
        for title, name, spec in COLUMNS:
            width += max(len(title), int(spec.split(".")[0])) + 2
            if width <= self.console.width - 4:
                shown.append((name, spec))
                table.add_column(title, justify="right", no_wrap=True)
        num_rows = max(1, self.console.height - OTHER_LINES)
        for step, logs in list(self._rows)[-num_rows:]:
            table.add_row(str(step), *(cell(logs.get(name), spec).strip() for name, spec in shown))
        return table

    def _numbers(self, logs: Mapping[str, Any]) -> RenderableType:
        known = [f"{title} {logs[name]:{spec}}" for title, name, spec in NUMBERS if name in logs]
        return Text("   ".join(known), style="dim")


class PanelCallback(TrainerCallback):
    """Keeps the panel on what happens, on rank 0. It stands before all other callbacks, so that it says what they do.

    `publishes` says whether the run publishes its policy.
    """

    def __init__(self, panel: RunPanel, publishes: bool):
        self.panel = panel
        self._publishing = "publishing the policy" if publishes else "finishing the step"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the panel."""
        if state.is_world_process_zero:
            self.panel.start(state.global_step, state.max_steps)
            self.panel.does(self._publishing)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say that the step is trained: its batch has come."""
        self.panel.does("forward and backward passes")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what follows the optimizer step."""
        self.panel.does(self._publishing)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the log line of a step."""
        if logs and "loss" in logs:
            self.panel.add_step(state.global_step, logs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the panel as it is."""
        self.panel.does("trained")
        self.panel.stop()


class WaitingCallback(TrainerCallback):
    """Says that the run waits for rollouts. Stands behind all other callbacks, the one that publishes among them."""

    def __init__(self, panel: RunPanel):
        self.panel = panel

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say that the run waits for the first batch."""
        self.panel.does("waiting for rollouts")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saving, evaluation and the next batch are next."""
        saves = "saving a checkpoint, then " if control.should_save else ""
        evaluates = "evaluating, then " if control.should_evaluate else ""
        self.panel.does(f"{evaluates}{saves}waiting for rollouts")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is written."""
        self.panel.does("waiting for rollouts")


class _MessageHandler(logging.Handler):
    """Keeps warnings for the panel, because above it they scroll away."""

    def __init__(self, messages: deque[str]):
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(f"{time.strftime('%H:%M:%S')} {record.getMessage()}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
