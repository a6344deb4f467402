"""When the policy is published, and what a step's line of the table says."""

from __future__ import annotations

import io

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_atropos.report.metric_help import METRICS
from trl_atropos.report.step_table import StepTableCallback
from trl_atropos.trainer.callbacks import StepCallback


LOGS = {
    "reward": 0.25,
    "reward_std": 0.5,
    "loss": -0.125,
    "staleness/mean": 1.0,
    "perf/batch_wait_s": 2.0,
    "perf/weight_sync_s": 0.5,
    "step_time": 3.25,
}


class TestStepCallback:
    @pytest.mark.parametrize(
        ("weight_sync_steps", "published_after"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (9, [0])]
    )
    def test_publishes_at_the_start_and_every_weight_sync_steps(
        self, tmp_path, weight_sync_steps: int, published_after: list[int]
    ):
        state, published = TrainerState(max_steps=5), []
        callback = StepCallback(lambda: None, lambda: published.append(state.global_step), weight_sync_steps)
        context = (TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
        callback.on_train_begin(*context)
        for state.global_step in range(1, 6):
            callback.on_step_end(*context)
        assert published == published_after

    def test_last_step_is_published_between_two_intervals(self, tmp_path):
        state, published = TrainerState(max_steps=3, global_step=3), []
        callback = StepCallback(lambda: None, lambda: published.append(state.global_step), 2)
        control = TrainerControl(should_training_stop=True)
        callback.on_step_end(TrainingArguments(output_dir=str(tmp_path)), state, control)
        assert published == [3]

    def test_the_publish_of_the_last_step_is_waited_for_before_it_is_marked(self, tmp_path):
        done: list[str] = []
        callback = StepCallback(
            lambda: done.append("mark"), lambda: done.append("publish"), 1, lambda: done.append("finish")
        )
        arguments = TrainingArguments(output_dir=str(tmp_path))
        callback.on_step_end(arguments, TrainerState(global_step=1), TrainerControl())
        callback.on_step_end(arguments, TrainerState(global_step=2), TrainerControl(should_training_stop=True))
        assert done == ["publish", "mark", "publish", "finish", "mark"]
        # Training that ends between two steps, for example with its data.
        callback.on_train_end(arguments, TrainerState(global_step=2), TrainerControl())
        assert done[5:] == ["finish"]

    def test_a_batch_is_marked_as_trained_after_the_publish_of_its_step_and_also_without_servers(self, tmp_path):
        done: list[str] = []
        context = (TrainingArguments(output_dir=str(tmp_path)), TrainerState(global_step=1), TrainerControl())
        StepCallback(lambda: done.append("mark"), lambda: done.append("publish")).on_step_end(*context)
        without_servers = StepCallback(lambda: done.append("mark"))
        without_servers.on_train_begin(*context)
        without_servers.on_step_end(*context)
        assert done == ["publish", "mark", "mark"]


class TestStepTableCallback:
    def lines(self, tmp_path, *logs: dict | None, is_main: bool = True) -> list[str]:
        stream = io.StringIO()
        state = TrainerState(max_steps=20, global_step=7, is_world_process_zero=is_main)
        context = (TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
        callback = StepTableCallback(stream)
        callback.on_train_begin(*context)
        for entry in logs:
            callback.on_log(*context, logs=entry)
        return stream.getvalue().splitlines()

    def test_header_stands_above_the_values(self, tmp_path):
        _, header, row = self.lines(tmp_path, LOGS)
        assert row.split() == ["7/20", "0.250", "0.500", "-0.1250", "1.00", "2.00", "0.50", "3.25"]
        assert len(header) == len(row)
        # Right-aligned: title and value end in the same column.
        ends = [header.index(title) + len(title) for title in ("step", "reward", "loss", "wait s", "step s")]
        assert ends == [row.index(cell) + len(cell) for cell in ("7/20", "0.250", "-0.1250", "2.00", "3.25")]

    def test_unknown_value_is_a_question_mark_and_no_0(self, tmp_path):
        logs = {name: value for name, value in LOGS.items() if name != "staleness/mean"}
        assert self.lines(tmp_path, logs)[-1].split()[4] == "?"

    @pytest.mark.parametrize("logs", [None, {}, {"train_runtime": 1.0}, {"eval_loss": 1.0}])
    def test_logs_without_a_training_loss_make_no_line(self, tmp_path, logs: dict | None):
        assert len(self.lines(tmp_path, logs)) == 2

    def test_other_ranks_write_nothing(self, tmp_path):
        assert self.lines(tmp_path, LOGS, is_main=False) == []

    def test_every_column_is_a_logged_metric(self):
        assert LOGS.keys() - METRICS.keys() == {"loss"}  # transformers logs the loss
