"""Which kind of server stands behind a URL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted_server import ScriptedServer

from trl_atropos.errors import PreflightError, VLLMServerError, WeightSyncTimeout
from trl_atropos.weight_sync import health
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.connecting import connect_server
from trl_atropos.weight_sync.health import find_kind, read_weight_version
from trl_atropos.weight_sync.http import SGLANG, UNKNOWN, VLLM, ServerSession


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def kind_of(server: ScriptedServer, timeout_s: float = 20.0) -> str:
    with ServerSession(server.base_url, 20.0, kind=UNKNOWN) as session:
        return find_kind(session, timeout_s)


def answer_as_sglang(server: ScriptedServer) -> None:
    server.script["GET /version"] = 404
    server.script["GET /model_info"] = {"served_model_name": "policy", "weight_version": "7"}


def test_vllm_answers_version(server):
    assert kind_of(server) == VLLM
    client = connect_server(server.base_url + "/v1", connection_timeout=20, request_timeout=7, api_key="key")
    assert type(client) is AtroposVLLMClient
    assert (client.base_url, client.request_timeout) == (server.base_url, 7)
    assert server.requests[-1].headers["Authorization"] == "Bearer key"


def test_sglang_answers_model_info(server):
    answer_as_sglang(server)
    assert kind_of(server) == SGLANG


def test_a_server_that_starts_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(health, "HEALTH_INTERVAL_S", 0.01)
    server.script["GET /version"] = [503, None]
    server.script["GET /model_info"] = 503
    assert kind_of(server) == VLLM
    assert server.routes == ["GET /version", "GET /model_info", "GET /version"]


def test_what_is_neither_is_refused_with_what_it_answers(server):
    server.script["GET /version"] = 404
    with pytest.raises(
        PreflightError, match=r"neither a vLLM nor an SGLang server.*/version with 404, /model_info with 404"
    ):
        kind_of(server)


def test_a_key_that_is_wrong_is_no_kind(server):
    server.script["GET /version"] = 401
    with pytest.raises(VLLMServerError) as caught:
        kind_of(server)
    assert "--vllm_api_key" in caught.value.fix


def test_nobody_listens(server):
    server.stop()
    with pytest.raises(WeightSyncTimeout, match=r"not healthy after 0 s \(no connection\)"):
        kind_of(server, timeout_s=0.1)


@pytest.mark.parametrize("kind", [VLLM, SGLANG])
def test_both_say_which_weights_they_serve(server, kind):
    server.state.weight_version = "7"
    if kind == SGLANG:
        answer_as_sglang(server)
    with ServerSession(server.base_url, 20.0, kind=UNKNOWN) as session:
        assert (read_weight_version(session), session.kind) == ("7", kind)
