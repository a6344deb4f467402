"""The control plane client over real sockets: what each method sends, what it makes of the answer, how it connects."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator

import pytest
from client_cases import API_KEY, CONTROL_POSTS, INHERITED, QUESTIONS, SLACK_S, every, prepare
from scripted_server import ScriptedServer

from trl_atropos.errors import (
    PreflightError,
    VLLMServerError,
    WeightSyncError,
    WeightSyncTimeout,
)
from trl_atropos.types import ServedCall
from trl_atropos.weight_sync import health
from trl_atropos.weight_sync.client import AtroposVLLMClient


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def client(server: ScriptedServer) -> AtroposVLLMClient:
    client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=20, api_key=API_KEY)
    server.requests.clear()
    return client


class TestWhatIsSent:
    @every(CONTROL_POSTS + QUESTIONS)
    def test_route_query_and_body(self, client, server, case):
        prepare(server, case)
        case.call(client)
        (request,) = server.requests
        assert (request.route, request.query, request.body) == (case.route, case.query, case.body)

    @every(CONTROL_POSTS + QUESTIONS + INHERITED)
    def test_the_key_and_a_connection_of_its_own(self, client, server, case):
        prepare(server, case)
        if case in INHERITED:
            server.script[case.route] = 500
            with pytest.raises(VLLMServerError):
                case.call(client)
        else:
            case.call(client)
        (request,) = server.requests
        assert request.headers["Authorization"] == f"Bearer {API_KEY}"
        assert request.headers["Connection"] == "close"

    def test_the_key_is_sent_while_connecting(self, server):
        AtroposVLLMClient(server.base_url, connection_timeout=5, api_key=API_KEY)
        assert server.requests[0].route == "GET /health"
        assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {API_KEY}"}

    @pytest.mark.parametrize("api_key", [None, ""])
    def test_without_a_key_none_is_sent(self, server, api_key):
        AtroposVLLMClient(server.base_url, connection_timeout=5, api_key=api_key).pause()
        assert not any("Authorization" in request.headers for request in server.requests)

    @pytest.mark.parametrize("end", ["/", "/v1", "/v1/"])
    def test_the_end_of_the_url_does_not_matter(self, server, end):
        AtroposVLLMClient(server.base_url + end, connection_timeout=5).resume()
        assert server.routes[-1] == "POST /resume"


class TestAnswers:
    def test_states_of_the_server(self, client, server):
        assert (client.is_paused(), client.get_weight_version(), client.list_models()) == (
            False,
            "default",
            ["policy"],
        )
        client.pause()
        client.init_weight_transfer_engine({})
        client.start_weight_update()
        client.update_weights({"names": []})
        client.finish_weight_update("12")
        assert (client.is_paused(), client.get_weight_version()) == (True, "12")
        client.resume()
        assert not client.is_paused()
        client.set_weight_version("13")
        assert client.get_weight_version() == "13"
        assert server.offences == []

    def test_an_update_without_a_name_keeps_the_version(self, client):
        client.set_weight_version("5")
        client.pause()
        client.start_weight_update()
        client.finish_weight_update(None)
        assert client.get_weight_version() == "5"

    def test_sleeping(self, client):
        client.sleep(1)
        client.wake_up(["weights"])
        assert client.is_sleeping()
        client.wake_up(None)
        assert not client.is_sleeping()

    def test_adapters(self, client, server):
        client.load_lora_adapter("v1", "dir")
        assert client.list_models() == ["policy", "v1"]
        client.route_adapter("v1", 1)
        assert server.state.routed_adapter == "v1"
        client.unload_lora_adapter("v1")
        assert client.list_models() == ["policy"]

    @pytest.mark.parametrize("success", [True, False])
    def test_the_prefix_cache_says_whether_it_was_dropped(self, client, server, success):
        server.script["POST /reset_prefix_cache"] = {"success": success}
        assert client.reset_prefix_cache() is success

    def test_facts_of_the_server(self, client, server):
        server.config["model_config"]["dtype"] = "torch.float16"
        server.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = True
        assert client.get_server_info()["model_config"]["dtype"] == "torch.float16"
        assert client.get_server_environment()["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] is True

    def test_policy_versions(self, client, server):
        answer = {"policy_versions": [4, None, 3], "sampling_parameters": [["top_p"], None, []]}
        server.script["POST /atropos/policy_versions"] = answer
        assert client.find_calls(["a", "b", "c"]) == [ServedCall(4, ("top_p",)), None, ServedCall(3)]

    def test_an_earlier_middleware_remembers_versions_alone(self, client, server):
        server.script["POST /atropos/policy_versions"] = {"policy_versions": [4, None]}
        assert client.find_calls(["a", "b"]) == [ServedCall(4), None]

    def test_parameters_of_other_calls_are_refused(self, client, server):
        answer = {"policy_versions": [4, None], "sampling_parameters": [[]]}
        server.script["POST /atropos/policy_versions"] = answer
        with pytest.raises(WeightSyncError, match="`sampling_parameters` of 2 keys"):
            client.find_calls(["a", "b"])

    def test_logprobs_of_all_tokens_but_the_first(self, client, server):
        # The first position is scored by nothing; at the others vLLM lists the token itself and the likeliest one.
        position = {"8": {"logprob": -0.5, "rank": 1}, "2": {"logprob": -3.0, "rank": 9}}
        scored = [None, position, {"3": {"logprob": -0.25, "rank": 1}}]
        server.script["POST /v1/completions"] = {"choices": [{"prompt_logprobs": scored}]}
        assert client.get_prompt_logprobs([[1, 2, 3]]) == [[-3.0, -0.25]]


WRONG_VALUES = {
    "reset_prefix_cache": b'{"success": "yes"}',
    "is_paused": b'{"is_paused": null}',
    "weight_version": b'{"weight_version": 3}',
    "is_sleeping": b'{"is_sleeping": 1}',
    "models": b'{"data": [{"name": "policy"}]}',
    "world_size": b'{"world_size": "2"}',
    "server_info": b'{"vllm_config": "text"}',
    "environment": b'{"vllm_env": []}',
    "versions": b'{"policy_versions": []}',
    "logprobs": b'{"choices": [{"prompt_logprobs": [null, {}, {}]}]}',
}
KEY_OF = {
    "reset_prefix_cache": "success",
    "is_paused": "is_paused",
    "weight_version": "weight_version",
    "is_sleeping": "is_sleeping",
    "models": "data",
    "world_size": "world_size",
    "server_info": "vllm_config",
    "environment": "vllm_env",
    "versions": "policy_versions",
    "logprobs": "choices",
    "trl_generate": "choices",
    "trl_chat": "prompt_token_ids",
    "trl_logprobs": "choices",
}
READING = [case for case in CONTROL_POSTS + QUESTIONS + INHERITED if case.name in KEY_OF]


class TestAnswersOfSomethingElse:
    @every(READING)
    def test_a_missing_key_is_named(self, client, server, case):
        server.script[case.route] = "missing"
        with pytest.raises(WeightSyncError) as caught:
            case.call(client)
        for part in (case.route, server.base_url, f"`{KEY_OF[case.name]}`", "'other': 'keys'"):
            assert part in caught.value.what

    @every([case for case in READING if case.name in WRONG_VALUES])
    def test_a_value_of_another_kind_is_named(self, client, server, case):
        server.script[case.route] = WRONG_VALUES[case.name]
        with pytest.raises(WeightSyncError, match=case.route):
            case.call(client)

    @pytest.mark.parametrize("action", ["html", b"[1]", b"null", b'"text"', b""])
    @every([case for case in CONTROL_POSTS + QUESTIONS if "lora" not in case.name])
    def test_no_json_object(self, client, server, case, action):
        server.script[case.route] = action
        with pytest.raises(WeightSyncError, match="not a vLLM server"):
            case.call(client)

    @every([case for case in CONTROL_POSTS if "lora" in case.name])
    def test_no_line_about_the_adapter(self, client, server, case):
        server.script[case.route] = "html"
        with pytest.raises(WeightSyncError, match=r"a proxy.* for adapter 'v3'"):
            case.call(client)


class TestStatusErrors:
    def test_carry_what_the_server_said(self, client, server):
        client.pause()
        client.start_weight_update()
        with pytest.raises(VLLMServerError) as caught:
            client.start_weight_update()
        assert caught.value.status_code == 500
        assert "already active. Call finish_weight_update first." in caught.value.detail
        assert caught.value.detail in caught.value.what

    @pytest.mark.parametrize(
        ("prepare", "call", "message"),
        [
            ([], lambda c: c.update_weights({}), "start_weight_update must be called before update_weights"),
            ([], lambda c: c.finish_weight_update("1"), "without a matching start_weight_update"),
            (["start_weight_update"], lambda c: c.shutdown_weight_transfer_engine(), "during a weight update"),
        ],
    )
    def test_calls_out_of_order(self, client, prepare, call, message):
        for method in prepare:
            getattr(client, method)()
        with pytest.raises(VLLMServerError) as caught:
            call(client)
        assert message in caught.value.detail

    @pytest.mark.parametrize(
        ("status", "parts"),
        [
            (401, ["--vllm_api_key", "VLLM_API_KEY"]),
            (500, ["server's log"]),
        ],
    )
    def test_name_what_mends_them(self, client, server, status, parts):
        server.script["POST /pause"] = status
        with pytest.raises(VLLMServerError, match=f"answered {status}") as caught:
            client.pause()
        assert caught.value.status_code == status
        assert all(part in caught.value.fix for part in parts)

    @pytest.mark.parametrize(
        ("call", "route", "parts"),
        [
            (lambda c: c.pause(), "POST /pause", ["trl vllm-serve", "VLLM_SERVER_DEV_MODE=1"]),
            (
                lambda c: c.load_lora_adapter("v1", "dir"),
                "POST /v1/load_lora_adapter",
                ["--enable-lora", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"],
            ),
            (lambda c: c.route_adapter("v1", 1), "POST /atropos/adapter", ["--middleware"]),
        ],
    )
    def test_a_route_that_is_not_there_names_what_brings_it(self, client, server, call, route, parts):
        server.script[route] = 404
        with pytest.raises(VLLMServerError) as caught:
            call(client)
        assert all(part in caught.value.fix for part in parts)

    def test_an_adapter_that_is_not_there_is_no_missing_route(self, client):
        with pytest.raises(VLLMServerError, match="'v1' cannot be found") as caught:
            client.unload_lora_adapter("v1")
        assert caught.value.status_code == 404
        assert "--enable-lora" not in caught.value.fix

    def test_long_pages_are_cut(self, client, server):
        server.script["POST /pause"] = {"error": "x" * 10_000}
        with pytest.raises(VLLMServerError) as caught:
            client.pause()
        assert len(str(caught.value)) < 1_000

    def test_a_server_without_dev_mode(self, client, server):
        server.script["GET /server_info"] = 404
        for question in (client.get_server_info, client.get_server_environment):
            with pytest.raises(PreflightError, match="VLLM_SERVER_DEV_MODE=1"):
                question()

    def test_travel_between_ranks(self, client, server):
        server.script["POST /pause"] = 418
        with pytest.raises(VLLMServerError) as caught:
            client.pause()
        arrived = pickle.loads(pickle.dumps(caught.value))
        assert type(arrived) is VLLMServerError
        assert (arrived.status_code, arrived.detail) == (418, caught.value.detail)
        assert str(arrived) == str(caught.value)


class TestConnecting:
    def test_waits_for_a_server_that_is_starting(self, server):
        server.script["GET /health"] = [503, "close", None]
        client = AtroposVLLMClient(server.base_url, connection_timeout=20)
        assert client.model == "policy"
        assert [request.route for request in server.requests].count("GET /health") == 3

    def test_reports_what_it_waits_for(self, client, server, monkeypatch, caplog):
        monkeypatch.setattr("trl_atropos.progress.REMINDER_INTERVAL_S", 0.0)
        monkeypatch.setattr(health, "HEALTH_INTERVAL_S", 0.01)
        server.script["GET /health"] = [503, "close", None]
        with caplog.at_level(logging.INFO, logger="trl_atropos"):
            client.wait_until_healthy(20)
        first, second = (record.getMessage() for record in caplog.records)
        assert "/health answers 503" in first
        assert "no connection" in second

    @pytest.mark.parametrize(
        ("action", "state"),
        [(503, "/health answers 503"), ("close", "no connection"), ("stall", "/health does not answer")],
    )
    def test_says_at_the_end_what_was_wrong(self, server, action, state):
        server.script["GET /health"] = action
        with pytest.raises(WeightSyncTimeout, match=rf"not healthy after 0 s \({state}\)") as caught:
            AtroposVLLMClient(server.base_url, connection_timeout=0)
        assert "--vllm_server_timeout" in caught.value.fix

    @pytest.mark.parametrize("action", [503, "stall", "dribble"])
    def test_the_wait_ends_in_time(self, server, action):
        server.script["GET /health"] = action
        start = time.monotonic()
        with pytest.raises(WeightSyncTimeout):
            AtroposVLLMClient(server.base_url, connection_timeout=0.6)
        assert 0.6 <= time.monotonic() - start < 0.6 + SLACK_S

    def test_nobody_listens(self, server):
        server.stop()
        with pytest.raises(WeightSyncTimeout, match=r"no connection.*trl vllm-serve"):
            AtroposVLLMClient(server.base_url, connection_timeout=0)

    @pytest.mark.parametrize(
        "models", ["missing", "html", b'{"data": []}', b'{"data": 3}', b'{"data": [{}]}', b'{"data": [3]}', 401]
    )
    def test_something_that_lists_no_models_is_no_server(self, server, models):
        server.script["GET /v1/models"] = models
        with pytest.raises(WeightSyncError):
            AtroposVLLMClient(server.base_url, connection_timeout=5)

    @pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://user:pass@host:8000"])
    def test_a_url_that_cannot_work_is_refused_at_once(self, url):
        with pytest.raises(PreflightError, match="--vllm_server_base_url") as caught:
            AtroposVLLMClient(url)
        assert "pass@" not in str(caught.value)

    @pytest.mark.parametrize("api_key", ["secret\n", "sécret"])
    def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(self, server, api_key):
        with pytest.raises(PreflightError, match="--vllm_api_key") as caught:
            AtroposVLLMClient(server.base_url, api_key=api_key)
        assert "cret" not in str(caught.value)


class TestWhatTrlOffers:
    @pytest.mark.parametrize(
        "call",
        [
            lambda c: c.update_named_param("x", None),
            lambda c: c.update_named_params([], iter([])),
            lambda c: c.update_model_params(None),
            lambda c: c.weight_update(),
            lambda c: c.init_communicator("cpu"),
        ],
    )
    def test_ways_to_change_a_server_that_answers_are_refused_before_anything_is_sent(self, client, server, call):
        with pytest.raises(WeightSyncError, match=r"client\.weight_sync"):
            call(client)
        assert server.requests == []
