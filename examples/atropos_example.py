"""One reinforcement-learning step after another, told phase by phase, with the real parts behind each line.

    python examples/atropos_example.py [--num_steps 3] [--model_name_or_path DIR_OR_HUB_ID]

Starts the Atropos API, a vLLM server, the environment examples/envs/capitals.py and this file again as the trainer, all on this
machine, and ends them with it. Needs no GPU and, after `make quickstart` has fetched the small model, no network.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from trl_atropos import AtroposConfig, AtroposParser, AtroposTrainer
from trl_atropos.cli.launch import run_launch
from trl_atropos.cli.launch_config import load_launch_config
from trl_atropos.cli.model import SMOLLM2_DIR, fetch_smollm2
from trl_atropos.watching.step_table import StepTableCallback
from trl_atropos.weight_sync.source import PolicyWeights


CONFIGS = Path(__file__).parent / "configs"
RULE = "=" * 60


class WalkThroughTrainer(AtroposTrainer):
    """[`AtroposTrainer`] that says what it does. Nothing is computed in another way."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Its lines would stand between ours.
        self.pop_callback(StepTableCallback)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        say(f"\n{RULE}\nRL TRAINING STEP {self.state.global_step}\n{RULE}")
        say(f"ROLLOUT PHASE (Step {self.state.global_step})")
        say(f"   The environment generates with policy version {self.policy_version}, scores, and posts to the API...")
        items, num_trained_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        micro_batches = [batch for item in items for batch in item]
        num_rollouts = sum(batch["num_rollouts"] for batch in micro_batches)
        say(f"   Received {num_rollouts} rollouts, {int(num_trained_tokens)} tokens to train\n")
        say("COMPUTING ADVANTAGES")
        for batch in micro_batches:
            advantages = batch["advantages"]
            say(f"   Computed advantages shape: {advantages.shape}, {advantages.min():.2f} to {advantages.max():.2f}")
        return items, num_trained_tokens

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        say("TRAINING PHASE")
        loss = super().training_step(*args, **kwargs)
        say(f"   Training loss: {loss.item():.4f}")
        return loss

    def publish_policy(self) -> None:
        say("\nENTERING WEIGHT SYNC\n   Syncing training weights -> inference server...")
        super().publish_policy()
        tensors = PolicyWeights(self.model, self.model.dtype).manifest()
        say(f"   Updated {len(tensors)} weight tensors; the server has proven policy version {self.policy_version}")
        say("EXITING WEIGHT SYNC")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:
            entry = self.state.log_history[-1]
            say(f"   Mean reward: {entry['reward']:.3f}; {entry['perf/weight_sync_s']:.2f} s for the weight sync")


def say(line: str) -> None:
    print(line, flush=True)


def train(training_args: AtroposConfig, model_args: ModelConfig) -> None:
    """What the trainer's process does."""
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    trainer = WalkThroughTrainer(model=model, args=training_args, processing_class=tokenizer)
    trainer.train()
    trainer.save_state()


def launch() -> None:
    """Start everything; this file again as the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=3, help="optimizer steps (default: %(default)s)")
    parser.add_argument(
        "--model_name_or_path", help="hub id or directory (default: SmolLM2-135M-Instruct, fetched once)"
    )
    parser.add_argument("--run_dir", default="runs/example", help="logs and report (default: %(default)s)")
    args = parser.parse_args()
    trainer = [
        sys.executable,
        __file__,
        "--config",
        str(CONFIGS / "quickstart.yaml"),
        "--max_steps",
        str(args.num_steps),
    ]
    # The loss and the advantages of the walk: advantage-weighted cross entropy.
    options = ["--loss_type", "weighted_sft", "--advantage_normalization", "global", "--advantage_clipping", "-5", "5"]
    overrides = {
        "trainer_command": shlex.join([*trainer, *options]),
        "model_name_or_path": args.model_name_or_path or str(fetch_smollm2(SMOLLM2_DIR)),
        "run_dir": args.run_dir,
    }
    run_launch(load_launch_config(CONFIGS / "quickstart_launch.yaml", overrides))


if __name__ == "__main__":
    if "--atropos_api_url" in sys.argv:
        train(*AtroposParser((AtroposConfig, ModelConfig)).parse_args_and_config())
    else:
        launch()
