"""Rollouts of unmodified environments, and of an agent as one, on a real SGLang server: their tokens, and which policies sampled them."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from atroposlib.envs import base
from atroposlib.envs.server_handling.sglang_server import SGLangServer as SGLangClient
from inference_server_contract import Served
from live_api import ApiProcess
from servers import ROOT, config, running

from trl_atropos import AtroposTrainer
from trl_atropos.cli.env_shims.versions import PolicyVersion
from trl_atropos.wire.journal import Journal


CALCULATOR = ROOT / "tests" / "e2e" / "envs" / "calculator.py"
AGENT = ROOT / "tests" / "e2e" / "envs" / "agent.py"
MAX_STEPS = 3
AGENT_STEPS, GROUP_SIZE = 2, 4


def trained_on(served: Served, file: Path, directory: Path, *flags: str, **options: Any) -> AtroposTrainer:
    """A trainer that has trained on what an unmodified environment generates on the server; its journal is in `directory`."""
    model = str(served.model_dir)
    with ApiProcess(directory / "api.log") as api:
        environment = [
            *(sys.executable, "-m", "trl_atropos.cli.main", "env", str(file), "serve"),
            *("--env.rollout_server_url", api.url, "--env.tokenizer_name", model, *flags),
            *("--openai.base_url", f"{served.url}/v1", "--openai.server_type", "sglang"),
            *("--openai.model_name", model, "--openai.tokenizer_name", model),
        ]
        trainer = AtroposTrainer(
            model, config(directory, api.url, served.url, logprob_probe_interval=1, logging_steps=1, **options)
        )
        with running(*environment, log_path=directory / "env.log"):
            trainer.train()
    served.version = trainer.policy_version
    return trainer


def test_training_knows_the_tokens_and_the_policy_of_every_rollout(served: Served, tmp_path: Path) -> None:
    trainer = trained_on(
        served,
        CALCULATOR,
        tmp_path,
        max_steps=MAX_STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    assert served.connect().get_weight_version() == str(trainer.policy_version)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["policy_version"] for entry in steps] == [1, 2, 3]
    assert [entry["staleness/unknown_frac"] for entry in steps] == [0.0] * MAX_STEPS
    assert steps[0]["staleness/mean"] == 0.0
    # On policy the ratio shows the rounding of the server's dtype alone; with other tokens it would be off by powers of ten.
    assert steps[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.05)
    groups = [group for batch in Journal(tmp_path / "journal").batches() for group in batch.raw_groups]
    assert all(len(group["group_overrides"]["policy_version"]) == len(group["tokens"]) for group in groups)
    assert "shim policy_version: a group says which policies sampled it" in (tmp_path / "env.log").read_text()


def test_a_rollout_is_as_old_as_the_first_policy_that_sampled_a_token_of_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    async def send(env: Any, groups: Any, *args: Any) -> None:
        sent.extend(groups)

    monkeypatch.setattr(base.BaseEnv, "handle_send_to_api", send)
    # What the shim replaces is as before when the test ends.
    monkeypatch.setattr(aiohttp.ClientResponse, "json", aiohttp.ClientResponse.json)
    ask = SGLangClient._tokens_and_logprobs_completion_wrapper
    monkeypatch.setattr(SGLangClient, "_tokens_and_logprobs_completion_wrapper", ask)
    PolicyVersion().install()
    served.publish(20)
    before = served.version
    ended: dict[str, float] = {}

    def publish() -> None:
        time.sleep(0.3)
        served.publish(21)
        ended["publish"] = time.monotonic()

    async def sample() -> dict[str, Any]:
        server = base.APIServerConfig(
            base_url=f"{served.url}/v1", model_name=str(served.model_dir), api_key="x", timeout=60
        )
        client = SGLangClient(server)
        prompt, completions, *_ = await client._tokens_and_logprobs_completion_wrapper(
            model="", prompt="a", n=2, max_tokens=220, temperature=1.0, ignore_eos=True
        )
        ended["answer"] = time.monotonic()
        return {
            "tokens": [[*prompt, *completion] for completion in completions],
            "masks": [[-100] * len(prompt) + completion for completion in completions],
        }

    publishing = threading.Thread(target=publish)
    publishing.start()
    group = asyncio.run(sample())
    publishing.join()
    assert ended["publish"] < ended["answer"], "the publish was not in the middle"
    later = asyncio.run(sample())
    cut = {"tokens": [later["tokens"][0][:-1]], "masks": [later["masks"][0][:-1]]}
    asyncio.run(base.BaseEnv.handle_send_to_api(None, [group, later, cut]))
    assert served.version == before + 1
    assert [one.get("group_overrides") for one in sent] == [
        {"policy_version": [before] * 2},
        {"policy_version": [before + 1] * 2},
        None,
    ]


def test_an_agent_as_an_environment_is_trained_on_what_its_gateway_recorded(served: Served, tmp_path: Path) -> None:
    trainer = trained_on(
        served,
        AGENT,
        tmp_path,
        *("--env.group_size", str(GROUP_SIZE)),
        max_steps=AGENT_STEPS,
        per_device_train_batch_size=GROUP_SIZE,
        max_length=480,
    )
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["staleness/unknown_frac"] for entry in steps] == [0.0] * AGENT_STEPS
    # On policy the ratio shows the rounding of the server's dtype alone; with other tokens it would be off by powers of ten.
    assert steps[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.05)
    groups = [group for batch in Journal(tmp_path / "journal").batches() for group in batch.raw_groups]
    assert groups
    for group in groups:
        # Both turns of each attempt are one sequence, and trained.
        assert len(group["tokens"]) == GROUP_SIZE
        for masks in group["masks"]:
            assert sum(before == -100 != after for before, after in pairwise(masks)) == 2
