"""The doctor and the preflight at a real vLLM server. The doctor at a real Atropos API: tests/protocol/test_doctor.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from live_api import ApiProcess
from servers import save_tiny_model, serve
from tiny_models import byte_tokenizer

from trl_atropos.checks.finding import diagnose
from trl_atropos.checks.vllm import VLLM_CHECKS, inspect_inference_server
from trl_atropos.cli.main import main
from trl_atropos.weight_sync.http import ServerSession


MAX_MODEL_LEN = 256
"""That of `servers.VLLMServer`."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("doctor")
    model = save_tiny_model(directory / "model", tied=True, seed=1)
    with serve(model, "--enforce_eager", "True", log_path=directory / "server.log") as server_url:
        yield server_url


def names(url: str, max_length: int | None = None) -> list[str]:
    with ServerSession(url, 10.0) as session:
        return [
            finding.name for finding in diagnose(inspect_inference_server(session, max_length=max_length), VLLM_CHECKS)
        ]


def test_a_server_as_the_trainer_needs_it_is_fine(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(url, MAX_MODEL_LEN) == []

    # Nobody listens on port 1, so the command ends with 1; the server has its own row.
    assert main(["doctor", "--api-url", "http://127.0.0.1:1", "--vllm-url", url + "/"]) == 1
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "api_unreachable" in printed
    assert "ok vllm" in printed
    assert "weight_version default" in printed


def test_a_server_that_a_publish_left_frozen_is_an_error_until_it_goes_on(url: str) -> None:
    assert requests.post(f"{url}/pause", params={"mode": "keep"}, timeout=30).ok
    assert names(url) == ["vllm_paused"]

    assert requests.post(f"{url}/resume", timeout=30).ok
    assert names(url) == []


def test_a_server_that_generates_more_than_the_trainer_takes_is_a_warning(url: str) -> None:
    assert names(url, MAX_MODEL_LEN - 1) == ["vllm_exceeds_max_length"]


def preflight(capsys: pytest.CaptureFixture[str], url: str, model: str, *arguments: str) -> tuple[int, dict[str, str]]:
    """Exit code, and name -> level of every line."""
    capsys.readouterr()
    code = main(["preflight", "--vllm_url", url, "--model", model, *arguments, "--json"])
    return code, {finding["name"]: finding["level"] for finding in json.loads(capsys.readouterr().out)}


def test_preflight_of_a_run_that_fits_has_no_warning(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]
    options = tmp_path / "trainer.yaml"
    options.write_text(f"use_cpu: true\nmax_length: {MAX_MODEL_LEN}\noutput_dir: {tmp_path}\nsave_strategy: 'no'\n")
    with ApiProcess(tmp_path / "api.log") as api:
        code, levels = preflight(capsys, url, model, "--config", str(options), "--api_url", api.url)
    assert code == 0
    # They are in a launch file.
    assert {name for name, level in levels.items() if level != "ok"} == {"gpu_separation", "environment_tokenizer"}
    assert levels["api"] == levels["vllm"] == levels["model_config"] == levels["chat_template"] == "ok"


def test_preflight_finds_another_tokenizer_and_template_at_the_server(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model", tied=True, seed=1)
    other = byte_tokenizer()
    other.add_tokens(["<new>"])
    other.chat_template = "Q: {{ messages[0]['content'] }}"
    other.save_pretrained(model)
    code, levels = preflight(capsys, url, str(model))
    assert code == 1
    assert (levels["tokenizer"], levels["chat_template"], levels["model_config"]) == ("error", "warning", "ok")
    assert levels["max_model_len"] == "unknown"


def test_a_plain_server_cannot_be_published_to_and_has_no_generate(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", tied=True, seed=1)
    with serve(model, "--enforce-eager", log_path=tmp_path / "server.log", has_dev_mode=False) as plain_url:
        assert names(plain_url) == ["vllm_without_dev_mode", "vllm_without_generate"]
