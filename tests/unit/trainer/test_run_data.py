"""The trainer on recorded rollouts: what a run leaves, what a resume continues, and what a new run does not touch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny_models import byte_tokenizer, tiny_llama
from transformers import ProcessorMixin, TrainerCallback

from trl_atropos import AtroposConfig, AtroposTrainer
from trl_atropos.errors import AtroposProtocolError, PreflightError
from trl_atropos.wire.journal import Journal


NUM_BATCHES = 6


class Interruption(Exception):
    """What ends a run in the middle."""


class Interrupt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Interruption


def group(number: int, **fields: Any) -> dict[str, Any]:
    tokens = [[5, 6, 7 + number, 8 + i] for i in range(2)]
    return {
        "tokens": tokens,
        "masks": [[-100, -100, *ids[2:]] for ids in tokens],
        "scores": [0.0, 1.0 + number],
        "inference_logprobs": [[1.0, 1.0, -3.0, -3.0]] * 2,
        **fields,
    }


@pytest.fixture
def data_path(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(group(i)) + "\n" for i in range(NUM_BATCHES)))
    return str(path)


def trainer(output_dir: Path, data_path: str | None, processing_class: Any = None, **options: Any) -> AtroposTrainer:
    torch.manual_seed(0)
    args = AtroposConfig(
        output_dir=str(output_dir),
        data_path=data_path,
        learning_rate=1e-2,
        max_length=16,
        report_to="none",
        use_cpu=True,
        **{"per_device_train_batch_size": 2, "save_steps": 2, "report_html": False, **options},
    )
    return AtroposTrainer(tiny_llama(), args, processing_class=processing_class)


def losses(trained: AtroposTrainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def weights(trained: AtroposTrainer) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in trained.model.parameters()]


def test_a_run_on_recorded_data_ends_with_the_data(tmp_path, data_path):
    run = trainer(tmp_path / "out", data_path)
    run.train()
    assert run.state.global_step == run.state.max_steps == NUM_BATCHES
    last = run.state.log_history[-2]
    assert (last["num_rollouts_trained"], last["num_rollouts_dropped"], last["policy_version"]) == (12, 0, 0)
    # Nothing was fetched, so nothing is journaled.
    assert not (tmp_path / "out" / "journal").exists()


@pytest.mark.parametrize(("options", "num_steps"), [({"max_steps": 3}, 3), ({"num_train_epochs": 2.5}, 15)])
def test_max_steps_and_epochs_limit_it(tmp_path, data_path, options, num_steps):
    run = trainer(tmp_path / "out", data_path, **options)
    run.train()
    assert len(losses(run)) == num_steps


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_an_interrupted_run_that_resumes_ends_as_the_straight_one(tmp_path, data_path, step):
    straight = trainer(tmp_path / "straight", data_path)
    straight.train()
    interrupted = trainer(tmp_path / "out", data_path)
    interrupted.add_callback(Interrupt(step))
    with pytest.raises(Interruption):
        interrupted.train()
    resumed = trainer(tmp_path / "out", data_path)
    resumed.train(resume_from_checkpoint=True)
    # Steps after the checkpoint that were trained before the interruption are trained again, from the checkpoint.
    assert losses(resumed) == losses(straight)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(straight), strict=True))
    names = ("num_rollouts_trained", "num_tokens")
    entries = [run.state.log_history[-2] for run in (resumed, straight)]
    assert entries[0]["step"] == entries[1]["step"] == NUM_BATCHES
    assert [entries[0][name] for name in names] == [entries[1][name] for name in names] == [12, 48]


class RequestCheckpoint(TrainerCallback):
    """Does what the handler of SIGTERM does, at one place of step 3; `trainer` is that of the run."""

    def __init__(self, event: str):
        setattr(self, event, self.request)

    def request(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.manager.is_checkpoint_requested = True


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_log"])
def test_a_checkpoint_that_a_signal_asks_for_loses_no_batch_and_trains_none_twice(tmp_path, data_path, event):
    options = {"enable_jit_checkpoint": True, "save_strategy": "no"}
    straight = trainer(tmp_path / "straight", data_path, **options)
    straight.train()
    stopped = trainer(tmp_path / "out", data_path, **options)
    request = RequestCheckpoint(event)
    request.manager = next(c for c in stopped.callback_handler.callbacks if hasattr(c, "jit_manager")).jit_manager
    # Before and after the callback that saves: a signal comes at any time.
    stopped.callback_handler.callbacks.insert(0, request)
    stopped.train()
    assert stopped.state.global_step < NUM_BATCHES

    resumed = trainer(tmp_path / "out", data_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(straight), strict=True))
    assert resumed.state.log_history[-2]["num_rollouts_trained"] == 2 * NUM_BATCHES


@pytest.mark.parametrize("before_and_after", [(2, 4), (4, 2), (2, 6), (6, 2)])
def test_a_resume_with_another_batch_size_trains_every_group_once(tmp_path, data_path, before_and_after):
    trained: list[tuple[int, ...]] = []

    def run(batch_size: int, **options: Any) -> AtroposTrainer:
        run = trainer(
            tmp_path / "out", data_path, per_device_train_batch_size=batch_size, save_steps=1, beta=0.0, **options
        )
        get_batch_samples = run.get_batch_samples

        def record(*args: Any) -> Any:
            samples = get_batch_samples(*args)
            trained.extend(tuple(group.rollouts[0].input_ids.tolist()) for group in run._data.stream.step_groups)
            return samples

        run.get_batch_samples = record
        return run

    before, after = before_and_after
    run(before, max_steps=1).train()
    resumed = run(after)
    resumed.train(resume_from_checkpoint=True)
    assert trained == [tuple(group(number)["tokens"][0]) for number in range(NUM_BATCHES)]
    assert resumed.state.log_history[-2]["num_rollouts_trained"] == 2 * NUM_BATCHES
    num_left = 2 * NUM_BATCHES - before
    assert resumed.state.global_step == 1 + -(-num_left // after)


def test_a_run_that_was_killed_after_its_last_step_makes_no_other(tmp_path, data_path):
    finished = trainer(tmp_path / "out", data_path, max_steps=4)
    finished.train()
    resumed = trainer(tmp_path / "out", data_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert all(torch.equal(*pair) for pair in zip(weights(finished), weights(resumed), strict=True))


def test_the_state_of_the_data_is_in_the_checkpoint(tmp_path, data_path):
    trainer(tmp_path / "out", data_path).train()
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["AtroposTrainer"] == {
        "next_batch": 0,
        "next_group": 4,
        "global_step": 4,
        "has_optimizer": True,
        "policy_version": 0,
        "num_tokens": 32,
        "num_rollouts_trained": 8,
        "num_rollouts_dropped": 0,
        "num_quarantined": 0,
        "rejected_fractions": [0.0] * 4,
    }


def test_a_resume_without_optimizer_is_refused_unless_it_is_asked_for(tmp_path, data_path, caplog):
    options = {"save_only_model": True, "lr_scheduler_type": "linear", "warmup_steps": 4}
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path / "out", data_path, max_steps=2, **options).train()
    assert "save_only_model: a run that resumes" in caplog.text
    with pytest.raises(PreflightError, match=r"checkpoint-2 holds the model alone\.") as caught:
        trainer(tmp_path / "out", data_path, **options).train(resume_from_checkpoint=True)
    assert "--resume_without_optimizer" in caught.value.fix

    resumed = trainer(tmp_path / "out", data_path, resume_without_optimizer=True, **options)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == NUM_BATCHES
    assert "resume_without_optimizer: " in caplog.text


def test_refused_groups_are_quarantined_and_the_rest_is_trained(tmp_path):
    path = tmp_path / "data.jsonl"
    bad = group(1, scores=[None, 1.0])
    path.write_text("".join(json.dumps(g) + "\n" for g in (group(0), bad, group(2))))
    run = trainer(tmp_path / "out", str(path))
    run.train()
    # The batch of the bad group makes no step; it is the second group of the first pass.
    assert len(losses(run)) == 2
    (entry,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert (entry["batch"], entry["group"], entry["raw"]) == (0, 1, bad)


def test_too_many_refused_groups_end_the_run(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(g) + "\n" for g in (group(0), group(1, scores=[None, 1.0]))))
    with pytest.raises(AtroposProtocolError, match=r"Refused groups make 5\.0% of the last 20 batches"):
        trainer(tmp_path / "out", str(path), max_dropped_fraction=0.0).train()


def test_a_new_run_moves_the_journal_of_an_earlier_one_aside(tmp_path, data_path, caplog):
    for first_id in (1, 2):
        Journal(tmp_path / "out" / "journal").append([{"tokens": [[first_id]]}])
        with caplog.at_level(logging.WARNING):
            trainer(tmp_path / "out", data_path, max_steps=1).train()
    assert "is now journal-2" in caplog.text
    kept = [next(Journal(tmp_path / "out" / f"journal-{n}").batches()).raw_groups for n in (1, 2)]
    assert kept == [[{"tokens": [[1]]}], [{"tokens": [[2]]}]]


def test_without_a_source_the_error_names_both_options(tmp_path):
    with pytest.raises(PreflightError, match="Neither atropos_api_url nor data_path is given") as caught:
        trainer(tmp_path / "out", None).train()
    assert "--atropos_api_url" in caught.value.fix
    assert "--data_path" in caught.value.fix


def test_what_environments_evaluate_is_logged_at_the_steps_that_were_asked_for(tmp_path, data_path):
    class EvaluatingEnvironment(TrainerCallback):
        """Writes what atroposlib's `evaluate_log` writes, before each step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            values = {"results": {"atropos|capitals_eval|0": {}, "all": {"eval/accuracy": state.global_step / 10}}}
            (tmp_path / "evals").mkdir(exist_ok=True)
            (tmp_path / "evals" / "metrics.json").write_text(json.dumps(values))

    run = trainer(
        tmp_path / "out", data_path, eval_strategy="steps", eval_steps=2, eval_log_dir=str(tmp_path / "evals")
    )
    run.add_callback(EvaluatingEnvironment())
    run.train()
    found = [
        (entry["step"], value)
        for entry in run.state.log_history
        for name, value in entry.items()
        if name.startswith("eval_") and name.endswith("/accuracy")
    ]
    # At step 2, what was written before the second step: 1 / 10.
    assert found == [(2, 0.1), (4, 0.3), (6, 0.5)]


class TextProcessor(ProcessorMixin):
    """What `AutoProcessor` gives for a model that also sees."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)


def test_a_processor_stands_for_its_tokenizer(tmp_path, data_path):
    options = {"log_completions": True, "mask_truncated_completions": True, "max_steps": 1}
    run = trainer(tmp_path / "out", data_path, processing_class=TextProcessor(byte_tokenizer()), **options)
    run.train()
    assert list((tmp_path / "out" / "completions").iterdir())
    assert isinstance(run.processing_class, TextProcessor)


def test_completions_of_a_step_are_written_when_it_is_logged(tmp_path, data_path):
    run = trainer(tmp_path / "out", data_path, log_completions=True, max_steps=2, processing_class=byte_tokenizer())
    run.train()
    tables = sorted((tmp_path / "out" / "completions").iterdir())
    assert [path.name for path in tables] == ["completions_00001.parquet", "completions_00002.parquet"]
    # The second group: rewards 0 and 2, tokens 5, 6 | 8, 8 and 5, 6 | 8, 9.
    table = pd.read_parquet(tables[1])
    assert sorted(table["reward"]) == [0.0, 2.0]
    assert set(table["environment"]) == {"env_unknown"}
