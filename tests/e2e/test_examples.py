"""The example environments deliver groups that can be trained: with a tool, with a data set, with generated tasks, of an agent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fork_server import ForkedProcess
from live_api import ApiProcess
from servers import ROOT, VOCAB_SIZE, add_chat_template, save_tiny_model, serve

from trl_atropos.wire.parse import WireLimits, parse_batch


GROUP_SIZE = 4
MAX_LENGTH = 1024
"""The example conversations of the agent have some 700 bytes, each a token of this model."""
TIMEOUT_S = 120.0
LAUNCH_OF_AGENT = ROOT / "examples" / "configs" / "launch_phone_agent.yaml"


def tool_flags() -> list[str]:
    """What the launch of the agent tells the server of tools."""
    told = yaml.safe_load(LAUNCH_OF_AGENT.read_text())["vllm_args"]
    assert told["enable-auto-tool-choice"] is None
    template = str(ROOT / told["chat-template"])
    return ["--enable-auto-tool-choice", "--tool-call-parser", told["tool-call-parser"], "--chat-template", template]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return add_chat_template(save_tiny_model(directory, tied=True, seed=0, max_length=MAX_LENGTH))


@pytest.fixture(scope="module")
def vllm_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("served") / "vllm.log"
    options = ("--enforce_eager", "True", "--max_model_len", str(MAX_LENGTH), *tool_flags())
    with serve(model, *options, log_path=log_path) as url:
        yield url


@pytest.mark.parametrize(
    ("path", "max_length"),
    [
        *(("envs/word_problems.py", 256), ("envs/calculator.py", 256), ("envs/reasoning.py", 256)),
        ("agents/phone_env.py", MAX_LENGTH),
    ],
)
def test_it_delivers(vllm_url, model, tmp_path, path, max_length):
    log_path = tmp_path / "env.log"
    command = [
        *(sys.executable, str(ROOT / "examples" / path), "serve"),
        *("--env.tokenizer_name", str(model), "--env.group_size", str(GROUP_SIZE)),
        *("--openai.base_url", f"{vllm_url}/v1", "--openai.model_name", str(model), "--openai.tokenizer_name", str(model)),
    ]  # fmt: skip
    with ApiProcess(tmp_path / "api.log") as api, log_path.open("wb") as log:
        api.register(GROUP_SIZE, max_token_len=max_length + 1)
        environment = ForkedProcess(
            [*command, "--env.rollout_server_url", api.url],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            raw_groups = api.wait_for_batch(environment, log_path, TIMEOUT_S)
        finally:
            environment.kill()
            environment.wait()
    batch = parse_batch(raw_groups, WireLimits(vocab_size=VOCAB_SIZE, max_length=max_length))
    assert not batch.rejected
    (group,) = batch.groups
    assert len(group.rollouts) == GROUP_SIZE
    for rollout in group.rollouts:
        # The prompt is not trained, the model's own tokens are, with their logprobs.
        assert 0 < rollout.num_trained_tokens < rollout.num_tokens
        assert rollout.inference_logprobs is not None
        assert 0.0 <= rollout.reward <= 1.0
