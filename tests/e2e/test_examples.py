"""The example environments with a tool, with a data set and with generated tasks deliver groups that can be trained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkedProcess
from live_api import ApiProcess
from servers import ROOT, VOCAB_SIZE, add_chat_template, save_tiny_model, serve

from trl_atropos.wire.parse import WireLimits, parse_batch


GROUP_SIZE = 4
MAX_LENGTH = 256
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_chat_template(save_tiny_model(tmp_path_factory.mktemp("model"), tied=True, seed=0))


@pytest.fixture(scope="module")
def vllm_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("served") / "vllm.log"
    with serve(model, "--enforce_eager", "True", log_path=log_path) as url:
        yield url


@pytest.mark.parametrize("name", ["word_problems", "calculator", "reasoning"])
def test_it_delivers(vllm_url, model, tmp_path, name):
    log_path = tmp_path / "env.log"
    command = [
        *(sys.executable, str(ROOT / "examples" / "envs" / f"{name}.py"), "serve"),
        *("--env.tokenizer_name", str(model), "--env.group_size", str(GROUP_SIZE)),
        *("--openai.base_url", f"{vllm_url}/v1", "--openai.model_name", str(model), "--openai.tokenizer_name", str(model)),
    ]  # fmt: skip
    with ApiProcess(tmp_path / "api.log") as api, log_path.open("wb") as log:
        api.register(GROUP_SIZE, max_token_len=MAX_LENGTH + 1)
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
    batch = parse_batch(raw_groups, WireLimits(vocab_size=VOCAB_SIZE, max_length=MAX_LENGTH))
    assert not batch.rejected
    (group,) = batch.groups
    assert len(group.rollouts) == GROUP_SIZE
    for rollout in group.rollouts:
        # The prompt is not trained, the model's own tokens are, with their logprobs.
        assert 0 < rollout.num_trained_tokens < rollout.num_tokens
        assert rollout.inference_logprobs is not None
        assert 0.0 <= rollout.reward <= 1.0
