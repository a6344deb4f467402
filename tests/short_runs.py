"""Runs of three steps on three groups, the smallest that a trainer makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_llama
from transformers import TrainerCallback

from trl_atropos import AtroposConfig, AtroposTrainer


NUM_STEPS = 3


class EvaluatingEnvironment(TrainerCallback):
    """Writes what atroposlib's `evaluate_log` writes, before the steps that `values` names."""

    def __init__(self, directory: Path, values: dict[int, float]):
        self.directory = directory
        self.values = values

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.values:
            values = {"results": {"atropos|sums_eval|0": {}, "all": {"accuracy": self.values[state.global_step]}}}
            self.directory.mkdir(exist_ok=True)
            (self.directory / "metrics.json").write_text(json.dumps(values))


def make_run(
    tmp_path: Path,
    evaluations: dict[int, float] | None = None,
    peft_config: Any = None,
    tied: bool = False,
    **options: Any,
) -> AtroposTrainer:
    """Two rollouts a step, three steps, another group each; `evaluations` are those of the environment by step."""
    data_path = tmp_path / "data.jsonl"
    tokens = [[[5, 6, 7 + number, 8 + i] for i in range(2)] for number in range(NUM_STEPS)]
    groups = [
        {
            "tokens": rows,
            "masks": [[-100, -100, *row[2:]] for row in rows],
            "scores": [0.0, 1.0 + number],
            "inference_logprobs": [[1.0, 1.0, -3.0, -3.0]] * 2,
        }
        for number, rows in enumerate(tokens)
    ]
    data_path.write_text("".join(json.dumps(group) + "\n" for group in groups))
    if evaluations is not None:
        options = {"eval_strategy": "steps", "eval_steps": 1, "eval_log_dir": str(tmp_path / "evals"), **options}
    defaults = {
        "output_dir": str(tmp_path / "out"), "data_path": str(data_path), "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "max_length": 16, "report_to": "none", "use_cpu": True, "save_strategy": "no",
        "gradient_checkpointing": False, "report_html": False,
    }  # fmt: skip
    torch.manual_seed(0)
    trainer = AtroposTrainer(tiny_llama(tied=tied), AtroposConfig(**{**defaults, **options}), peft_config=peft_config)
    if evaluations is not None:
        trainer.add_callback(EvaluatingEnvironment(tmp_path / "evals", evaluations))
    return trainer


def train(tmp_path: Path, **options: Any) -> AtroposTrainer:
    trainer = make_run(tmp_path, **options)
    trainer.train()
    return trainer
