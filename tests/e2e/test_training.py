"""The whole loop with real parts: API, environment, `trl vllm-serve`, a 135M model; and the two commands around it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from live_api import ApiProcess
from peft import LoraConfig
from servers import ROOT, config, running, serve
from shared_segments import left_since, segments
from summary_keys import SUMMARY_KEYS
from transformers import AutoModelForCausalLM

from trl_atropos import AtroposTrainer
from trl_atropos.cli.model import fetch_smollm2
from trl_atropos.errors import AtroposDataTimeout, PreflightError
from trl_atropos.report.metric_help import ENVIRONMENT_METRICS, METRICS
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.wire.journal import Journal


TRANSFORMERS_METRICS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return fetch_smollm2(ROOT / ".models" / "SmolLM2-135M-Instruct")


def digest(parameters: Iterator[tuple[str, torch.nn.Parameter]]) -> str:
    state = hashlib.sha256()
    for name, parameter in parameters:
        state.update(name.encode() + parameter.detach().numpy().tobytes())
    return state.hexdigest()


LORA_SERVER = (
    *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
    *("--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


@pytest.mark.parametrize(
    ("mode", "flags", "in_background"), [("auto", (), True), ("adapter", LORA_SERVER, False)], ids=["auto", "adapter"]
)
def test_lora_training_moves_the_server_and_leaves_the_base_bit_identical(
    smollm2: Path, tmp_path: Path, mode: str, flags: tuple[str, ...], in_background: bool
) -> None:
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if mode == "adapter" else {}
    log_path = tmp_path / "vllm.log"
    with (
        serve(smollm2, "--enforce_eager", "True", *flags, log_path=log_path, environment=environment) as vllm_url,
        ApiProcess(tmp_path / "api.log") as api,
    ):
        environment_command = [
            *(sys.executable, "examples/envs/capitals.py", "serve"),
            *("--env.rollout_server_url", api.url, "--env.tokenizer_name", str(smollm2)),
            *("--openai.base_url", f"{vllm_url}/v1", "--openai.model_name", str(smollm2)),
            *("--openai.tokenizer_name", str(smollm2), "--env.total_steps", "1000"),
        ]
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        base = list(model.named_parameters())
        before = digest(iter(base))
        args = config(
            tmp_path / "out",
            api.url,
            vllm_url,
            max_steps=3,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            advantage_normalization="global",
            advantage_clipping=[-5.0, 5.0],
            weight_sync_mode=mode,
            weight_sync_background=in_background,
            logprob_probe_interval=2,
        )
        trainer = AtroposTrainer(model, args, peft_config=LoraConfig(target_modules="all-linear", lora_alpha=256))
        with running(*environment_command, log_path=tmp_path / "env.log"):
            trainer.train()
        client = AtroposVLLMClient(vllm_url)
        assert client.get_weight_version() == "3" == str(trainer.policy_version)
        assert not client.is_paused()

    assert digest(iter(base)) == before
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["policy_version"] for entry in steps] == [1, 2, 3]
    assert steps[-1]["num_rollouts_trained"] == 96
    assert steps[-1]["staleness/unknown_frac"] == 0.0
    assert steps[0]["staleness/mean"] == 0.0
    # The publish before the first step, which no step logs, and then every second one. In the background, a step logs
    # the publish before, and the last its own, too.
    is_probed = [False, False, True] if in_background else [False, True, False]
    assert ["logprob_probe/mean_abs_diff" in entry for entry in steps] == is_probed
    assert steps[is_probed.index(True)]["logprob_probe/mean_abs_diff"] < 0.2
    reported = steps[1:] if in_background else steps
    assert [entry["perf/weight_sync_paused_s"] > 0 for entry in reported] == [mode != "adapter"] * len(reported)
    assert all(entry["perf/weight_sync_blocked_s"] > 0 for entry in steps)
    # On policy, the ratio only shows the rounding of the server's dtype.
    assert steps[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.05)
    of_environment = {f"env/env_0/{name}" for name in ENVIRONMENT_METRICS}
    undocumented = {name for entry in steps for name in entry} - set(METRICS) - of_environment - TRANSFORMERS_METRICS
    assert not undocumented
    batches = list(Journal(tmp_path / "out" / "journal").batches())
    assert [sum(len(group["tokens"]) for group in batch.raw_groups) for batch in batches] == [32, 32, 32]


def test_starving_and_mismatched_runs_end_with_a_diagnosis(smollm2: Path, tmp_path: Path) -> None:
    with (
        serve(smollm2, "--enforce_eager", "True", log_path=tmp_path / "vllm.log") as vllm_url,
        ApiProcess(tmp_path / "api.log") as api,
    ):
        args = config(tmp_path / "out", api.url, vllm_url, max_steps=1, batch_timeout_s=3.0)
        with pytest.raises(AtroposDataTimeout, match=r"queue.* 0"):
            AtroposTrainer(str(smollm2), args).train()

        smaller = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        smaller.resize_token_embeddings(49000)
        with pytest.raises(PreflightError, match=r"vocab_size=49152.*vocab_size=49000"):
            AtroposTrainer(smaller, args).train()


def test_launch_trains_reports_and_leaves_nothing_running(smollm2: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    names = segments()
    command = [
        *(str(Path(sys.executable).parent / "trl-atropos"), "launch"),
        *("-c", "examples/configs/quickstart_launch.yaml", "--run_dir", str(run_dir)),
        *("--model_name_or_path", str(smollm2), "--trainer_args=--max_steps 3 --loss_type weighted_sft"),
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert list(summary) == SUMMARY_KEYS
    assert summary["num_steps"] == 3
    assert summary["server_weight_version"] == summary["policy_version"] == 3
    assert summary["num_rollouts_trained"] == 96
    assert summary["num_rollouts_dropped"] == 0
    for name in ("api", "vllm", "capitals", "trainer", "combined"):
        assert (run_dir / "logs" / f"{name}.log").stat().st_size > 0
    assert (run_dir / "reward.png").stat().st_size > 0
    AutoModelForCausalLM.from_pretrained(run_dir / "model")
    left = [process for process in psutil.process_iter(["cmdline"]) if str(run_dir) in str(process.info["cmdline"])]
    assert not left
    assert not left_since(names)
