"""The newest metrics for Prometheus: a text file, an endpoint on loopback, or both."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import PreflightError
from .metric_help import ENVIRONMENT_METRICS, EVALUATION_METRICS, METRICS


logger = logging.getLogger(__name__)

PREFIX = "trl_atropos_"
ADDRESS = "127.0.0.1"

TOTALS = {
    "num_tokens",
    "num_rollouts_trained",
    "num_rollouts_dropped",
    "data/num_quarantined",
    "data/num_api_restarts",
    "data/num_batches_maybe_lost",
    "hub/num_failed_uploads",
    "trajectory_api/num_restarts",
    "trajectory_api/num_posts_refused",
    "trajectory_api/num_posts_repeated",
    "trajectory_api/num_posts_turned_away",
    "trajectory_api/num_batches_repeated",
    "trajectory_api/num_batches_put_back",
}
"""Metrics that count since the start; the others are of the newest log line."""


def prometheus_name(name: str) -> str:
    """The name that a metric has in Prometheus, after its conventions: base units written out, `_total` for counters."""
    text = re.sub(r"[^a-zA-Z0-9_]", "_", name)
    text = re.sub(r"_s$", "_seconds", text)
    if name == "step_time":
        text = "step_time_seconds"
    return f"{PREFIX}{text.replace('num_', '')}_total" if name in TOTALS else PREFIX + text


class LatestMetrics:
    """Collector of the newest value of every metric.

    An environment is a label: `env/<name>/reward` becomes `trl_atropos_env_reward{environment="<name>"}`.
    """

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._global_step = 0

    def update(self, logs: Mapping[str, Any], global_step: int) -> None:
        """Take the log line of an optimizer step. What is no number is left out."""
        numbers = {name: float(value) for name, value in logs.items() if isinstance(value, int | float)}
        # As a new dictionary, because a scrape may read the old one.
        self._values = {**self._values, **numbers}
        self._global_step = global_step

    def collect(self) -> Iterable[Metric]:
        """The metrics as families, one for each name, with the descriptions of docs/metrics.md."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        step = GaugeMetricFamily(f"{PREFIX}global_step", "Number of the optimizer step.")
        step.add_metric([], self._global_step)
        families[step.name] = step
        for name, value in self._values.items():
            shown, labels, text = _describe(name)
            family = families.get(shown)
            if family is None:
                kind = CounterMetricFamily if name in TOTALS else GaugeMetricFamily
                family = kind(shown, text, labels=["environment"] if labels else [])
                families[shown] = family
            family.add_metric(labels, value)
        return families.values()


def _describe(name: str) -> tuple[str, list[str], str]:
    """Return name, labels and description of a metric."""
    if name in METRICS:
        return prometheus_name(name), [], METRICS[name]
    if name.startswith("env/"):
        # Names of environments and of metrics can both hold a slash.
        known = [own for own in ENVIRONMENT_METRICS if name.endswith(f"/{own}")]
        own = max(known, key=len, default=name.rpartition("/")[2])
        environment = name.removeprefix("env/").removesuffix(f"/{own}")
        return prometheus_name(f"env/{own}"), [environment], ENVIRONMENT_METRICS.get(own, f"`{own}`.")
    if name.startswith("eval_"):
        environment, slash, own = name.removeprefix("eval_").partition("/")
        own = own if slash else environment
        labels = [environment] if slash else ["all"]
        return prometheus_name(f"eval/{own}"), labels, EVALUATION_METRICS.get(own, f"`{own}` of an evaluation.")
    return prometheus_name(name), [], f"`{name}` of the Trainer of transformers."


class PrometheusCallback(TrainerCallback):
    """Shows the newest metrics to Prometheus, on rank 0.

    `path` is a text file that is replaced whole with every log line. `port` is a port on loopback, 0 for a free one,
    which is logged; while training goes on, the attribute `port` is the one where the metrics are. None leaves out the
    file, or the port.
    """

    def __init__(self, path: Path | None = None, port: int | None = None):
        self.path = path
        self.port: int | None = None
        self._wanted_port = port
        self._server: Any = None
        self._failed = False
        self._metrics = LatestMetrics()
        self._registry = CollectorRegistry()
        self._registry.register(self._metrics)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the port and write the file for the first time.

        Raises:
            [`PreflightError`]: the port is taken, or the file cannot be written.
        """
        if not state.is_world_process_zero:
            return
        if self._wanted_port is not None:
            self._listen(self._wanted_port)
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_to_textfile(str(self.path), self._registry)
            except OSError as exc:
                raise PreflightError(
                    f"The metrics cannot be written to {self.path}: {exc}.",
                    "--prometheus_path names this file.",
                    "Name one in a directory that this user can write to.",
                ) from exc

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take a log line."""
        if not state.is_world_process_zero or not logs:
            return
        self._metrics.update(logs, state.global_step)
        if self.path is None:
            return
        try:
            write_to_textfile(str(self.path), self._registry)
        except OSError as exc:
            if not self._failed:
                logger.warning(f"{self.path} cannot be written any more: {exc}. Prometheus sees old metrics.")
            self._failed = True

    def close(self) -> None:
        """Close the port. The file keeps the last metrics."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _listen(self, port: int) -> None:
        try:
            self._server, _ = start_http_server(port, ADDRESS, self._registry)
        except OSError as exc:
            raise PreflightError(
                f"Port {port} of {ADDRESS} cannot be opened: {exc.strerror}.",
                "--prometheus_port names it; another process may listen there.",
                "Choose another port, or 0 for a free one.",
            ) from exc
        self.port = self._server.server_port
        logger.info(f"Prometheus can scrape http://{ADDRESS}:{self.port}/metrics")
