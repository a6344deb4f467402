"""`trl-atropos launch` with `server: sglang`: a real server, the real API, an environment, an agent behind a gateway, the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from servers import ROOT
from sglang_server import ARGUMENTS, ENVIRONMENT, SGLangServer, write_interpreter

from trl_atropos.cli.main import main
from trl_atropos.wire.journal import Journal


MAX_STEPS = 3
TRAINER = (
    f"{sys.executable} examples/scripts/atropos.py --use_cpu true --bf16 false --gradient_checkpointing false "
    f"--dtype float32 --max_steps {MAX_STEPS} --per_device_train_batch_size 16 --max_length 240 --logging_steps 1 "
    "--save_strategy no --report_to none --learning_rate 1e-4"
)


@pytest.fixture
def content(sglang: SGLangServer, tmp_path: Path) -> dict[str, Any]:
    """A launch file."""
    return {
        "model_name_or_path": str(sglang.model_dir),
        "run_dir": str(tmp_path / "run"),
        "server": "sglang",
        "sglang_python": str(write_interpreter(tmp_path / "python")),
        "sglang_args": ARGUMENTS,
        "sglang_env": ENVIRONMENT,
        "environments": {
            "capitals": {"command": f"{sys.executable} -m trl_atropos.cli.main env examples/envs/capitals.py serve"}
        },
        "agents": {"agent": {"command": f"{sys.executable} examples/agents/capitals_program.py"}},
        "gateway_args": {"group_size": 8},
        "trainer_command": TRAINER,
        "prompts": ["Country: Japan\nCapital:"],
        "completion_args": {"max_tokens": 4},
    }


def test_launch_trains_on_environments_and_agents(content: dict[str, Any], tmp_path: Path) -> None:
    path, run_dir = tmp_path / "launch.yaml", Path(content["run_dir"])
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "trl_atropos.cli.main", "launch", "-c", str(path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["num_steps"], summary["num_rollouts_trained"]) == (MAX_STEPS, MAX_STEPS * 16)
    assert summary["server_weight_version"] == summary["policy_version"] == MAX_STEPS
    assert summary["gateway"]["num_groups_sent"] > 0 and summary["gateway"]["spliced_share"] == 1.0
    steps = [
        entry
        for entry in json.loads((run_dir / "model" / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert [entry["staleness/unknown_frac"] for entry in steps] == [0.0] * MAX_STEPS
    assert steps[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.05)
    groups = [group for batch in Journal(run_dir / "model" / "journal").batches() for group in batch.raw_groups]
    assert {len(group["tokens"]) for group in groups} == {8}
    # The agents may be so quick that none of its groups is trained; test_sglang_rollouts.py trains an environment's.
    assert "Registered as environment 0" in (run_dir / "logs" / "capitals.log").read_text()
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info["cmdline"])]
    assert left == []


def test_preflight_knows_a_server_that_is_to_be_started_and_one_that_runs(
    content: dict[str, Any],
    sglang: SGLangServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "launch.yaml"

    def levels() -> dict[str, str]:
        path.write_text(yaml.safe_dump(content))
        assert main(["preflight", "-c", str(path), "--json"]) == 0
        return {finding["name"]: finding["level"] for finding in json.loads(capsys.readouterr().out)}

    before = levels()
    assert (before["sglang_version"], before["weight_transfer_backend"]) == ("ok", "ok")
    for name in ("server", "sglang_python", "sglang_args", "sglang_env"):
        del content[name]
    content["vllm_url"] = sglang.url
    running = levels()
    assert (running["gateway_token_routes"], running["weight_transfer_backend"]) == ("ok", "ok")
    assert before["policy_versions"] == running["policy_versions"] == "ok"
