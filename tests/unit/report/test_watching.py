"""What a run shows of itself: one panel or one table, and the newest numbers for Prometheus."""

from __future__ import annotations

import io
import logging
import re
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.cells import cell_len
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments
from watched_runs import trained

from trl_atropos.errors import PreflightError
from trl_atropos.report.metric_help import METRICS
from trl_atropos.report.panel import NUMBERS, PanelCallback, RunPanel, WaitingCallback, sparkline
from trl_atropos.report.prometheus import TOTALS, PrometheusCallback
from trl_atropos.report.step_columns import COLUMNS
from trl_atropos.report.step_table import StepTableCallback


LOGS = {
    "loss": -0.125,
    "reward": 0.25,
    "reward_std": 0.5,
    "staleness/mean": 1.0,
    "perf/batch_wait_s": 2.0,
    "perf/weight_sync_s": 0.5,
    "step_time": 3.25,
    "policy_version": 7.0,
    "num_rollouts_trained": 1234.0,
}


def context(tmp_path: Path, **state: Any) -> tuple[TrainingArguments, TrainerState, TrainerControl]:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    return args, TrainerState(**{"max_steps": 20, "global_step": 7, **state}), TrainerControl()


class TestPanel:
    def text(self, width: int, height: int = 40, steps: int = 12) -> str:
        console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
        panel = RunPanel(console)
        for step in range(1, steps + 1):
            panel.add_step(step, {**LOGS, "reward": step / 10})
        console.print(panel.render())
        return console.file.getvalue()

    def test_it_shows_step_reward_and_the_last_steps(self):
        text = self.text(110)
        assert "1.200" in text and "▁" in text and "█" in text
        rows = re.findall(r"^│ +(\d+) ", text, flags=re.MULTILINE)
        assert rows == [str(step) for step in range(3, 13)]
        assert "policy version 7" in text and "rollouts trained 1,234" in text

    @pytest.mark.parametrize("width", [30, 50, 79, 80, 110, 200])
    def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(self, width):
        lines = self.text(width).splitlines()
        assert {cell_len(line) for line in lines} == {width}
        row = next(line for line in lines if re.match(r"│ +12 ", line))
        expected = ["12", "1.200", "0.500", "-0.1250", "1.00", "2.00", "0.50", "3.25"]
        cells = row.strip("│ ").split()
        assert cells == expected[: len(cells)]

    def test_a_low_terminal_has_fewer_steps(self):
        assert len(self.text(110, height=20).splitlines()) < 20

    def test_every_number_is_a_metric(self):
        assert {name for _, name, _ in NUMBERS} <= METRICS.keys()
        assert {name for _, name, _ in COLUMNS} - {"loss"} <= METRICS.keys()

    def test_it_says_what_the_run_does(self, tmp_path):
        panel = RunPanel(Console(file=io.StringIO(), width=100, force_terminal=True))
        first, last = PanelCallback(panel, publishes=True), WaitingCallback(panel)
        seen = []
        for event in ("on_train_begin", "on_step_begin", "on_step_end"):
            for callback in (first, last):
                getattr(callback, event)(*context(tmp_path))
                seen.append(panel.doing)
        first.on_train_end(*context(tmp_path))
        waiting, passes = "waiting for rollouts", "forward and backward passes"
        assert seen == ["publishing the policy", waiting, passes, passes, "publishing the policy", waiting]

    def test_messages_stand_above_it_and_handlers_are_given_back(self, monkeypatch):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("trl_atropos")
        logger.addHandler(handler)
        try:
            console = Console(file=stream, width=100, force_terminal=True)
            panel = RunPanel(console)
            panel.start(0, 10)
            assert handler.stream is not stream
            logger.warning("no environment is connected")
            assert "no environment is connected" in console_text(panel)
            panel.stop()
            panel.stop()
            assert handler.stream is stream
            logger.warning("later")
            assert "later" not in console_text(panel)
            assert "\x1b[?25h" in stream.getvalue(), "the cursor is shown again"
        finally:
            logger.removeHandler(handler)

    def test_a_resumed_run_counts_its_own_steps_for_what_is_left(self):
        panel = RunPanel(Console(file=io.StringIO(), width=100))
        panel.start(90, 100)
        panel._began -= 10.0
        panel.add_step(95, LOGS)
        text = console_text(panel)
        panel.stop()
        assert "0:00:10, 0:00:10 left" in text


def console_text(panel: RunPanel) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(panel.render())
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("values", "line"), [([], ""), ([1.0], "▁"), ([0.0, 0.5, 1.0], "▁▅█"), ([2.0, float("nan"), 2.0], "▁▁")]
)
def test_sparkline(values, line):
    assert sparkline(values) == line


class TestWhichOne:
    def kinds(self, tmp_path: Path, **options: Any) -> set[type]:
        run = trained(tmp_path, report_to="none", **options)
        return {type(callback) for callback in run.callback_handler.callbacks} & {PanelCallback, StepTableCallback}

    def test_a_log_gets_lines(self, tmp_path):
        assert self.kinds(tmp_path) == {StepTableCallback}

    def test_a_terminal_gets_the_panel(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        # Not left to transformers, which follows its log level.
        assert self.kinds(tmp_path, disable_tqdm=False) == {PanelCallback}

    def test_disable_tqdm_gets_lines_on_a_terminal_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert self.kinds(tmp_path, disable_tqdm=True) == {StepTableCallback}


class TestPrometheus:
    def families(self, text: str) -> dict[str, Any]:
        return {family.name: family for family in text_string_to_metric_families(text)}

    def test_the_file_holds_the_newest_metrics_of_a_run(self, tmp_path):
        path = tmp_path / "new" / "run.prom"
        run = trained(tmp_path, report_to="none", prometheus_path=str(path))
        families = self.families(path.read_text())
        logged = [entry for entry in run.state.log_history if "loss" in entry][-1]
        (reward,) = families["trl_atropos_reward"].samples
        assert reward.value == pytest.approx(logged["reward"])
        assert families["trl_atropos_reward"].documentation == METRICS["reward"]
        (of_environment,) = families["trl_atropos_env_reward"].samples
        assert (of_environment.labels, of_environment.value) == (
            {"environment": "capitals"},
            logged["env/capitals/reward"],
        )
        trained_rollouts = families["trl_atropos_rollouts_trained"]
        assert trained_rollouts.type == "counter"
        assert trained_rollouts.samples[0].name == "trl_atropos_rollouts_trained_total"
        assert trained_rollouts.samples[0].value == logged["num_rollouts_trained"] == 6
        assert "trl_atropos_perf_batch_wait_seconds" in families
        assert families["trl_atropos_global_step"].samples[0].value == 3

    def test_names_of_environments_and_evaluations_become_labels(self, tmp_path):
        callback = PrometheusCallback(tmp_path / "run.prom")
        logs = {
            "env/math/easy/completions/mean_length": 3.0,
            'env/a "b"\\/reward': 1.0,
            "eval_exact_match": 0.5,
            "eval_capitals/exact_match": 0.25,
            "a string": "no number",
        }
        callback.on_log(*context(tmp_path), logs=logs)
        families = self.families((tmp_path / "run.prom").read_text())
        assert families["trl_atropos_env_completions_mean_length"].samples[0].labels == {"environment": "math/easy"}
        assert families["trl_atropos_env_reward"].samples[0].labels == {"environment": 'a "b"\\'}
        values = {s.labels["environment"]: s.value for s in families["trl_atropos_eval_exact_match"].samples}
        assert values == {"all": 0.5, "capitals": 0.25}
        assert "trl_atropos_a_string" not in families

    def test_the_port_answers_during_the_run_and_is_closed_after_it(self, tmp_path):
        callback = PrometheusCallback(port=0)
        callback.on_train_begin(*context(tmp_path))
        callback.on_log(*context(tmp_path), logs=LOGS)
        url = f"http://127.0.0.1:{callback.port}/metrics"
        families = self.families(urllib.request.urlopen(url, timeout=30).read().decode())
        assert families["trl_atropos_policy_version"].samples[0].value == 7
        callback.close()
        with pytest.raises(OSError):
            urllib.request.urlopen(url, timeout=30)

    def test_a_port_that_is_taken_is_refused_before_the_first_step(self, tmp_path):
        first = PrometheusCallback(port=0)
        first.on_train_begin(*context(tmp_path))
        try:
            with pytest.raises(PreflightError, match=f"Port {first.port} .* Choose another port"):
                PrometheusCallback(port=first.port).on_train_begin(*context(tmp_path))
        finally:
            first.close()

    def test_a_file_that_cannot_be_written_is_refused_at_the_start_and_told_once_later(self, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        with pytest.raises(PreflightError, match="--prometheus_path"):
            PrometheusCallback(tmp_path / "file" / "run.prom").on_train_begin(*context(tmp_path))
        callback = PrometheusCallback(tmp_path / "gone" / "run.prom")
        for _ in range(2):
            callback.on_log(*context(tmp_path), logs=LOGS)
        assert caplog.text.count("cannot be written any more") == 1

    def test_other_ranks_show_nothing(self, tmp_path):
        callback = PrometheusCallback(tmp_path / "run.prom", 0)
        callback.on_train_begin(*context(tmp_path, is_world_process_zero=False))
        callback.on_log(*context(tmp_path, is_world_process_zero=False), logs=LOGS)
        assert callback.port is None and not (tmp_path / "run.prom").exists()

    def test_totals_are_those_that_count_since_the_start(self):
        counted = {name for name, text in METRICS.items() if "since the start" in text}
        assert counted == TOTALS
