"""Routing to LoRA adapters around a small ASGI application in the place of vLLM.

The real server is met in tests/e2e/test_adapter_publish.py.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import pytest
from tiny_asgi_server import (
    INNER,
    PROMPT,
    Answer,
    TinyServer,
    call,
    choice,
    generate,
    http_scope,
    policy_versions,
    server_of,
)

from trl_atropos.serving.generate_endpoint import GenerateEndpoint


ADAPTER = "lora-3"
COMPLETIONS = "/v1/completions"


def lora_server(*choices: dict[str, Any]) -> TinyServer:
    """Serves the model "base" and two adapters."""
    server = server_of(*choices)
    models = [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in (ADAPTER, "lora-4"))]
    server.answers["/v1/models"] = (200, json.dumps({"data": models}).encode())
    return server


def route(app: Any, lora_name: str | None = ADAPTER, policy_version: int = 3) -> Answer:
    body = json.dumps({"lora_name": lora_name, "policy_version": policy_version}).encode()
    return call(app, "/atropos/adapter", body)


def routed(server: TinyServer) -> GenerateEndpoint:
    app = GenerateEndpoint(server)
    assert route(app).status == 200
    server.scopes.clear()
    server.bodies.clear()
    return app


class TestRoutingToAnAdapter:
    @pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", INNER])
    @pytest.mark.parametrize("model", [{}, {"model": "base"}, {"model": None}, {"model": ""}])
    def test_requests_for_the_model_go_to_the_adapter(self, path: str, model: dict[str, Any]):
        server = lora_server()
        server.answers[path] = (200, b"{}")
        body = json.dumps({"prompt": [7], **model, "stream": True}).encode()
        headers = [(b"Content-Length", b"1"), (b"transfer-encoding", b"chunked"), (b"x-request-id", b"9")]
        assert call(routed(server), path, body[:9], body[9:], headers=headers).status == 200
        assert json.loads(server.bodies[0]) == {"prompt": [7], "model": ADAPTER, "stream": True}
        assert server.header(b"content-length") == [str(len(server.bodies[0])).encode()]
        assert server.header(b"transfer-encoding") == []
        assert server.header(b"x-request-id") == [b"9"]

    @pytest.mark.parametrize(
        "body",
        [
            b'{ "model":"lora-4"}',
            b'{ "model":"unknown"}',
            b'{ "model":["base"]}',
            b'{ "model":5}',
            b"{ no json",
            b"[1]",
        ],
    )
    def test_other_requests_reach_the_server_as_they_are(self, body: bytes):
        server = lora_server()
        server.answers[COMPLETIONS] = (200, b'{"model":"lora-3"}')
        headers = [(b"content-length", b"1")]
        answer = call(routed(server), COMPLETIONS, body, headers=headers)
        assert (server.bodies, server.header(b"content-length")) == ([body], [b"1"])
        assert answer == (200, [(b"x-server", b"tiny")], b'{"model":"lora-3"}')

    @pytest.mark.parametrize(
        ("method", "path"), [("POST", "/tokenize"), ("GET", "/v1/models"), ("POST", "/v1/embeddings")]
    )
    def test_other_routes_are_not_routed(self, method: str, path: str):
        server = lora_server()
        call(routed(server), path, b'{ "model":"base"}', method=method)
        assert server.bodies == [b'{ "model":"base"}']

    def test_newest_adapter_counts_and_null_is_the_model_itself(self):
        server = lora_server()
        server.answers[COMPLETIONS] = (200, b"{}")
        app = routed(server)
        assert route(app, "lora-4", 4).json == {"lora_name": "lora-4", "policy_version": 4, "num_in_flight": {}}
        call(app, COMPLETIONS, b'{"model":"base"}')
        assert json.loads(server.bodies[-1]) == {"model": "lora-4"}
        assert route(app, None, 5).json == {"lora_name": None, "policy_version": 5, "num_in_flight": {}}
        call(app, COMPLETIONS, b'{ "model":"base"}')
        assert server.bodies[-1] == b'{ "model":"base"}'

    @pytest.mark.parametrize("asked", [{"model": "base"}, {}])
    def test_answer_names_the_model_that_was_asked_for(self, asked: dict[str, Any]):
        server = lora_server()
        # What a policy wrote is not a name, though it looks like one.
        body = {"id": "1", "model": ADAPTER, "choices": [{"text": f'"model":"{ADAPTER}"'}]}
        server.answers[COMPLETIONS] = (200, json.dumps(body, separators=(",", ":")).encode())
        answer = call(routed(server), COMPLETIONS, json.dumps(asked).encode())
        assert answer.json == {**body, "model": "base"}
        assert dict(answer.headers) == {
            b"x-server": b"tiny",
            b"x-atropos-policy-version": b"3",
            b"content-length": str(len(answer.body)).encode(),
        }

    def test_stream_is_not_held_back_and_names_the_model_that_was_asked_for(self):
        log: list[Any] = []

        async def server(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/v1/models":
                await lora_server()(scope, receive, send)
                return
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for number in range(2):
                event = b'data: {"model":"lora-3","n":%d}\n\n' % number
                await send({"type": "http.response.body", "body": event, "more_body": True})
                log.append(f"event {number} is sent")
            await send({"type": "http.response.body", "body": b""})

        async def receive() -> Any:
            return {"type": "http.request", "body": b'{"stream":true}'}

        async def send(message: Any) -> None:
            log.append(message.get("body", message["type"]))

        app = GenerateEndpoint(server)
        route(app)
        asyncio.run(app(http_scope(COMPLETIONS, "POST", []), receive, send))
        first, second = (b'data: {"model":"base","n":%d}\n\n' % number for number in range(2))
        assert log == ["http.response.start", first, "event 0 is sent", second, "event 1 is sent", b""]

    @pytest.mark.parametrize("status", [400, 500])
    def test_errors_pass_with_their_status(self, status: int):
        server = lora_server()
        server.answers[COMPLETIONS] = (status, b'{"error":"no"}')
        assert call(routed(server), COMPLETIONS, b"{}")[::2] == (status, b'{"error":"no"}')

    def test_disconnect_reaches_the_server(self):
        seen = []

        async def server(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/v1/models":
                return await lora_server()(scope, receive, send)
            seen.extend([(await receive())["type"], (await receive())["type"]])
            await send({"type": "http.response.start", "status": 499, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        app = GenerateEndpoint(server)
        route(app)
        assert call(app, COMPLETIONS, b"{}").status == 499
        assert seen == ["http.request", "http.disconnect"]

    def test_generate_goes_to_the_adapter(self):
        for asked, model in (({}, ADAPTER), ({"model": "base"}, ADAPTER), ({"model": "lora-4"}, "lora-4")):
            server = lora_server()
            assert generate(routed(server), **asked).status == 200
            assert server.inner["model"] == model
            assert "model" not in server.inner["sampling_params"]

    def test_generate_passes_a_name_on_when_nothing_is_routed(self):
        server = lora_server()
        assert generate(GenerateEndpoint(server), model="lora-4").status == 200
        assert server.inner["model"] == "lora-4"

    def test_adapter_that_is_gone_is_a_404_and_not_a_missing_route(self):
        server = lora_server()
        server.answers[INNER] = (404, b'{"error":{"message":"The model `lora-9` does not exist."}}')
        answer = generate(routed(server), model="lora-9")
        assert (answer.status, answer.json["error"]["message"]) == (404, "The model `lora-9` does not exist.")


class TestVersionsOfAdapters:
    SPANS: ClassVar = [{"version": "8"}, {"version": "9"}]

    def test_version_is_that_of_the_adapter_and_not_of_the_label(self):
        app = routed(lora_server(choice(weight_versions=self.SPANS)))
        generate(app)
        assert policy_versions(app, [*PROMPT, 3, 4]).json["policy_versions"] == [3]

    def test_request_keeps_the_version_that_it_began_with(self):
        server = lora_server()

        async def publish_meanwhile(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == INNER:
                await asyncio.to_thread(route, app, "lora-4", 4)
            await server(scope, receive, send)

        app = GenerateEndpoint(publish_meanwhile)
        route(app)
        generate(app)
        assert server.inner["model"] == ADAPTER
        assert policy_versions(app, [*PROMPT, 3, 4]).json["policy_versions"] == [3]

    def test_adapter_of_somebody_else_has_none(self):
        for make in (routed, GenerateEndpoint):
            app = make(lora_server(choice(weight_versions=self.SPANS)))
            generate(app, model="lora-4")
            assert policy_versions(app, [*PROMPT, 3, 4]).json["policy_versions"] == [None]

    def test_model_itself_has_that_of_its_label(self):
        for asked in ({}, {"model": "base"}):
            app = routed(lora_server(choice(weight_versions=self.SPANS)))
            route(app, None, 10)
            generate(app, **asked)
            assert policy_versions(app, [*PROMPT, 3, 4]).json["policy_versions"] == [8]


class TestAdapterRoute:
    def test_state_before_and_after(self):
        app = GenerateEndpoint(lora_server())
        nothing = {"lora_name": None, "policy_version": None, "num_in_flight": {}}
        assert call(app, "/atropos/adapter", method="GET").json == nothing
        state = {"lora_name": ADAPTER, "policy_version": 3, "num_in_flight": {}}
        assert route(app).json == call(app, "/atropos/adapter/", method="GET").json == state

    @pytest.mark.parametrize(
        ("path", "body", "name"),
        [
            ("/generate", {"prompt": {"prompt_token_ids": [7]}}, ADAPTER),
            (COMPLETIONS, {}, ADAPTER),
            (COMPLETIONS, {"model": "lora-4"}, "lora-4"),
        ],
    )
    def test_requests_in_flight_are_counted_until_they_end(self, path: str, body: dict[str, Any], name: str):
        server, states = lora_server(), []

        async def server_that_asks(scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] in (INNER, COMPLETIONS):
                states.append((await asyncio.to_thread(call, app, "/atropos/adapter", method="GET")).json)
                raise ConnectionResetError
            await server(scope, receive, send)

        app = GenerateEndpoint(server_that_asks)
        route(app)
        with pytest.raises(ConnectionResetError):
            call(app, path, json.dumps(body).encode())
        states.append(call(app, "/atropos/adapter", method="GET").json)
        assert [state["num_in_flight"] for state in states] == [{name: 1}, {}]

    def test_adapter_that_is_not_loaded_is_refused(self):
        app = routed(lora_server())
        for name in ("lora-9", "base", ""):
            assert route(app, name, 9).status == 404
        assert call(app, "/atropos/adapter", method="GET").json["lora_name"] == ADAPTER

    @pytest.mark.parametrize(
        "body",
        [
            b"{",
            b'{"policy_version": 1}',
            b'{"lora_name": 5, "policy_version": 1}',
            b'{"lora_name": "lora-3"}',
            b'{"lora_name": "lora-3", "policy_version": "1"}',
            b'{"lora_name": "lora-3", "policy_version": true}',
            b'{"lora_name": "lora-3", "policy_version": -1}',
        ],
    )
    def test_bad_request_is_400_and_changes_nothing(self, body: bytes):
        app = GenerateEndpoint(lora_server())
        assert call(app, "/atropos/adapter", body).status == 400
        assert call(app, "/atropos/adapter", method="GET").json["lora_name"] is None

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_server_that_refuses_the_caller_answers_itself(self, method: str):
        server = lora_server()
        server.answers["/v1/models"] = (401, b'{"error":"Unauthorized"}')
        app = GenerateEndpoint(server)
        answer = call(app, "/atropos/adapter", b'{"lora_name": "lora-3", "policy_version": 3}', method=method)
        assert answer[::2] == (401, b'{"error":"Unauthorized"}')
        server.answers["/v1/models"] = lora_server().answers["/v1/models"]
        assert call(app, "/atropos/adapter", method="GET").json["lora_name"] is None
