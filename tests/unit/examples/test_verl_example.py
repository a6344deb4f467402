"""The launch file of examples/verl starts verl's trainer with the keys of what is launched."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import yaml

from trl_atropos.cli.launch.command_lines import build_trainer_command
from trl_atropos.cli.launch.config import load_launch_config


ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "verl"


def test_the_flags_of_a_launch_become_keys_of_verl():
    config = load_launch_config(EXAMPLE / "launch.yaml", {"trainer_args": "trainer.total_training_steps=9"})
    script, python, *arguments = build_trainer_command(config, "http://api", "http://vllm")
    assert python == ".venv-verl/bin/python"
    # In the place of Python: what it would be started with.
    printed = subprocess.run([script, "echo", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = shlex.split(printed)
    assert words[words.index("-m", 1) :][-6:] == [
        "capitals",
        "trainer.total_training_steps=9",
        f"model.path={config.model_name_or_path}",
        "data.atropos.api_url=http://api",
        "+atropos.vllm_server_base_url=http://vllm",
        f"trainer.default_local_dir={config.trainer_output_dir}",
    ]
    assert words[words.index("--config-path") + 1] == str(EXAMPLE)


def test_the_configuration_is_added_to_those_of_verl_and_of_the_package():
    config = yaml.safe_load((EXAMPLE / "capitals.yaml").read_text())
    assert config["defaults"] == ["sft_trainer_engine", "atropos", "_self_"]
    assert config["hydra"]["searchpath"] == ["pkg://trl_atropos.verl.config", "pkg://verl.trainer.config"]
    # The environment's groups have eight rollouts, and a step has whole groups.
    assert config["data"]["train_batch_size"] % 8 == 0
