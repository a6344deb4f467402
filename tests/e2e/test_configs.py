"""The ready configurations train: the script itself, two steps from recorded data, with a tiny model on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
import yaml
from resume_run import make_group
from servers import ROOT, save_tiny_model


CONFIGS = ROOT / "examples" / "configs"
NUM_GROUPS = 64
BATCH_SIZE = 8
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=False, seed=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rollouts.jsonl"
    path.write_text("".join(json.dumps(make_group(number)) + "\n" for number in range(NUM_GROUPS)))
    return path


def train(
    config: Path, model: Path, data: Path, output_dir: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "examples/scripts/atropos.py", "--config", str(config), "--model_name_or_path", str(model)),
        *("--data_path", str(data), "--output_dir", str(output_dir), "--max_steps", "2"),
        *("--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--report_to", "none"),
    ]
    return fork_server.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=TIMEOUT_S,
    )


def steps_of(output_dir: Path) -> list[dict]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize(("name", "saved"), [("full", "model.safetensors"), ("lora", "adapter_model.safetensors")])
def test_a_ready_configuration_trains(model, data, tmp_path, name, saved):
    batch = ("--per_device_train_batch_size", str(BATCH_SIZE))
    finished = train(CONFIGS / f"{name}.yaml", model, data, tmp_path, *batch)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert [entry["num_rollouts_trained"] for entry in steps_of(tmp_path)] == [BATCH_SIZE, 2 * BATCH_SIZE]
    assert (tmp_path / saved).is_file()


def test_the_seeds_file_trains(model, data, tmp_path):
    seed = yaml.safe_load((CONFIGS / "atropos_sft_trainer.yaml").read_text())
    # Its other way to get rollouts.
    seed["data"]["atropos"].update(api_url=None, data_path=str(data))
    (tmp_path / "seed.yaml").write_text(yaml.safe_dump(seed))
    finished = train(tmp_path / "seed.yaml", model, data, tmp_path / "out")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "use_advantage_weighting: True -> loss_type: 'weighted_sft'" in finished.stderr
    steps = steps_of(tmp_path / "out")
    assert [entry["num_rollouts_trained"] for entry in steps] == [32, 64]
    # `batch` normalisation of one micro-batch.
    assert all("advantages/clipped_frac_low" in entry for entry in steps)


def test_a_misspelled_option_ends_the_script_with_one_message(model, data, tmp_path):
    finished = train(CONFIGS / "full.yaml", model, data, tmp_path, "--max_stalenes_", "3")
    assert finished.returncode == 2
    assert "Did you mean `--max_staleness`?" in finished.stderr
    assert "Traceback" not in finished.stderr
