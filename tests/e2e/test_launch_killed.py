"""A real launch of which API, inference server, gateway and environment are killed: it makes its steps, and the server has the
last policy.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from servers import ROOT, add_chat_template, save_tiny_model


DEADLINE_S = 400.0
NUM_STEPS = 12
MAX_LENGTH = 256
COMMAND = [sys.executable, "-m", "trl_atropos.cli.main", "launch", "-c"]
# What is killed, by its name in the launch and by what its command line holds.
VICTIMS = {
    "api": "trl-atropos api",
    "vllm": "vllm.entrypoints",
    "gateway": "trl-atropos gateway",
    "calculator": "calculator.py",
}


def launch_file(directory: Path, model: Path) -> Path:
    trainer_options = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 8,
        "max_length": MAX_LENGTH,
        "dtype": "float32",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "refresh_interval": 0.1,
    }
    (directory / "trainer.yaml").write_text(yaml.safe_dump(trainer_options))
    content = {
        "model_name_or_path": str(model),
        "run_dir": str(directory / "run"),
        "environments": {"calculator": {"command": f"{sys.executable} tests/e2e/envs/calculator.py serve"}},
        "trainer_command": f"{sys.executable} examples/scripts/atropos.py --config {directory / 'trainer.yaml'}",
        "agents": {"capitals": {"command": f"{sys.executable} examples/agents/capitals_program.py"}},
        "gateway_args": {"group_size": 2},
        "vllm_args": {"max_model_len": MAX_LENGTH, "enforce_eager": True},
        "vllm_env": {"VLLM_CPU_KVCACHE_SPACE": 1, "VLLM_NO_USAGE_STATS": 1, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    }
    path = directory / "launch.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def pid_of(launch: psutil.Process, pattern: str) -> int:
    """The process of a part, whose own processes are left to its guard."""
    children = [child for guard in launch.children() for child in guard.children()]
    (pid,) = [child.pid for child in children if pattern in " ".join(child.cmdline())]
    return pid


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short name: sockets in the directories of pytest would have addresses that are too long."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def test_killed_parts_come_back_and_the_run_makes_its_steps(tmp_path: Path, temporary: Path) -> None:
    model = add_chat_template(save_tiny_model(tmp_path / "model", tied=True, seed=0))
    trainer_log = tmp_path / "run" / "logs" / "trainer.log"
    with (tmp_path / "launch.log").open("w") as log:
        launch = subprocess.Popen(
            [*COMMAND, str(launch_file(tmp_path, model))],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (trainer_log.exists() and f" 2/{NUM_STEPS} " in trainer_log.read_text()):
            assert time.monotonic() < deadline and launch.poll() is None, (tmp_path / "launch.log").read_text()
            time.sleep(0.05)
        for pid in [pid_of(psutil.Process(launch.pid), pattern) for pattern in VICTIMS.values()]:
            os.kill(pid, signal.SIGKILL)
        assert launch.wait(timeout=DEADLINE_S) == 0, (tmp_path / "launch.log").read_text()
    finally:
        launch.terminate()
        launch.wait()

    said = (tmp_path / "launch.log").read_text()
    for name in VICTIMS:
        assert re.search(
            rf"{name} +ended with exit code 137 and is started again in 1 s \(restart 1;", said
        )  # 128 + 9
        assert (tmp_path / "run" / "logs" / f"{name}.log").read_text().count("=== started again ===") >= 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The agent may have ended with its gateway.
    assert VICTIMS.keys() <= summary["num_restarts"].keys() <= {*VICTIMS, "capitals"}
    assert summary["num_steps"] == NUM_STEPS
    # Both lives of the server met at sockets.
    assert not [path for path in temporary.rglob("*") if path.is_socket()]
    # The second life of the server began with the starting checkpoint, whether the first ended in a publish or between two.
    assert summary["server_weight_version"] == summary["policy_version"] == NUM_STEPS
