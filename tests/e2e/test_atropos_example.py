"""The walk through the RL loop says what happens in the order in which it happens, and leaves nothing running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from servers import ROOT, save_tiny_model
from transformers import AutoModelForCausalLM


COMMAND = (sys.executable, str(ROOT / "examples" / "atropos_example.py"))
TIMEOUT_S = 300.0
PHASES = ("RL TRAINING STEP", "ROLLOUT PHASE", "COMPUTING ADVANTAGES", "TRAINING PHASE", "ENTERING WEIGHT SYNC")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=True, seed=0)


@pytest.fixture
def output_dir(tmp_path: Path, model: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    commands = [str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(tmp_path) in command or str(model) in command]


def start(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_every_phase_of_every_step_is_shown_with_what_it_did(model, output_dir, tmp_path):
    # From another directory, with relative paths.
    walk = start(
        *("--model_name_or_path", os.path.relpath(model, tmp_path), "--num_steps", "2", "--output_dir", "run"),
        cwd=tmp_path,
    )
    shown, _ = walk.communicate(timeout=TIMEOUT_S)
    assert walk.returncode == 0, shown[-4000:]
    # Before the first step the server gets the starting policy.
    titles = [title for line in shown.splitlines() for title in PHASES if line.startswith(title)]
    assert titles == [PHASES[-1], *PHASES, *PHASES]
    assert re.findall(r"RL TRAINING STEP (\d)", shown) == ["0", "1"]
    assert re.findall(r"answers as version (\d)", shown) == ["0", "1", "2"]
    # Four groups of eight answers; an answer has at least one token and at most eight.
    assert re.findall(r"Received (\d+) rollouts", shown) == ["32", "32"]
    sizes = [int(size) for size in re.findall(r"advantages shape: torch\.Size\(\[(\d+)\]\)", shown)]
    assert len(sizes) == 2
    assert all(32 <= size <= 32 * 8 for size in sizes)
    # The server's copy is bfloat16: two bytes for each weight, of which the tied ones count once.
    weights = list(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).parameters())
    megabytes = f"{sum(2 * weight.numel() for weight in weights) / 1e6:.0f}"
    updated = re.findall(r"Updated (\d+) weight tensors, (\d+) MB", shown)
    assert updated == [(str(len(weights)), megabytes)] * 3
    history = json.loads((output_dir / "model" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "reward" in entry]
    assert all(entry["perf/weight_sync_s"] > 0 for entry in history if "reward" in entry)
    assert re.findall(r"Training loss: (\S+)", shown) == [f"{loss:.4f}" for loss in losses]


def test_ctrl_c_ends_every_process(model, output_dir, tmp_path):
    walk = start("--model_name_or_path", model, "--output_dir", output_dir, cwd=tmp_path)
    log = output_dir / "logs" / "vllm.log"
    deadline = time.monotonic() + TIMEOUT_S
    while not (log.is_file() and log.stat().st_size):
        assert walk.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    started = psutil.Process(walk.pid).children(recursive=True)
    assert {"api", "vllm-serve"} <= {word.rpartition("/")[2] for process in started for word in process.cmdline()}
    walk.send_signal(signal.SIGINT)
    shown, _ = walk.communicate(timeout=TIMEOUT_S)
    assert walk.returncode == 128 + signal.SIGINT, shown[-4000:]
    assert "all processes of the run have been ended" in shown
    assert [process for process in started if process.is_running()] == []


def test_a_number_of_steps_that_is_none_is_refused(tmp_path):
    walk = start("--num_steps", "0", cwd=tmp_path)
    shown, _ = walk.communicate(timeout=TIMEOUT_S)
    assert walk.returncode == 2
    assert "--num_steps is 0" in shown
