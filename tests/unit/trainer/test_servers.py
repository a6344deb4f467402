"""What the trainer asks of several servers, of which one may be away."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scripted_server import ScriptedServer

from trl_atropos.errors import VLLMServerError
from trl_atropos.trainer.servers import Servers, publishes_in_background
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
    return Servers(unused, clients, unused, unused, unused, clients, in_background=False)


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


class TestPublishesInBackground:
    @pytest.fixture
    def decide(self):
        def decide(device: str, backend: str, url: str = "http://127.0.0.1:8000", **options: object) -> bool:
            chosen = {"weight_sync_background": None, "vllm_enable_sleep_mode": False, **options}
            args = SimpleNamespace(device=torch.device(device), vllm_server_base_urls=[url], **chosen)
            return publishes_in_background(args, ["trl_atropos_shm", backend], has_own_transport=False)

        return decide

    @pytest.mark.parametrize("backend", ["trl_atropos_shm", "trl_atropos_gloo"])
    def test_a_gpu_trains_meanwhile(self, decide, backend):
        assert decide("cuda:0", backend)

    @pytest.mark.parametrize(
        ("backend", "options"),
        [("nccl", {}), ("sglang_nccl", {}), ("trl_atropos_shm", {"vllm_enable_sleep_mode": True}), ("unknown", {})],
    )
    def test_what_needs_the_gpu_itself_is_waited_for(self, decide, backend, options):
        assert not decide("cuda:0", backend, **options)

    def test_a_cpu_waits_for_a_server_that_shares_it(self, decide):
        assert not decide("cpu", "trl_atropos_gloo")
        assert decide("cpu", "trl_atropos_gloo", "http://192.0.2.7:8000")

    def test_the_option_decides_where_it_is_set(self, decide):
        assert decide("cpu", "trl_atropos_shm", weight_sync_background=True)
        assert not decide("cuda:0", "trl_atropos_shm", weight_sync_background=False)

    def test_a_transport_of_the_users_is_waited_for(self):
        args = SimpleNamespace(
            device=torch.device("cuda:0"),
            vllm_server_base_urls=[],
            weight_sync_background=None,
            vllm_enable_sleep_mode=False,
        )
        assert not publishes_in_background(args, ["trl_atropos_shm"], has_own_transport=True)
