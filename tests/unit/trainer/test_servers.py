"""What the trainer asks of several servers, of which one may be away."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from scripted_server import ScriptedServer

from trl_atropos.errors import VLLMServerError
from trl_atropos.trainer.servers import Servers
from trl_atropos.types import ServedCall
from trl_atropos.weight_sync.client import AtroposVLLMClient


@pytest.fixture
def servers() -> Iterator[list[ScriptedServer]]:
    with ScriptedServer() as first, ScriptedServer() as second:
        first.script["POST /atropos/policy_versions"] = {"policy_versions": [4, None, None]}
        second.script["POST /atropos/policy_versions"] = {"policy_versions": [7, 5, None]}
        yield [first, second]


@pytest.fixture
def connections(servers: list[ScriptedServer]) -> Servers:
    clients = [AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=20) for server in servers]
    unused = SimpleNamespace()
    return Servers(unused, clients, unused, unused, unused, clients)


def test_whichever_server_knows_a_sequence_says_its_version(connections):
    assert connections.find_calls(["a", "b", "c"]) == [ServedCall(4), ServedCall(5), None]


def test_of_a_server_that_is_away_the_versions_are_unknown_and_that_is_said(connections, servers, caplog):
    servers[0].script["POST /atropos/policy_versions"] = "close"
    with caplog.at_level(logging.WARNING):
        assert connections.find_calls(["a", "b", "c"]) == [ServedCall(7), ServedCall(5), None]
    assert servers[0].base_url in caplog.text
    assert "staleness of rollouts that it sampled is unknown" in caplog.text


def test_a_server_without_a_memory_is_not_asked(connections, servers):
    servers[0].script["POST /atropos/policy_versions"] = 404
    others = replace(connections, clients_with_versions=connections.vllm_clients[1:])
    assert others.find_calls(["a", "b", "c"]) == [ServedCall(7), ServedCall(5), None]


def test_a_server_that_refuses_the_question_is_an_error(connections, servers):
    servers[1].script["POST /atropos/policy_versions"] = 500
    with pytest.raises(VLLMServerError):
        connections.find_calls(["a", "b", "c"])
