"""A walk through the RL loop, one optimizer step after another, on a CPU: rollouts, advantages, training, weight sync.

    python examples/atropos_example.py [--model_name_or_path DIR] [--num_steps 3]

Every part is the real one: the Atropos API, the environment examples/envs/capitals.py, `trl vllm-serve`, and AtroposTrainer.
`trl-atropos launch` starts them, runs this script again with their addresses, and ends all of them; Ctrl-C too. The first run
downloads a model of 135M parameters.

The environment does not stop while the trainer trains: from step 1 on a batch may have been sampled by the policy before, which the
column `stale` shows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILE = "examples/configs/atropos_example_launch.yaml"
SMOLLM2 = ".models/SmolLM2-135M-Instruct"
NUM_ROLLOUTS = 32  # of one step: 4 countries, 8 answers to each
RULE = "=" * 60


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def start_everything(args: argparse.Namespace) -> None:
    """Become `trl-atropos launch`."""
    command = str(Path(sys.executable).parent / "trl-atropos")
    model, run_dir = args.model_name_or_path, args.output_dir
    if model is None:
        say(f"The model: {SMOLLM2}")
        subprocess.run([command, "model", "fetch", "smollm2", "--output_dir", str(ROOT / SMOLLM2)], check=True)
    elif Path(model).is_dir():
        model = str(Path(model).resolve())
    options = {
        "--model_name_or_path": model,
        "--run_dir": None if run_dir is None else str(Path(run_dir).resolve()),
        "--trainer_args": f"--num_steps {args.num_steps}",
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    # The launch file names files relative to the repository.
    os.chdir(ROOT)
    os.execv(command, [command, "launch", "-c", LAUNCH_FILE, *given])


def train(args: argparse.Namespace) -> None:
    """Train, and say what happens in which order."""
    # Imported here: the other role of this script must not wait for them.
    import torch

    from trl_atropos import AtroposConfig, AtroposTrainer

    class ExampleTrainer(AtroposTrainer):
        """Each method is called once per step, in this order. `AtroposTrainer` does the same without the words."""

        def get_batch_samples(
            self, epoch_iterator: Iterator, num_batches: int, device: torch.device
        ) -> tuple[list, torch.Tensor]:
            step = self.state.global_step
            say("", RULE, f"RL TRAINING STEP {step}", RULE, f"ROLLOUT PHASE (Step {step})")
            say("   The environment samples from the server and scores; waiting for a batch of the API...")
            items, num_trained_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
            batches = [batch for item in items for batch in item]
            advantages = torch.cat([batch["advantages"] for batch in batches])
            say(f"   Received {sum(batch['num_rollouts'] for batch in batches)} rollouts", "")
            say(
                "COMPUTING ADVANTAGES", f"   Computed advantages shape: {advantages.shape}, one for each trained token"
            )
            say(f"   From {advantages.min():.2f} to {advantages.max():.2f}", "")
            return items, num_trained_tokens

        def training_step(self, model: torch.nn.Module, inputs: list, *rest: Any) -> torch.Tensor:
            say("TRAINING PHASE")
            loss = super().training_step(model, inputs, *rest)
            say(f"   Training loss: {loss.item():.4f}", "")
            return loss

        def publish_policy(self) -> None:
            # Before step 0 the server gets the starting policy, version 0.
            version = self.state.global_step
            model = self.accelerator.unwrap_model(self.model)
            say("ENTERING WEIGHT SYNC", f"   Syncing policy version {version} -> inference server...")
            with self.weight_sync(version) as sync:
                sync.push(model)
            report = sync.report
            say(f"   Updated {sum(1 for _ in model.parameters())} weight tensors, {report.num_bytes / 1e6:.0f} MB")
            say(f"   The server answers as version {self.policy_version}; it was paused for {report.paused_s:.2f} s")
            if report.probe is not None:
                say(f"   Logprobs of server and trainer differ by {report.probe.mean_abs_diff:.4f} on average")
            say("EXITING WEIGHT SYNC", "")

    trainer = ExampleTrainer(
        model=args.model_name_or_path,
        args=AtroposConfig(
            output_dir=args.output_dir,
            atropos_api_url=args.atropos_api_url,
            vllm_server_base_url=args.vllm_server_base_url,
            max_steps=args.num_steps,
            per_device_train_batch_size=NUM_ROLLOUTS,
            learning_rate=4e-5,
            max_length=128,
            loss_type="weighted_sft",
            # Fetch a batch when its step begins, not one ahead.
            num_prefetched_batches=0,
            refresh_interval=0.5,
            batch_timeout_s=120,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_state()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help="directory or hub id of a causal language model")
    parser.add_argument("--num_steps", type=int, default=3, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--output_dir", help="directory of the logs (default: that of the launch file)")
    parser.add_argument("--atropos_api_url", help="set by the launch; with it nothing is started")
    parser.add_argument("--vllm_server_base_url", help="set by the launch")
    args = parser.parse_args()
    if args.num_steps < 1:
        parser.error(f"--num_steps is {args.num_steps}; the walk needs 1 or more.")
    if args.atropos_api_url is None:
        start_everything(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
