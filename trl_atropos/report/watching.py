"""Which of the ways to watch a run it has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PrinterCallback, ProgressCallback, Trainer

from .callback import ReportCallback
from .panel import PanelCallback, RunPanel, WaitingCallback
from .prometheus import PrometheusCallback
from .step_table import StepTableCallback


if TYPE_CHECKING:
    from ..trainer.atropos_config import AtroposConfig


class Watching:
    """What shows a run: the panel on a terminal or lines in a log, never both; the report; Prometheus.

    Args:
        trainer (`Trainer`):
            Its callbacks of transformers that print are replaced.
        args ([`AtroposConfig`]):
            Options. `disable_tqdm` chooses lines also on a terminal.
    """

    def __init__(self, trainer: Trainer, args: AtroposConfig):
        self._panel: RunPanel | None = None
        self._prometheus: PrometheusCallback | None = None
        trainer.pop_callback(PrinterCallback)
        trainer.pop_callback(ProgressCallback)
        if sys.stdout.isatty() and not args.disable_tqdm and trainer.is_world_process_zero():
            self._panel = RunPanel()
            first = PanelCallback(self._panel, publishes=args.data_path is None)
            trainer.callback_handler.callbacks.insert(0, first)
            trainer.add_callback(WaitingCallback(self._panel))
        else:
            trainer.add_callback(StepTableCallback())
        if args.prometheus_path is not None or args.prometheus_port is not None:
            path = None if args.prometheus_path is None else Path(args.prometheus_path)
            self._prometheus = PrometheusCallback(path, args.prometheus_port)
            trainer.add_callback(self._prometheus)
        trainer.add_callback(ReportCallback(args.report_html))

    def close(self) -> None:
        """Give the terminal and the port back, however the run ended."""
        if self._panel is not None:
            self._panel.stop()
        if self._prometheus is not None:
            self._prometheus.close()
