"""The doctor at a real vLLM server. What it finds at a real Atropos API: tests/protocol/test_doctor.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from servers import save_tiny_model, serve

from trl_atropos.cli.main import main
from trl_atropos.diagnosis.checks import diagnose
from trl_atropos.diagnosis.vllm import VLLM_CHECKS, inspect_vllm
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
        return [finding.name for finding in diagnose(inspect_vllm(session, max_length=max_length), VLLM_CHECKS)]


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


def test_a_plain_server_cannot_be_published_to_and_has_no_generate(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", tied=True, seed=1)
    with serve(model, "--enforce-eager", log_path=tmp_path / "server.log", has_dev_mode=False) as plain_url:
        assert names(plain_url) == ["vllm_without_dev_mode", "vllm_without_generate"]
