"""Runs of AtroposSFTTrainer in every process that a launcher starts, with the Python that has verl: what test_verl.py looks at.

    torchrun --nproc_per_node 2 launched_trainer.py CASES OUTPUT

CASES is a JSON file: a list of runs with `name`, `overrides` of the configuration, and `action`, one of `ACTIONS`. Rank 0
leaves what the runs gave in the JSON file OUTPUT.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM

import trl_atropos
from trl_atropos.errors import NonFiniteGradientError
from trl_atropos.loss.losses import LossInputs, LossOutputs
from trl_atropos.verl.atropos_sft_trainer import AtroposSFTTrainer
from trl_atropos.verl.cpu import join_process_group


CONFIG_DIR = Path(trl_atropos.__file__).parent / "verl" / "config"


class WatchedTrainer(AtroposSFTTrainer):
    """Keeps the metrics of every step."""

    steps: list[dict[str, Any]]

    def end_step(self, metrics: dict[str, Any]) -> None:
        super().end_step(metrics)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self.steps = [*getattr(self, "steps", []), numbers]


def checksum(trainer: AtroposSFTTrainer) -> float:
    """A number that changes with any weight; a collective call."""
    pairs, _ = trainer.engine.get_per_tensor_param()
    return sum(tensor.double().abs().sum().item() for _, tensor in pairs)


def train(config: Any) -> dict[str, Any]:
    trainer = WatchedTrainer(config=config)
    trainer.fit()
    return {"steps": trainer.steps}


def seed_loss(config: Any) -> dict[str, Any]:
    """The seed's interface, beside the closed form on the logits of the same checkpoint."""
    trainer = WatchedTrainer(config=config)
    torch.manual_seed(1)
    input_ids = torch.randint(256, (3, 9))
    loss_mask = (torch.rand(3, 9) > 0.4).long()
    advantages = torch.randn(3, 9)
    loss = trainer.compute_advantage_weighted_sft_loss(input_ids=input_ids, advantages=advantages, loss_mask=loss_mask)
    loss.backward()
    squares = sum(
        parameter.grad.full_tensor().double().square().sum().item() for parameter in trainer.engine.module.parameters()
    )
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    logprobs = model(input_ids).logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    is_trained = loss_mask[:, 1:].bool()
    expected = -(advantages[:, 1:] * logprobs)[is_trained].sum() / is_trained.sum()
    expected.backward()
    expected_squares = sum(p.grad.double().square().sum().item() for p in model.parameters())
    return {
        "loss": [loss.item(), expected.item()],
        "grad_norm": [math.sqrt(squares), math.sqrt(expected_squares)],
    }


def infinite_loss(inputs: LossInputs) -> LossOutputs:
    """Infinite for the rollouts with a positive advantage; the gradient is finite."""
    return LossOutputs(torch.where(inputs.advantages > 0, math.inf, 0.0) + inputs.trainer_logprobs, {})


def diverge(config: Any) -> dict[str, Any]:
    trainer = WatchedTrainer(config=config, loss_fn=infinite_loss)
    before = checksum(trainer)
    error = None
    try:
        trainer.fit()
    except NonFiniteGradientError as exc:
        error = exc.what
    return {"error": error, "change": checksum(trainer) - before}


def resume(config: Any) -> dict[str, Any]:
    """Train to the end with a checkpoint after every step; then once more, from the first of them."""
    straight = WatchedTrainer(config=config)
    straight.fit()
    config.trainer.resume_mode = "resume_path"
    config.trainer.resume_from_path = str(Path(config.trainer.default_local_dir) / "global_step_1")
    resumed = WatchedTrainer(config=config)
    resumed.fit()
    return {"straight": straight.steps, "resumed": resumed.steps}


def publish(config: Any) -> dict[str, Any]:
    """Publish twice, changed weights the second time, to the servers of the configuration."""
    trainer = WatchedTrainer(config=config)
    with trainer.sharding_manager:
        versions = [trainer.policy_version]
    with torch.no_grad():
        for parameter in trainer.engine.module.parameters():
            parameter.mul_(1.25)
    with trainer.weight_sync(7) as sync:
        sync.push(trainer.engine.module)
    trainer._connection.close()
    report = sync.report
    return {
        "versions": [*versions, trainer.policy_version],
        "num_bytes": report.num_bytes,
        "probe": None if report.probe is None else report.probe.mean_abs_diff,
        "metrics": report.metrics(),
    }


ACTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "train": train,
    "seed_loss": seed_loss,
    "diverge": diverge,
    "resume": resume,
    "publish": publish,
}


def main(cases: Path, output: Path) -> None:
    torch.set_num_threads(1)
    join_process_group()
    results = {}
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        for case in json.loads(cases.read_text()):
            config = compose("atropos_sft_trainer", overrides=case["overrides"])
            results[case["name"]] = ACTIONS[case["action"]](config)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
