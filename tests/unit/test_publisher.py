"""The order of a publish and what is left behind when a step of it fails, over real sockets."""

from __future__ import annotations

import json
import mmap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_atropos.errors import PreflightError, WeightSyncError, WeightSyncTimeout
from trl_atropos.metrics import METRICS
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.shm import SharedMemoryTransport
from trl_atropos.weight_sync.shm_segment import REPORT_BYTES, SEGMENT_DIR, segment_path
from trl_atropos.weight_sync.vllm_client import AtroposVLLMClient


VOCAB_SIZE = 64
DEADLINE_S = 0.4
FIRST_PUBLISH = [
    "GET /get_world_size",
    "POST /init_weight_transfer_engine",
    "POST /pause",
    "POST /start_weight_update",
    "POST /update_weights",
    "POST /finish_weight_update",
    "POST /resume",
    "GET /weight_info",
    "POST /v1/completions",
]
CONTROL_POSTS = [route for route in FIRST_PUBLISH if route.startswith("POST ") and "completions" not in route]


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


class ScriptedServer(ThreadingHTTPServer):
    """vLLM's control routes and their state, without an engine. `script` makes a route fail.

    Values of `script`, by "METHOD /route": a status code, `"close"` (the connection breaks), `"stall"` (no answer),
    `"html"` (200 with something else than JSON), or a dict (200 with that JSON, 400 if it has an `error`).
    """

    daemon_threads = True

    def __init__(self, model: torch.nn.Module):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.script: dict[str, Any] = {}
        self.requests: list[str] = []
        self.bodies: dict[str, Any] = {}
        self.authorizations: set[str | None] = set()
        self.is_paused = False
        self.weight_version = "default"
        self.released = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are part of these tests."""

    def answer(self, route: str, body: Any) -> dict[str, Any]:
        name = route.split(" ")[1]
        if name == "/v1/models":
            return {"data": [{"id": "policy"}]}
        if name == "/get_world_size":
            return {"world_size": 1}
        if name == "/pause":
            self.is_paused = True
        if name == "/resume":
            self.is_paused = False
        if name == "/init_weight_transfer_engine":
            with open(segment_path(body["init_info"]["segment"]), "r+b") as file:
                self.mapping = mmap.mmap(file.fileno(), 0)
            self.data_bytes = body["init_info"]["data_bytes"]
        if name == "/update_weights":
            self.load(body["update_info"])
        if name == "/finish_weight_update":
            self.weight_version = body["weight_version"]
        if name == "/weight_info":
            return {"weight_version": self.weight_version}
        if name == "/v1/completions":
            return {"choices": [{"prompt_logprobs": self.score(ids)} for ids in body["prompt"]]}
        return {"status": "ok"}

    def load(self, update: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        num_bytes = 0
        for name, shape, offset in zip(update["names"], update["shapes"], update["offsets"], strict=True):
            count = torch.Size(shape).numel()
            num_bytes += 2 * count
            data = bytearray(self.mapping[offset : offset + 2 * count])
            parameters[name].data.copy_(torch.frombuffer(data, dtype=torch.bfloat16).view(shape))
        report = {
            "sequence": update["sequence"],
            "num_tensors": len(update["names"]),
            "num_bytes": num_bytes,
            "load_s": 0.0,
        }
        self.mapping[self.data_bytes : self.data_bytes + REPORT_BYTES] = (
            json.dumps(report).encode().ljust(REPORT_BYTES, b"\0")
        )

    @torch.no_grad()
    def score(self, ids: list[int]) -> list[Any]:
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scored = [{str(ids[t]): {"logprob": logprobs[t - 1, ids[t]].item(), "rank": 1}} for t in range(1, len(ids))]
        return [None, *scored]


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_GET(self) -> None:
        self.respond("GET")

    def do_POST(self) -> None:
        self.respond("POST")

    def respond(self, method: str) -> None:
        server, route = self.server, f"{method} {self.path.partition('?')[0]}"
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        server.authorizations.add(self.headers.get("Authorization"))
        if route != "GET /health":
            server.requests.append(route)
            server.bodies[route] = body if body is not None else self.path
        action = server.script.get(route, {})
        if action == "stall":
            server.released.wait(30)
        if action in ("stall", "close"):
            self.close_connection = True
            return
        if action == "html":
            return self.send(200, b"<html>a proxy</html>")
        if isinstance(action, int):
            return self.send(action, json.dumps({"error": {"message": f"scripted {action}"}}).encode())
        if isinstance(action, dict) and "error" in action:
            return self.send(400, json.dumps(action).encode())
        self.send(200, json.dumps(action or server.answer(route, body)).encode())

    def send(self, status: int, payload: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    # Starts with another policy than the trainer's.
    server = ScriptedServer(tiny_llama(seed=1))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def publisher(server: ScriptedServer) -> Iterator[PolicyPublisher]:
    client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=5, api_key="secret")
    server.requests.clear()
    probe = LogprobProbe(None, VOCAB_SIZE)
    publisher = PolicyPublisher(client, SharedMemoryTransport(), probe, torch.bfloat16, probe_tolerance=4.0)
    before = set(Path(SEGMENT_DIR).iterdir())
    yield publisher
    publisher.close()
    assert not {path for path in set(Path(SEGMENT_DIR).iterdir()) - before if path.name.startswith("trl_atropos")}


def failure(publisher: PolicyPublisher, version: int = 1) -> WeightSyncError:
    with pytest.raises(WeightSyncError) as caught:
        publisher.publish(tiny_llama(), version)
    return caught.value


class TestOrder:
    def test_of_the_first_publish(self, publisher, server):
        report = publisher.publish(tiny_llama(), 0)
        assert server.requests == FIRST_PUBLISH
        assert "mode=keep" in server.bodies["POST /pause"]
        assert server.bodies["POST /finish_weight_update"] == {"weight_version": "0"}
        assert not server.is_paused
        assert report.policy_version == 0
        # bfloat16 rounding of a one-layer model
        assert report.probe.mean_abs_diff < 0.05

    def test_later_publishes_do_not_connect_again_and_move_the_server(self, publisher, server):
        publisher.publish(tiny_llama(), 0)
        server.requests.clear()
        publisher.publish(tiny_llama(seed=2), 1)
        assert server.requests == FIRST_PUBLISH[2:]
        assert server.weight_version == "1"
        expected = tiny_llama(seed=2).lm_head.weight.to(torch.bfloat16).float()
        assert torch.equal(server.model.lm_head.weight, expected)

    def test_the_report_counts_bytes_and_seconds_under_known_names(self, publisher):
        model = tiny_llama()
        report = publisher.publish(model, 3)
        assert report.num_bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
        assert set(report.phase_s) == {"stage", "pause", "transfer", "finish", "resume", "verify"}
        assert report.paused_s < report.total_s
        assert report.metrics().keys() <= METRICS.keys()
        assert report.metrics()["perf/weight_sync_bytes"] == report.num_bytes

    def test_the_server_is_paused_while_its_weights_change(self, publisher, server):
        seen = {}
        answer = server.answer

        def watch(route, body):
            result = answer(route, body)
            seen[route] = server.is_paused
            return result

        server.answer = watch
        publisher.publish(tiny_llama(), 0)
        assert [route for route in FIRST_PUBLISH if seen[route]] == FIRST_PUBLISH[2:6]

    def test_an_unfinished_update_of_a_dead_trainer_is_completed(self, publisher, server):
        server.script["POST /start_weight_update"] = {"error": {"message": "A weight update is already active."}}
        publisher.publish(tiny_llama(), 5)
        assert server.requests == FIRST_PUBLISH
        assert (server.weight_version, server.is_paused) == ("5", False)


STATE_AFTER = {
    "POST /init_weight_transfer_engine": "serves the previous policy",
    "POST /pause": "may be paused; it holds the previous policy",
    "POST /start_weight_update": "is paused and holds no complete policy",
    "POST /update_weights": "is paused and holds no complete policy",
    "POST /finish_weight_update": "is paused and may hold no complete policy",
    "POST /resume": "holds the new policy and may be paused",
}
PHASE_OF = {
    "POST /pause": "pause",
    "POST /start_weight_update": "transfer",
    "POST /update_weights": "transfer",
    "POST /finish_weight_update": "finish",
    "POST /resume": "resume",
}


class TestFailures:
    @pytest.mark.parametrize("action", [500, "close", "html"])
    @pytest.mark.parametrize("route", CONTROL_POSTS)
    def test_a_control_request_is_sent_exactly_once(self, publisher, server, route, action):
        server.script[route] = action
        error = failure(publisher)
        assert server.requests.count(route) == 1
        # Nothing follows a failed request.
        assert server.requests == FIRST_PUBLISH[: FIRST_PUBLISH.index(route) + 1]
        assert STATE_AFTER[route] in error.why
        assert f"phase `{PHASE_OF.get(route, 'idle')}`" in error.what
        assert "Publishing policy version 1 failed" in error.what

    @pytest.mark.parametrize("route", CONTROL_POSTS)
    def test_a_stalled_request_ends_at_its_deadline(self, publisher, server, route):
        publisher.client.request_timeout = DEADLINE_S
        server.script[route] = "stall"
        start = time.monotonic()
        error = failure(publisher)
        # Seconds for a busy machine.
        assert DEADLINE_S <= time.monotonic() - start < DEADLINE_S + 5
        assert isinstance(error, WeightSyncTimeout)
        assert isinstance(error, TimeoutError)
        assert f"{route} of the vLLM server at {server.base_url} did not answer within {DEADLINE_S} s" in error.what
        assert STATE_AFTER[route] in error.why
        assert "--weight_sync_timeout" in error.fix
        assert server.requests.count(route) == 1

    @pytest.mark.parametrize("route", ["POST /update_weights", "POST /finish_weight_update"])
    def test_half_a_policy_is_never_served(self, publisher, server, route):
        server.script[route] = 500
        failure(publisher)
        assert server.is_paused
        assert "POST /resume" not in server.requests

    def test_a_worker_that_loaded_nothing_leaves_the_server_paused(self, publisher, server):
        server.load = lambda update: None
        error = failure(publisher)
        assert "Worker 0 reports" in error.what
        assert server.is_paused
        assert not {"POST /finish_weight_update", "POST /resume"} & set(server.requests)

    def test_the_publish_after_a_failure_mends_the_server(self, publisher, server):
        server.script["POST /finish_weight_update"] = 500
        failure(publisher)
        server.script = {"POST /start_weight_update": {"error": {"message": "A weight update is already active."}}}
        publisher.publish(tiny_llama(), 1)
        assert (server.weight_version, server.is_paused) == ("1", False)

    def test_the_servers_own_words_are_in_the_error(self, publisher, server):
        server.script["POST /update_weights"] = 500
        assert "answered 500: " in (what := failure(publisher).what)
        assert "scripted 500" in what


class TestVerify:
    def test_another_version_pauses_the_server_again(self, publisher, server):
        server.script["GET /weight_info"] = {"weight_version": "7"}
        error = failure(publisher)
        assert "reports weight version '7' after version 1 was published" in error.what
        assert "Another trainer" in error.why
        assert "is paused" in error.why
        assert server.is_paused
        assert server.requests[-2:] == ["GET /weight_info", "POST /pause"]

    def test_a_policy_that_did_not_arrive_pauses_the_server_again(self, publisher, server):
        # Version, manifest and reports are right, the weights are not those that were sent.
        load, server.load = server.load, lambda update: (load(update), server.model.load_state_dict(other))
        other = tiny_llama(seed=1).state_dict()
        error = failure(publisher)
        assert "Trainer and server disagree after version 1 was published" in error.what
        assert "--logprob_probe_tolerance" in error.fix
        assert server.is_paused

    def test_nan_of_the_trainer_pauses_the_server_again(self, publisher, server):
        model = tiny_llama()
        model.lm_head.weight.data[3, 3] = float("nan")
        with pytest.raises(WeightSyncError, match=r"mean \|logprob difference\| (nan|inf)"):
            publisher.publish(model, 1)
        assert server.is_paused

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_logprobs_of_the_server_that_are_no_numbers_pause_it_again(self, publisher, server, value):
        server.score = lambda ids: [None, *[{str(token): {"logprob": value, "rank": 1}} for token in ids[1:]]]
        with pytest.raises(WeightSyncError, match=r"mean \|logprob difference\| (nan|inf)"):
            publisher.publish(tiny_llama(), 1)
        assert server.is_paused

    @pytest.mark.parametrize("action", [500, "close", "stall", "html"])
    @pytest.mark.parametrize("route", ["GET /weight_info", "POST /v1/completions"])
    def test_a_policy_that_cannot_be_proved_is_not_served(self, publisher, server, route, action):
        publisher.client.request_timeout = DEADLINE_S
        server.script[route] = action
        error = failure(publisher)
        assert "phase `verify`" in error.what
        assert "is paused and holds a policy that is not proven to be the trainer's" in error.why
        assert server.is_paused
        assert server.requests.count(route) == 1

    def test_a_server_that_cannot_be_paused_again_is_said_to_serve(self, publisher, server):
        answer = server.answer

        def pause_fails_after_resume(route, body):
            if route == "POST /resume":
                server.script["POST /pause"] = 500
            return answer(route, body)

        server.answer = pause_fails_after_resume
        server.script["POST /v1/completions"] = 500
        error = failure(publisher)
        assert "could not be paused" in error.why
        assert "may serve a policy that is not proven" in error.why
        assert not server.is_paused


class TestClient:
    def test_every_request_carries_the_api_key(self, publisher, server):
        publisher.publish(tiny_llama(), 0)
        assert server.authorizations == {"Bearer secret"}

    def test_without_a_key_none_is_sent(self, server):
        AtroposVLLMClient(server.base_url, connection_timeout=5).pause()
        assert server.authorizations == {None}

    def test_401_says_where_the_key_comes_from(self, publisher, server):
        server.script["POST /pause"] = 401
        error = failure(publisher)
        assert "answered 401" in error.what
        assert "--vllm_api_key" in error.fix
        assert "VLLM_API_KEY" in error.fix

    def test_401_while_connecting_says_the_same(self, server):
        server.script["GET /v1/models"] = 401
        with pytest.raises(WeightSyncError, match="--vllm_api_key"):
            AtroposVLLMClient(server.base_url, connection_timeout=5)

    @pytest.mark.parametrize("route", ["POST /pause", "POST /start_weight_update", "POST /finish_weight_update"])
    def test_404_names_the_command_that_has_the_route(self, publisher, server, route):
        server.script[route] = 404
        error = failure(publisher)
        assert "answered 404" in error.what
        assert "trl vllm-serve" in error.fix
        assert "VLLM_SERVER_DEV_MODE=1" in error.fix

    def test_a_server_without_dev_mode_is_a_preflight_error(self, publisher, server):
        server.script["GET /server_info"] = 404
        with pytest.raises(PreflightError, match="VLLM_SERVER_DEV_MODE=1"):
            publisher.client.get_server_info()

    def test_an_unhealthy_server_ends_the_wait_with_what_it_answers(self, server):
        server.script["GET /health"] = 503
        with pytest.raises(WeightSyncTimeout, match=r"not healthy after 0 s \(/health answers 503\)"):
            AtroposVLLMClient(server.base_url, connection_timeout=0)

    def test_a_server_that_is_not_there_ends_the_wait(self, server):
        server.shutdown()
        server.server_close()
        with pytest.raises(WeightSyncTimeout, match=r"ConnectionError.*trl vllm-serve"):
            AtroposVLLMClient(server.base_url, connection_timeout=0)

    def test_a_failed_update_is_not_finished(self, publisher, server):
        with pytest.raises(KeyError), publisher.client.weight_update("4"):
            raise KeyError("a tensor")
        assert server.requests == ["POST /start_weight_update"]

    def test_a_trailing_slash_of_the_url_does_not_matter(self, server):
        AtroposVLLMClient(server.base_url + "/", connection_timeout=5).resume()
        assert server.requests[-1] == "POST /resume"
