"""A publish to an SGLang server that is scripted to fail: the contract is that of vLLM (test_publisher.py).

Client, transport, process group and probe are the real ones. On a real server: tests/e2e/test_inference_servers.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from publishing import ScriptedPublishing, policy, serves
from scripted_sglang import ScriptedSGLang

from trl_atropos.errors import PreflightError, PublishConflictError, WeightSyncError, WeightSyncTimeout
from trl_atropos.weight_sync import failures
from trl_atropos.weight_sync.connecting import connect_server
from trl_atropos.weight_sync.sglang import AtroposSGLangClient
from trl_atropos.weight_sync.transports import sglang_group
from trl_atropos.weight_sync.transports.rendezvous import bind
from trl_atropos.weight_sync.transports.sglang_group import GROUP_NAME, SGLangGlooTransport


DEADLINE_S = 2.0
SLACK_S = 5.0
"""For a busy machine."""
BUCKET_BYTES = 16384
"""Two buckets, so that a server can die between them."""

CONNECT = [
    "GET /model_info",
    "POST /destroy_weights_update_group",
    "GET /server_info",
    "POST /init_weights_update_group",
]
UPDATE = "POST /update_weights_from_distributed"
DELIVER = [
    "POST /pause_generation",
    "POST /begin_weight_update",
    *[UPDATE] * 2,
    "POST /end_weight_update",
    "POST /update_weight_version",
    "POST /continue_generation",
    "GET /model_info",
    "POST /generate",
]
FIRST_PUBLISH = CONNECT + DELIVER
STATE_AFTER = {
    "POST /destroy_weights_update_group": ("idle", "serves the previous policy"),
    "POST /init_weights_update_group": ("idle", "serves the previous policy"),
    "POST /pause_generation": ("paused", "may be paused; it holds the previous policy"),
    "POST /begin_weight_update": ("transferring", "is paused and holds no complete policy"),
    UPDATE: ("transferring", "is paused and holds no complete policy"),
    "POST /end_weight_update": ("finishing", "is paused and may hold no complete policy"),
    "POST /update_weight_version": ("finishing", "is paused and may hold no complete policy"),
    "POST /continue_generation": ("resuming", "holds the new policy and may be paused"),
}


class Publishing(ScriptedPublishing):
    """To an SGLang server."""

    def __init__(self, server: ScriptedSGLang, action: str = "abort", **options: Any):
        client = connect_server(server.base_url, connection_timeout=5, request_timeout=10, api_key="secret")
        assert isinstance(client, AtroposSGLangClient)
        super().__init__(server, client, SGLangGlooTransport(10.0, bucket_bytes=BUCKET_BYTES), action, **options)


@pytest.fixture
def server() -> Iterator[ScriptedSGLang]:
    # Starts with another policy than the trainer's.
    with ScriptedSGLang(policy(seed=1)) as server:
        yield server
    assert server.offences == []


@pytest.fixture
def publishing(server: ScriptedSGLang) -> Iterator[Publishing]:
    publishing = Publishing(server)
    yield publishing
    publishing.servers.close()


@pytest.fixture
def retrying(server: ScriptedSGLang, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publishing]:
    monkeypatch.setattr(failures, "RETRY_INTERVAL_S", 0.05)
    publishing = Publishing(server, "retry")
    yield publishing
    publishing.servers.close()


class TestOrder:
    def test_of_the_first_publish(self, publishing, server):
        report = publishing.publish(policy(), 0)
        assert server.routes == FIRST_PUBLISH
        assert server.last("POST /pause_generation").body == {"mode": "retract"}
        updates = [request.body for request in server.requests if request.route == UPDATE]
        assert [update["flush_cache"] for update in updates] == [False, True]
        assert {update["group_name"] for update in updates} == {GROUP_NAME}
        version = {"new_version": "0", "abort_all_requests": False}
        assert server.last("POST /update_weight_version").body == version
        assert serves(server, policy())
        assert not server.state.is_paused
        assert report.probe.mean_abs_diff < 0.05
        assert {request.headers.get("Authorization") for request in server.requests} == {"Bearer secret"}

    def test_later_publishes_do_not_connect_again_and_are_probed_too(self, publishing, server):
        publishing.publish(policy(), 0)
        server.requests.clear()
        report = publishing.publish(policy(seed=2), 1)
        # The version is asked first: a server that was restarted says `default`.
        assert server.routes == ["GET /model_info", *DELIVER]
        assert report.probe is not None
        assert serves(server, policy(seed=2))

    def test_keys_and_values_of_requests_in_flight_can_be_kept(self, server):
        publishing = Publishing(server, vllm_keep_kv_cache=True)
        publishing.publish(policy(), 0)
        assert server.last("POST /pause_generation").body == {"mode": "in_place"}
        # A flush while requests lie in the cache is refused, after the weights have changed.
        assert not any(request.body["flush_cache"] for request in server.requests if request.route == UPDATE)
        publishing.servers.close()


class TestAbort:
    @pytest.mark.parametrize("action", [500, "close", "html", "missing"])
    @pytest.mark.parametrize("route", STATE_AFTER)
    def test_a_control_request_is_sent_once_and_nothing_follows_its_failure(
        self, publishing, server, route, action, monkeypatch
    ):
        if action == "missing" and route in ("POST /pause_generation", "POST /continue_generation"):
            pytest.skip("These two answer with nothing that says more than 200.")
        monkeypatch.setattr(sglang_group, "LEAVE_S", 0.1)
        server.script[route] = action
        error = publishing.failure()
        state, holds = STATE_AFTER[route]
        assert server.routes == FIRST_PUBLISH[: FIRST_PUBLISH.index(route) + 1]
        assert f"Publishing policy version 1 to {server.base_url} failed in state `{state}`" in error.what
        assert holds in error.why

    @pytest.mark.parametrize("route", STATE_AFTER)
    def test_a_stalled_request_ends_at_its_deadline(self, publishing, server, route):
        publishing.client.request_timeout = DEADLINE_S
        publishing.link.transport.timeout_s = DEADLINE_S
        server.script[route] = "stall"
        start = time.monotonic()
        error = publishing.failure()
        assert time.monotonic() - start < 2 * DEADLINE_S + SLACK_S
        assert isinstance(error, WeightSyncTimeout)
        assert STATE_AFTER[route][1] in error.why
        assert server.routes.count(route) == 1

    def test_an_update_that_is_refused_does_not_wait_for_its_broadcast(self, server, monkeypatch):
        """The worker lives and receives nothing, which gloo notices at its deadline."""
        monkeypatch.setattr(sglang_group, "LEAVE_S", 0.1)
        with bind("127.0.0.1", 0) as probe:
            port = probe.getsockname()[1]
        publishing = Publishing(server)
        publishing.link.transport.port = port
        # More than the buffers of a connection take.
        large = {"large": torch.zeros(2**25)}
        server.script[UPDATE] = [500, None]
        start = time.monotonic()
        with (
            pytest.raises(WeightSyncError, match="scripted 500"),
            publishing.client.weight_sync(1, transport=publishing.link.transport) as sync,
        ):
            sync.push(large.items())
        assert time.monotonic() - start < SLACK_S
        # The port is free again, although the thread of the broadcast goes on.
        publishing.publish(policy(), 1)
        publishing.servers.close()

    def test_an_answer_that_denies_success_is_a_failure(self, publishing, server):
        server.script["POST /end_weight_update"] = {"success": False, "message": "out of memory"}
        error = publishing.failure()
        assert "out of memory" in error.what and "instead of `success`: true" in error.what
        assert server.state.is_paused

    def test_half_a_policy_is_found_by_the_probe_and_paused_again(self, publishing, server):
        send = publishing.link.transport.send
        publishing.link.transport.send = lambda specs: send(specs[: len(specs) // 2])
        error = publishing.failure()
        assert "failed in state `verified`" in error.what
        assert "Trainer and server disagree after the publish" in error.what
        assert server.state.is_paused

    def test_the_publish_after_a_failure_mends_the_server(self, publishing, server):
        server.script["POST /end_weight_update"] = [500, None]
        publishing.failure()
        publishing.publish(policy(), 1)
        # The group of the first try is taken down, and its update ended.
        start = len(server.routes) - 1 - server.routes[::-1].index("POST /begin_weight_update")
        assert server.routes[start - 2 : start + 1] == [
            "POST /begin_weight_update",
            "POST /end_weight_update",
            "POST /begin_weight_update",
        ]
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("1", False)


class TestKilledServer:
    @pytest.mark.parametrize("action", ["die", "answer and die"])
    @pytest.mark.parametrize("route", STATE_AFTER)
    def test_it_is_waited_for_and_given_everything(self, server, retrying, route, action):
        retrying.publish(policy(seed=3), 0)
        if route in CONNECT:
            # It dies once more while it is connected again.
            server.restart()
        server.script[route] = action
        restart = threading.Thread(target=lambda: (server.ended.wait(20), time.sleep(0.3), server.restart()))
        restart.start()
        report = retrying.publish(policy(), 1)
        restart.join()
        assert report.num_failures >= 1
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("1", False)

    def test_between_two_buckets(self, server, retrying):
        retrying.publish(policy(seed=3), 0)
        server.script[UPDATE] = [None, "die"]
        restart = threading.Thread(target=lambda: (server.ended.wait(20), time.sleep(0.3), server.restart()))
        restart.start()
        assert retrying.publish(policy(), 1).num_failures >= 1
        restart.join()
        assert serves(server, policy())

    def test_a_restart_in_between_is_recognised_without_a_failure(self, server, retrying, caplog):
        retrying.publish(policy(), 0)
        server.restart()
        report = retrying.publish(policy(), 1)
        assert (report.num_retries, report.num_failures) == (0, 0)
        assert "The SGLang server at" in caplog.text and "was restarted" in caplog.text
        assert serves(server, policy())

    def test_one_that_stays_away_ends_the_run(self, server, retrying):
        retrying.options.max_publish_retries = 1
        retrying.options.vllm_server_timeout = 0.2
        retrying.publish(policy(), 0)
        server.stop()
        error = retrying.failure()
        assert isinstance(error, WeightSyncTimeout)
        assert f"The SGLang server at {server.base_url} is not healthy after 0 s (no connection)" in error.what
        assert "sglang.launch_server" in error.fix


class TestOtherTrainers:
    def test_the_group_and_the_update_that_a_dead_one_left_are_replaced(self, server, caplog):
        first = Publishing(server)
        first.publish(policy(seed=3), 0)
        server.state.is_paused = server.state.is_updating = True
        second = Publishing(server)
        second.publish(policy(), 5)
        assert "has an unfinished weight update of another trainer" in caplog.text
        assert serves(server, policy())
        assert (server.state.weight_version, server.state.is_paused) == ("5", False)
        for publishing in (first, second):
            publishing.servers.close()

    def test_one_on_the_same_server_is_never_fought(self, server, retrying):
        retrying.publish(policy(), 0)
        server.state.weight_version = "17"
        with pytest.raises(PublishConflictError, match=r"reports weight version '17', this trainer published 0"):
            retrying.publish(policy(), 1)


class TestDescribe:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dp_size": 2}, r"dp_size 2\..*--dp-size 1"),
            ({"pp_size": 2}, r"pp_size 2\..*--pp-size 1"),
            ({"quantization": "fp8"}, r"quantises its weights \(fp8\)"),
            ({"dtype": "auto"}, r"serves in dtype 'auto'.*--dtype bfloat16"),
        ],
        ids=str,
    )
    def test_what_cannot_be_published_to_is_refused_by_name(self, publishing, server, change, message):
        server.info |= change
        # A name without a slash at its beginning is looked for on the Hub.
        server.script["GET /model_info"] = {"model_path": "/nowhere", "weight_version": "default"}
        with pytest.raises(PreflightError, match=message):
            publishing.client.describe()

    def test_an_older_version_is_refused_with_the_routes_that_it_lacks(self, publishing, server):
        server.script["GET /openapi.json"] = {"paths": {"/pause_generation": {}}}
        with pytest.raises(
            PreflightError, match=r"\(version 0\.5\.23\) has no /begin_weight_update, /end_weight_update"
        ):
            publishing.client.describe()

    @pytest.mark.parametrize(("device", "backend"), [("cpu", "sglang_gloo"), ("cuda", "sglang_nccl")])
    def test_the_device_decides_how_it_receives(self, publishing, server, device, backend):
        server.info["device"] = device
        assert publishing.client.describe().backend == backend
