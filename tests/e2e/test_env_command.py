"""`trl-atropos env` with an environment of upstream's shape, the real API and a real server: its groups arrive, and without a shim
they do not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from live_api import ApiProcess
from servers import ROOT, save_tiny_model, serve
from transformers import AutoTokenizer


PROGRAM = ROOT / "tests" / "e2e" / "envs" / "upstream_shape.py"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
GROUP_SIZE = 2
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model(tmp_path_factory.mktemp("model"), tied=True, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def vllm_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("served") / "vllm.log"
    with serve(model, "--enforce_eager", "True", log_path=log_path) as url:
        yield url


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiProcess]:
    """`run-api` with a trainer that is registered and asked for its first batch, so that environments may come."""
    with ApiProcess(tmp_path / "api.log") as process:
        registration = {
            **{"wandb_group": "test", "wandb_project": "test", "batch_size": GROUP_SIZE, "max_token_len": 129},
            **{"checkpoint_dir": "", "save_checkpoint_interval": 0, "starting_step": 0, "num_steps": 1000},
        }
        requests.post(f"{process.url}/register", json=registration, timeout=10).raise_for_status()
        assert process.get("/batch") == {"batch": None}
        yield process


@contextmanager
def environment(
    *options: str, api: ApiProcess, vllm_url: str, model: Path, log_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """The environment, through the command. Nobody is logged in to W&B."""
    command = [
        *(sys.executable, "-m", "trl_atropos.cli.main", "env", *options, str(PROGRAM), "serve"),
        *("--env.rollout_server_url", api.url, "--env.tokenizer_name", str(model)),
        *("--openai.base_url", f"{vllm_url}/v1", "--openai.model_name", str(model)),
    ]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "OPENAI_"))}
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=log_path.parent)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def next_batch(api: ApiProcess, process: subprocess.Popen[bytes], log_path: Path) -> list[dict[str, Any]]:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if batch := api.get("/batch")["batch"]:
            return batch
        time.sleep(0.1)
    raise AssertionError(f"no batch came:\n{log_path.read_text()[-4000:]}")


def test_an_environment_of_upstreams_shape_delivers(api, vllm_url, model, tmp_path):
    log_path = tmp_path / "env.log"
    with environment(api=api, vllm_url=vllm_url, model=model, log_path=log_path) as process:
        (group,) = next_batch(api, process, log_path)
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
