"""Publishes to a server that is scripted to load a policy beside the one that it serves: it is paused for the swap alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from publishing import ScriptedPublishing, policy, serves
from scripted_server import ScriptedServer

from trl_atropos.errors import WeightSyncError, WeightSyncTimeout
from trl_atropos.weight_sync import failures
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.transports.reports import WorkerReport
from trl_atropos.weight_sync.transports.shm import SharedMemoryTransport


REPORTS_S = 30.0
"""How long a transfer waits for the reports of workers: longer than any test."""

DEADLINE_S = 2.0

BUILD = ["POST /start_weight_update", "POST /update_weights"]
SWAP = ["POST /pause", "POST /finish_weight_update", "POST /resume"]
PROVE = ["GET /weight_info", "POST /v1/completions"]


class Publishing(ScriptedPublishing):
    """To a vLLM server, every publish of which is probed."""

    def __init__(self, server: ScriptedServer, action: str = "abort", **options: object):
        client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=10)
        super().__init__(
            server, client, SharedMemoryTransport(REPORTS_S), action, **{"logprob_probe_interval": 1, **options}
        )


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(policy(seed=1)) as server:
        server.why_not_beside = ""
        yield server
    assert server.offences == []


@pytest.fixture
def publishing(server: ScriptedServer) -> Iterator[Publishing]:
    publishing = Publishing(server)
    yield publishing
    publishing.servers.close()


def serves_what_it_had(server: ScriptedServer) -> bool:
    """Whether it answers with the weights that it started with."""
    assert server.model is not None
    start = policy(seed=1).state_dict()
    return not server.state.is_paused and all(
        torch.equal(tensor, start[name]) for name, tensor in server.model.state_dict().items()
    )


class TestServed:
    def test_it_is_paused_for_the_swap_alone(self, publishing, server):
        load, seen = server.load, []

        def look(update: dict) -> None:
            load(update)
            seen.append((serves_what_it_had(server), server.state.weight_version))

        server.load = look
        report = publishing.publish(policy(), 1)
        assert server.routes == ["GET /get_world_size", "POST /init_weight_transfer_engine", *BUILD, *SWAP, *PROVE]
        assert seen == [(True, "default")]
        assert serves(server, policy())
        assert server.state.weight_version == "1"
        assert report.phase_s["build"] > 0.0
        assert "transfer" not in report.phase_s
        assert report.paused_s == sum(report.phase_s[phase] for phase in ("pause", "finish", "resume"))
        assert report.metrics()["perf/weight_sync_build_s"] == report.phase_s["build"]

    def test_the_next_publishes_too(self, publishing, server):
        publishing.publish(policy(), 1)
        server.requests.clear()
        publishing.publish(policy(seed=2), 2)
        assert server.routes == ["GET /weight_info", *BUILD, *SWAP, *PROVE]
        assert serves(server, policy(seed=2))

    def test_a_session_pauses_at_its_beginning_and_loads_in_place(self, publishing, server):
        with publishing.publisher.weight_sync(1) as sync:
            assert server.state.is_paused
            sync.push(policy())
        assert server.last("POST /update_weights").body["update_info"]["is_beside"] is False
        assert serves(server, policy())

    def test_a_server_that_sleeps_serves_nothing_meanwhile(self, server):
        publishing = Publishing(server, vllm_enable_sleep_mode=True)
        publishing.publish(policy(), 1)
        assert server.last("POST /update_weights").body["update_info"]["is_beside"] is False

    def test_it_can_be_switched_off(self, server):
        publishing = Publishing(server, weight_sync_beside=False)
        publishing.publish(policy(), 1)
        assert server.last("POST /update_weights").body["update_info"]["is_beside"] is False
        assert server.routes.index("POST /pause") < server.routes.index("POST /start_weight_update")
        assert serves(server, policy())

    def test_one_of_which_a_worker_cannot_says_why(self, publishing, server, caplog):
        server.why_not_beside = "9.9 GB are needed for it, and 1.1 GB are free"
        with caplog.at_level("INFO"):
            publishing.publish(policy(), 1)
        assert "cannot be loaded beside the served one: 9.9 GB are needed for it" in caplog.text
        assert server.routes.index("POST /pause") < server.routes.index("POST /start_weight_update")


class TestFailures:
    @pytest.mark.parametrize("route", BUILD)
    def test_the_server_serves_what_it_had(self, publishing, server, route):
        server.script[route] = [500, None]
        error = publishing.failure()
        assert "failed in state `building`" in error.what
        assert "The server serves the previous policy." in error.why
        assert serves_what_it_had(server)

    def test_what_a_worker_says_is_in_the_error(self, publishing, server):
        server.load = lambda update: server.state.segment.report(
            WorkerReport(update["sequence"], 0, 0, 0, error="RuntimeError: 2 parameters were not sent")
        )
        assert "Worker 0 could not load the policy: RuntimeError: 2 parameters" in publishing.failure().what
        assert serves_what_it_had(server)

    def test_the_next_attempt_sends_everything_into_the_open_update(self, server, monkeypatch):
        monkeypatch.setattr(failures, "RETRY_INTERVAL_S", 0.05)
        publishing = Publishing(server, "retry")
        publishing.publish(policy(), 1)
        server.script["POST /update_weights"] = [500, None]
        report = publishing.publish(policy(seed=2), 2)
        assert report.num_retries == 1
        assert server.last("POST /update_weights").body["update_info"]["is_complete"]
        assert serves(server, policy(seed=2))

    def test_what_a_killed_trainer_had_built_is_never_served(self, publishing, server):
        server.script["POST /pause"] = [500, None]
        publishing.failure()
        assert server.state.next_model is not None
        other = Publishing(server)
        other.publish(policy(seed=4), 7)
        assert serves(server, policy(seed=4))
        assert server.state.weight_version == "7"

    @pytest.mark.parametrize(("action", "error"), [(500, WeightSyncError), ("stall", WeightSyncTimeout)])
    def test_a_server_that_dies_while_it_builds_is_noticed(self, server, action, error):
        publishing = Publishing(server)
        publishing.client.request_timeout = DEADLINE_S
        server.load = lambda update: server.script.update({"GET /weight_info": action})
        start = time.monotonic()
        failure = publishing.failure()
        assert isinstance(failure, error)
        assert "GET /weight_info" in failure.what
        assert time.monotonic() - start < REPORTS_S / 3
