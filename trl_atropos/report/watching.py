"""Which of the ways to watch a run it has."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import PrinterCallback, ProgressCallback, Trainer

from .callback import ReportCallback
from .options import ReportOptions
from .panel import PanelCallback, RunPanel, WaitingCallback
from .prometheus import PrometheusCallback
from .step_table import StepTableCallback


class Watching:
    """What shows a run: the panel on a terminal or lines in a log, never both; the report; Prometheus.

    Those callbacks of the trainer that print, which are transformers' own, are replaced. `disable_tqdm` of the trainer
    chooses lines also on a terminal. `publishes` says whether the run has servers.
    """

    def __init__(self, trainer: Trainer, options: ReportOptions, *, publishes: bool):
        self._panel: RunPanel | None = None
        self._prometheus: PrometheusCallback | None = None
        trainer.pop_callback(PrinterCallback)
        trainer.pop_callback(ProgressCallback)
        if sys.stdout.isatty() and not trainer.args.disable_tqdm and trainer.is_world_process_zero():
            self._panel = RunPanel()
            first = PanelCallback(self._panel, publishes=publishes)
            trainer.callback_handler.callbacks.insert(0, first)
            trainer.add_callback(WaitingCallback(self._panel))
        else:
            trainer.add_callback(StepTableCallback())
        if options.prometheus_path is not None or options.prometheus_port is not None:
            path = None if options.prometheus_path is None else Path(options.prometheus_path)
            self._prometheus = PrometheusCallback(path, options.prometheus_port)
            trainer.add_callback(self._prometheus)
        trainer.add_callback(ReportCallback(options.report_html))

    def close(self) -> None:
        """Give the terminal and the port back, however the run ended."""
        if self._panel is not None:
            self._panel.stop()
        if self._prometheus is not None:
            self._prometheus.close()
