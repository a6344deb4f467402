"""Every option of `TrainingArguments`: it acts, or says why it cannot."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from short_runs import NUM_STEPS, make_run, train
from transformers import EarlyStoppingCallback, TrainingArguments

from trl_atropos import AtroposConfig, AtroposTrainer
from trl_atropos.trainer.training_arguments import HARMLESS, RESTRICTED, SUPPORTED


TESTS = Path(__file__).parents[2]
DEFAULTS = {field.name: field for field in dataclasses.fields(TrainingArguments)}

SHOWN_IN = {
    "invariant/test_launched_training.py": ["parallelism_config"],
    "invariant/launched_step.py": ["ddp_backend", "deepspeed"],
    "invariant/launched_gather.py": ["fsdp"],
    "invariant/test_compiled_training.py": ["torch_compile", "torch_compile_backend"],
    "invariant/test_split_invariance.py": ["gradient_accumulation_steps", "gradient_checkpointing"],
    "unit/trainer/test_run_data.py": [
        "output_dir", "per_device_train_batch_size", "max_steps", "num_train_epochs", "resume_from_checkpoint",
        "enable_jit_checkpoint", "save_steps", "eval_steps", "use_cpu",
    ],
    "unit/report/test_trackers.py": [
        "report_to", "project", "trackio_space_id", "trackio_static_space_id",
    ],
    "unit/report/test_report.py": ["run_name"],
    "unit/report/test_hub.py": [
        "push_to_hub", "hub_token", "hub_model_id", "hub_strategy", "hub_always_push", "save_total_limit",
    ],
    "unit/report/test_watching.py": ["disable_tqdm"],
}  # fmt: skip
"""The test file that shows what the options do, if it is not this one."""

HANDED_ON = {
    "fp16": "needs a GPU", "tf32": "needs a GPU", "torch_empty_cache_steps": "needs a GPU",
    "ddp_bucket_cap_mb": "needs several ranks", "ddp_broadcast_buffers": "needs several ranks",
    "ddp_static_graph": "needs several ranks", "ddp_timeout": "needs several ranks", "ddp_find_unused_parameters": "needs several ranks",
    "fsdp_config": "needs several ranks", "log_level_replica": "needs several ranks",
    "log_on_each_node": "needs several machines", "save_on_each_node": "needs several machines",
    "hub_private_repo": "read by huggingface_hub", "hub_revision": "read by huggingface_hub",
    "trackio_bucket_id": "read by trackio",
    "torch_compile_mode": "read by torch.compile",
    "optim_target_modules": "read by optimizers that are packages of their own",
    "restore_callback_states_from_checkpoint": "concerns callbacks that the user brings",
}  # fmt: skip
"""Options that transformers reads and this suite does not run, and why."""


def steps_with(trainer: AtroposTrainer, name: str) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


def checkpoints(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))


# What moves the weights

MOVES = {
    "learning_rate": ({}, 2e-2),
    "lr_scheduler_type": ({}, "linear"),
    "lr_scheduler_kwargs": ({"lr_scheduler_type": "polynomial"}, {"power": 3.0}),
    "warmup_steps": ({"lr_scheduler_type": "constant_with_warmup"}, 2),
    "max_grad_norm": ({"optim": "sgd"}, 1e-3),
    "weight_decay": ({}, 0.5),
    "optim": ({}, "sgd"),
    "optim_args": ({"optim": "sgd"}, "momentum=0.9"),
    "adam_beta1": ({}, 0.5),
    "adam_beta2": ({}, 0.5),
    "adam_epsilon": ({}, 1.0),
    "bf16": ({}, True),
}


def trained_weights(tmp_path: Path, **options: Any) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in train(tmp_path, **options).model.parameters()]


@pytest.fixture(scope="module")
def base_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[torch.Tensor]]:
    """Weights after a run with these options, which two runs agreed on."""
    known: dict[str, list[torch.Tensor]] = {}

    def weights_after(**options: Any) -> list[torch.Tensor]:
        key = repr(options)
        if key not in known:
            first, again = (trained_weights(tmp_path_factory.mktemp("base"), **options) for _ in range(2))
            assert all(map(torch.equal, first, again))
            known[key] = first
        return known[key]

    return weights_after


@pytest.mark.parametrize("name", MOVES)
def test_it_changes_where_the_weights_go(tmp_path, base_weights, name):
    base, value = MOVES[name]
    assert not all(map(torch.equal, base_weights(**base), trained_weights(tmp_path, **{**base, name: value})))


def test_the_seed_is_that_of_a_fresh_adapter(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    weights = [
        make_run(tmp_path, peft_config=config, seed=seed).model.state_dict()[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
        ]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# What is seen from outside


def test_the_first_step_is_logged_if_asked_for(tmp_path):
    assert steps_with(train(tmp_path, logging_steps=2), "loss") == [2]
    assert steps_with(train(tmp_path, logging_steps=2, logging_first_step=True), "loss") == [1, 2]


def test_logging_can_be_switched_off(tmp_path):
    assert steps_with(train(tmp_path, logging_strategy="no"), "loss") == []


def test_reentrant_checkpointing_is_chosen_by_its_kwargs(tmp_path):
    modes = []
    for use_reentrant in (True, False):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        modes.append(train(tmp_path, **options).model.model.layers[0]._gradient_checkpointing_func.keywords)
    assert modes == [{"use_reentrant": True}, {"use_reentrant": False}]


def test_full_determinism_makes_torch_refuse_what_is_not(tmp_path):
    try:
        train(tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_memory_of_a_run_is_measured_if_asked_for(tmp_path):
    assert "train_mem_cpu_alloc_delta" in make_run(tmp_path, skip_memory_metrics=False).train().metrics


def test_the_log_level_is_that_of_transformers(tmp_path):
    before = transformers.logging.get_verbosity()
    try:
        make_run(tmp_path, log_level="error")
        assert transformers.logging.get_verbosity() == logging.ERROR
    finally:
        transformers.logging.set_verbosity(before)


def test_a_checkpoint_may_be_of_the_model_alone(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").exists()


# Evaluations, which environments make when they please


def test_evaluations_begin_and_are_delayed_as_asked_for(tmp_path):
    evaluations = {step: float(step) for step in range(NUM_STEPS)}
    name = "eval_sums/accuracy"
    assert steps_with(train(tmp_path, evaluations=evaluations, eval_delay=2), name) == [2, 3]
    trainer = make_run(tmp_path, evaluations=evaluations, eval_on_start=True)
    seen: list[int] = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda **kwargs: seen.append(trainer.state.global_step) or evaluate(**kwargs)
    trainer.train()
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("evaluations", "greater_is_better", "best"),
    [
        ({0: 0.1, 1: 0.9, 2: 0.5}, True, 2),
        ({0: 0.1, 1: 0.9}, True, 2),
        ({0: 0.1, 2: 0.9}, False, 1),
        ({2: 0.5}, True, 3),
    ],
    ids=["each step", "none at the last step", "less is better", "none before the last step"],
)
def test_the_best_checkpoint_is_that_of_the_last_known_evaluation(tmp_path, evaluations, greater_is_better, best):
    trainer = train(
        tmp_path, evaluations=evaluations, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="sums/accuracy", greater_is_better=greater_is_better,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{best}")


def test_a_metric_that_no_evaluation_has_ends_no_run_and_is_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = train(
            tmp_path, evaluations={0: 0.5}, save_strategy="best", metric_for_best_model="sums/acuracy",
        )  # fmt: skip
    assert trainer.state.global_step == NUM_STEPS and checkpoints(tmp_path) == []
    assert "metric_for_best_model is sums/acuracy" in caplog.text and "eval_sums/accuracy" in caplog.text


def test_early_stopping_counts_evaluations_and_not_steps_without_one(tmp_path):
    def run(evaluations: dict[int, float]) -> int:
        trainer = make_run(
            tmp_path, evaluations=evaluations, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
            metric_for_best_model="sums/accuracy",
        )  # fmt: skip
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
        trainer.train()
        return trainer.state.global_step

    assert run({0: 0.5, 1: 0.4}) == 2
    assert run({0: 0.5}) == NUM_STEPS


def test_a_schedule_that_steps_with_a_metric_needs_one_at_every_evaluation(tmp_path):
    with pytest.raises(ValueError, match="lr_scheduler_type is reduce_lr_on_plateau and eval_path is None"):
        make_run(tmp_path, evaluations={}, lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="a/b")


# The tables


HERE = {"gradient_checkpointing_kwargs", "logging_steps", "logging_first_step", "full_determinism", "skip_memory_metrics",
        "log_level", "save_only_model", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model",
        "greater_is_better", "seed", *MOVES}  # fmt: skip


def test_every_option_of_the_installed_transformers_is_in_one_table():
    tables = (SUPPORTED, HARMLESS.keys(), RESTRICTED.keys(), {"accelerator_config"})
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set().union(*tables) == DEFAULTS.keys()


def test_what_acts_is_shown_by_a_test_or_said_not_to_be():
    shown = {name for names in SHOWN_IN.values() for name in names}
    assert shown | HERE | HANDED_ON.keys() == SUPPORTED
    assert not HANDED_ON.keys() & (shown | HERE)
    for path, names in SHOWN_IN.items():
        text = (TESTS / path).read_text()
        assert [name for name in names if name not in text] == [], path


OTHERS: dict[str, Callable[[Any], Any]] = {
    "logging_strategy": lambda accepted: "epoch", "save_strategy": lambda accepted: "epoch",
    "eval_strategy": lambda accepted: "epoch", "include_num_input_tokens_seen": lambda accepted: "all",
    "train_sampling_strategy": lambda accepted: "group_by_length", "length_column_name": lambda accepted: "size",
    "debug": lambda accepted: "underflow_overflow", "label_names": lambda accepted: ["answer"], "include_for_metrics": lambda accepted: ["loss"],
    "dataloader_multiprocessing_context": lambda accepted: "spawn", "liger_kernel_config": lambda accepted: {"rope": True},
}  # fmt: skip
"""What is not accepted of an option, where that is no other number or truth value."""


def other(name: str) -> Any:
    accepted = RESTRICTED[name].accepted[0]
    if name in OTHERS:
        return OTHERS[name](accepted)
    return not accepted if isinstance(accepted, bool) else (accepted or 0) + 1


@pytest.mark.parametrize("name", RESTRICTED)
def test_what_cannot_act_is_refused_by_name_with_the_reason(name):
    # Workers are needed for what concerns workers, and transformers checks that first.
    needs_workers = name in ("dataloader_prefetch_factor", "dataloader_persistent_workers")
    options = {"dataloader_num_workers": 1} if needs_workers else {}
    if name == "eval_strategy":
        options = {"eval_path": "prompts.jsonl"}
    with pytest.raises(ValueError) as caught:
        AtroposConfig(output_dir="out", use_cpu=True, report_to="none", **options, **{name: other(name)})
    assert str(caught.value).startswith(f"{name} is ") or needs_workers
    assert RESTRICTED[name].why in str(caught.value)


@pytest.mark.parametrize("name", RESTRICTED)
def test_what_describes_this_trainer_is_accepted(name):
    for value in RESTRICTED[name].accepted:
        options = {"eval_path": "prompts.jsonl"} if (name, value) == ("eval_strategy", "steps") else {}
        options |= {"metric_for_best_model": "loss"} if value == "best" else {}
        AtroposConfig(output_dir="out", use_cpu=True, report_to="none", **options, **{name: value})


def test_keys_of_the_accelerator_that_deal_a_dataset_are_refused():
    def config(**accelerator_config: Any) -> AtroposConfig:
        return AtroposConfig(output_dir="out", use_cpu=True, report_to="none", accelerator_config=accelerator_config)

    with pytest.raises(ValueError, match="accelerator_config sets dispatch_batches, even_batches:"):
        config(dispatch_batches=True, even_batches=False)
    assert config().accelerator_config.even_batches


def test_an_option_that_nobody_has_looked_at_is_refused_if_it_is_used(monkeypatch):
    monkeypatch.setattr("trl_atropos.trainer.training_arguments.SUPPORTED", SUPPORTED - {"adam_beta1"})
    AtroposConfig(output_dir="out", use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"adam_beta1 is 0\.5: this option came with transformers"):
        AtroposConfig(output_dir="out", use_cpu=True, report_to="none", adam_beta1=0.5)
