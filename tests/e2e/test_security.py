"""What docs/security.md says about a real dev-mode server with an API key: which routes ask for it, and which do not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import requests
from servers import save_tiny_model, serve


KEY = "secret"
TOKEN = "hf_of_nobody"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("security")
    model = save_tiny_model(directory / "model", tied=False, seed=0)
    arguments = ("--enforce-eager", "--enable-lora", "--api-key", KEY, "--hf-token", TOKEN)
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serve(model, *arguments, log_path=directory / "server.log", environment=environment) as url:
        yield url


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}),
        ("/generate", {"prompt": {"prompt_token_ids": [1]}}),
        ("/atropos/policy_versions", {"rollout_keys": []}),
    ],
)
def test_the_key_guards(url: str, route: str, body: dict) -> None:
    assert requests.post(url + route, json=body, timeout=30).status_code == 401


@pytest.mark.parametrize(
    "route", ["/health", "/metrics", "/openapi.json", "/server_info", "/weight_info", "/is_paused"]
)
def test_the_key_does_not_guard_what_shows_the_server(url: str, route: str) -> None:
    assert requests.get(url + route, timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/update_weight_version", {"new_version": "anybody's"}),
        ("/pause?mode=keep", None),
        ("/resume", None),
        ("/tokenize", {"prompt": "a"}),
        ("/invocations", {"prompt": "a", "max_tokens": 1}),
    ],
)
def test_the_key_does_not_guard_what_changes_the_server_or_generates(url: str, route: str, body: dict | None) -> None:
    assert requests.post(url + route, json=body, timeout=60).status_code == 200


def test_a_token_of_the_command_line_is_shown_to_everybody(url: str) -> None:
    info = requests.get(f"{url}/server_info", params={"config_format": "json"}, timeout=30).json()
    assert info["vllm_config"]["model_config"]["hf_token"] == TOKEN


def test_a_web_page_may_send_but_not_read(url: str) -> None:
    # What a browser sends for another site without asking first.
    headers = {"Origin": "http://somewhere.example", "Content-Type": "text/plain"}
    answer = requests.post(f"{url}/pause?mode=keep", headers=headers, timeout=30)
    assert requests.get(f"{url}/is_paused", timeout=30).json() == {"is_paused": True}
    requests.post(f"{url}/resume", timeout=30)
    assert answer.status_code == 200
    assert "Access-Control-Allow-Origin" not in answer.headers
