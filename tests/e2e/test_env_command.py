"""`trl-atropos env` with an environment of upstream's shape, the real API and a real server: its groups arrive, and without a shim
they do not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fork_server import ForkedProcess
from live_api import ApiProcess
from servers import ROOT, add_chat_template, save_tiny_model, serve
from transformers import AutoTokenizer


PROGRAM = ROOT / "tests" / "e2e" / "envs" / "upstream_shape.py"
GROUP_SIZE = 2
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_chat_template(save_tiny_model(tmp_path_factory.mktemp("model"), tied=True, seed=0))


@pytest.fixture(scope="module")
def vllm_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("served") / "vllm.log"
    with serve(model, "--enforce_eager", "True", log_path=log_path) as url:
        yield url


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiProcess]:
    """`run-api` with a trainer that is registered and asked for its first batch, so that environments may come."""
    with ApiProcess(tmp_path / "api.log") as process:
        process.register(GROUP_SIZE, max_token_len=129)
        yield process


@contextmanager
def environment(*options: str, api: ApiProcess, vllm_url: str, model: Path, log_path: Path) -> Iterator[ForkedProcess]:
    """The environment, through the command. Nobody is logged in to W&B."""
    command = [
        *(sys.executable, "-m", "trl_atropos.cli.main", "env", *options, str(PROGRAM), "serve"),
        *("--env.rollout_server_url", api.url, "--env.tokenizer_name", str(model)),
        *("--openai.base_url", f"{vllm_url}/v1", "--openai.model_name", str(model)),
    ]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "OPENAI_"))}
    with log_path.open("wb") as log:
        process = ForkedProcess(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=log_path.parent)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_environment_of_upstreams_shape_delivers(api, vllm_url, model, tmp_path):
    log_path = tmp_path / "env.log"
    with environment(api=api, vllm_url=vllm_url, model=model, log_path=log_path) as process:
        (group,) = api.wait_for_batch(process, log_path, TIMEOUT_S)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(group["tokens"]) == GROUP_SIZE
    for tokens, masks, messages in zip(group["tokens"], group["masks"], group["messages"], strict=True):
        text = "".join(f"{message['role'][0]}:{message['content']}<eos>" for message in messages)
        assert tokens == tokenizer.encode(text)
        prompt = tokenizer.encode(f"u:{messages[0]['content']}<eos>a:")
        assert masks == [-100] * len(prompt) + tokens[len(prompt) :]
    acted = [line.split(":")[0] for line in log_path.read_text().splitlines() if line.startswith("shim ")]
    assert sorted(acted) == [
        f"shim {name}" for name in ("api_key", "return_dict", "server_list", "wandb", "wandb_name")
    ]


def test_without_a_shim_it_does_not(api, vllm_url, model, tmp_path):
    log_path = tmp_path / "env.log"
    options = ("--no-shim", "wandb_name")
    with environment(*options, api=api, vllm_url=vllm_url, model=model, log_path=log_path) as process:
        assert process.wait(TIMEOUT_S) != 0
    assert "register-env" in (tmp_path / "api.log").read_text()
    assert api.get("/batch") == {"batch": None}
