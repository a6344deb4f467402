"""An agent as an environment, whose gateway stands in front of a real SGLang server: trained on exactly what it sampled."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from inference_server_contract import Served
from live_api import ApiProcess
from servers import ROOT, config, running

from trl_atropos import AtroposTrainer
from trl_atropos.wire.journal import Journal


AGENT = ROOT / "tests" / "e2e" / "envs" / "agent.py"
MAX_STEPS = 2
GROUP_SIZE = 4


def test_an_agent_as_an_environment_is_trained(served: Served, tmp_path: Path) -> None:
    model = str(served.model_dir)
    with ApiProcess(tmp_path / "api.log") as api:
        environment = [
            *(sys.executable, "-m", "trl_atropos.cli.main", "env", str(AGENT), "serve"),
            *("--env.rollout_server_url", api.url, "--env.tokenizer_name", model, "--env.group_size", str(GROUP_SIZE)),
            *("--openai.base_url", f"{served.url}/v1", "--openai.server_type", "sglang"),
            *("--openai.model_name", model, "--openai.tokenizer_name", model),
        ]
        args = config(
            tmp_path / "out",
            api.url,
            served.url,
            max_steps=MAX_STEPS,
            per_device_train_batch_size=GROUP_SIZE,
            max_length=480,
            logprob_probe_interval=1,
            logging_steps=1,
        )
        trainer = AtroposTrainer(model, args)
        with running(*environment, log_path=tmp_path / "env.log"):
            trainer.train()
    served.version = trainer.policy_version
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["staleness/unknown_frac"] for entry in steps] == [0.0] * MAX_STEPS
    # On policy the ratio shows the rounding of the server's dtype alone; with other tokens it would be off by powers of ten.
    assert steps[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.05)
    groups = [group for batch in Journal(tmp_path / "out" / "journal").batches() for group in batch.raw_groups]
    assert groups
    for group in groups:
        # Both turns of each attempt are one sequence, and trained.
        assert len(group["tokens"]) == GROUP_SIZE
        for masks in group["masks"]:
            assert sum(before == -100 != after for before, after in pairwise(masks)) == 2
