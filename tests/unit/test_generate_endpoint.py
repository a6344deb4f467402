"""`GenerateEndpoint` around a small ASGI application in the place of vLLM: what reaches it, and what comes back.

The real server is met in tests/e2e/test_generate_endpoint.py.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar, NamedTuple

import pytest

from trl_atropos.rollout_key import rollout_key
from trl_atropos.serving import generate_endpoint
from trl_atropos.serving.generate_endpoint import GenerateEndpoint


PROMPT = [7, 11, 13]
INNER = "/inference/v1/generate"


class Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class TinyServer:
    """An ASGI application that answers each path with a fixed status and body, and records what it was asked.

    Args:
        answers (`dict[str, tuple[int, bytes]]`):
            Path -> status and body; any other path is a 404.
    """

    def __init__(self, answers: dict[str, tuple[int, bytes]]):
        self.answers = answers
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        chunks, more = [], True
        while more:
            message = await receive()
            chunks.append(message["body"])
            more = message.get("more_body", False)
        self.scopes.append(scope)
        self.bodies.append(b"".join(chunks))
        status, body = self.answers.get(scope["path"], (404, b'{"detail":"Not Found"}'))
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-server", b"tiny")]})
        # In two parts: a body may come in any number of them.
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        await send({"type": "http.response.body", "body": body[1:]})

    @property
    def paths(self) -> list[str]:
        return [scope["path"] for scope in self.scopes]

    def header(self, name: bytes) -> list[bytes]:
        """The values of a header of the last request."""
        return [value for key, value in self.scopes[-1]["headers"] if key.lower() == name]

    @property
    def inner(self) -> dict[str, Any]:
        """The last request to vLLM's own route."""
        assert self.paths[-1] == INNER
        return json.loads(self.bodies[-1])


def choice(index: int = 0, token_ids: tuple[int, ...] = (3, 4), **fields: Any) -> dict[str, Any]:
    """A choice as vLLM's route answers it; the logprob of token id i is -i / 8."""
    content = [{"token": f"token_id:{i}", "token_id": i, "logprob": -i / 8, "top_logprobs": []} for i in token_ids]
    values = {"index": index, "token_ids": list(token_ids), "finish_reason": "stop", "logprobs": {"content": content}}
    return {**values, **fields}


def server_of(*choices: dict[str, Any], **fields: Any) -> TinyServer:
    body = json.dumps({"request_id": "1", "choices": list(choices) or [choice()], **fields}).encode()
    tokenized = json.dumps({"tokens": [20, 21], "count": 2}).encode()
    return TinyServer({INNER: (200, body), "/tokenize": (200, tokenized), "/v1/models": (200, b'{"data":[]}')})


def http_scope(path: str, method: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"a=1",
        "root_path": "",
        "headers": headers,
    }


def call(app: Any, path: str, *parts: bytes, method: str = "POST", headers: Any = (), **scope: Any) -> Answer:
    """One request; each of `parts` is one message of its body. After the body the caller hangs up."""
    waiting = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts or (b"",), start=1)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({**http_scope(path, method, list(headers)), **scope}, receive, send))
    assert [message["type"] for message in sent[:1]] == ["http.response.start"]
    body = b"".join(message["body"] for message in sent[1:])
    return Answer(sent[0]["status"], sent[0]["headers"], body)


def generate(app: Any, headers: Any = (), **fields: Any) -> Answer:
    body = {"prompt": {"prompt_token_ids": PROMPT}, **fields}
    return call(app, "/generate", json.dumps(body).encode(), headers=headers)


def policy_versions(app: Any, *sequences: list[int]) -> Answer:
    body = json.dumps({"rollout_keys": [rollout_key(sequence) for sequence in sequences]}).encode()
    return call(app, "/atropos/policy_versions", body)


class TestRequest:
    def test_silent_request_carries_every_neutral_parameter(self):
        # Left out, each of them would be filled in from the model's generation_config.json.
        server = server_of()
        assert generate(GenerateEndpoint(server)).status == 200
        assert server.inner == {
            "token_ids": PROMPT,
            "stream": False,
            "sampling_params": {
                "n": 1,
                "max_tokens": 16,  # the default of vLLM's demo server
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "repetition_penalty": 1.0,
                "logprobs": 0,
                "output_kind": 2,  # vllm.sampling_params.RequestOutputKind.FINAL_ONLY
            },
        }

    def test_parameters_of_the_request_win(self):
        server = server_of()
        asked = {"n": 2, "max_tokens": 9, "temperature": 0.5, "top_k": 3, "stop": ["x"], "logprobs": 1}
        assert generate(GenerateEndpoint(server), **asked).status == 200
        assert server.inner["sampling_params"].items() >= asked.items()
        assert server.inner["sampling_params"]["top_p"] == 1.0

    def test_null_logprobs_are_asked_for_all_the_same(self):
        server = server_of()
        assert generate(GenerateEndpoint(server), logprobs=None).status == 200
        assert server.inner["sampling_params"]["logprobs"] == 0

    def test_output_kind_of_the_request_does_not_win(self):
        server = server_of()
        assert generate(GenerateEndpoint(server), output_kind=0).status == 200
        assert server.inner["sampling_params"]["output_kind"] == 2

    def test_stream_false_is_no_sampling_parameter(self):
        server = server_of()
        assert generate(GenerateEndpoint(server), stream=False).status == 200
        assert "stream" not in server.inner["sampling_params"]

    def test_string_prompt_is_tokenized_by_the_server(self):
        server = server_of()
        assert generate(GenerateEndpoint(server), prompt="hello").status == 200
        assert server.paths == ["/tokenize", INNER]
        assert json.loads(server.bodies[0]) == {"prompt": "hello"}
        assert server.inner["token_ids"] == [20, 21]

    def test_body_in_parts_and_trailing_slash(self):
        server = server_of()
        body = json.dumps({"prompt": {"prompt_token_ids": PROMPT}}).encode()
        assert call(GenerateEndpoint(server), "/generate/", body[:5], body[5:9], body[9:]).status == 200
        assert server.inner["token_ids"] == PROMPT

    def test_headers_of_the_caller_are_kept_and_those_of_its_body_replaced(self):
        server = server_of()
        theirs = [(b"Authorization", b"Bearer key"), (b"x-request-id", b"9")]
        of_body = [(b"Content-Length", b"1"), (b"content-type", b"text/plain"), (b"Accept-Encoding", b"gzip")]
        assert generate(GenerateEndpoint(server), headers=theirs + of_body).status == 200
        assert server.header(b"authorization") == [b"Bearer key"]
        assert server.header(b"x-request-id") == [b"9"]
        assert server.header(b"content-length") == [str(len(server.bodies[-1])).encode()]
        assert server.header(b"content-type") == [b"application/json"]
        assert server.header(b"accept-encoding") == []

    def test_inner_request_is_a_post_below_the_root_path_without_the_query(self):
        server = server_of()
        server.answers["/root" + INNER] = server.answers[INNER]
        body = json.dumps({"prompt": {"prompt_token_ids": PROMPT}}).encode()
        assert call(GenerateEndpoint(server), "/generate", body, root_path="/root").status == 200
        scope = server.scopes[-1]
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/root" + INNER, b"")
        assert scope["raw_path"] == scope["path"].encode()

    def test_state_of_the_inner_request_is_its_own(self):
        server, state = server_of(), {"request_id": 1}
        body = json.dumps({"prompt": "hello"}).encode()
        call(GenerateEndpoint(server), "/generate", body, state=state)
        assert [scope["state"] == state for scope in server.scopes] == [True, True]
        assert [scope["state"] is state for scope in server.scopes] == [False, False]

    def test_disconnect_of_the_caller_reaches_the_server(self):
        seen = []

        async def server(scope: Any, receive: Any, send: Any) -> None:
            seen.extend([(await receive())["type"], (await receive())["type"]])
            await send({"type": "http.response.start", "status": 499, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

        assert generate(GenerateEndpoint(server)).status == 499
        assert seen == ["http.request", "http.disconnect"]

    def test_disconnect_within_the_body_asks_the_server_nothing(self):
        server, sent = server_of(), []
        waiting = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return waiting.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(GenerateEndpoint(server)(http_scope("/generate", "POST", []), receive, send))
        assert (server.paths, sent[0]["status"]) == ([], 400)


class TestAnswer:
    def test_choices_come_sorted_by_index(self):
        second, first = choice(1, (5,), finish_reason="length"), choice(0, (3, 4))
        answer = generate(GenerateEndpoint(server_of(second, first)), n=2)
        # -3 / 8, -4 / 8 and -5 / 8
        assert answer.json == {
            "logprobs": [[[{"3": -0.375}], [{"4": -0.5}]], [[{"5": -0.625}]]],
            "finish_reasons": ["stop", "length"],
        }

    def test_content_length_is_that_of_the_answer(self):
        answer = generate(GenerateEndpoint(server_of()))
        assert dict(answer.headers)[b"content-length"] == str(len(answer.body)).encode()
        assert dict(answer.headers)[b"content-type"] == b"application/json"

    def test_prompt_logprobs_are_mapped(self):
        entry = {"logprob": -0.5, "rank": 1, "decoded_token": "x"}
        server = server_of(prompt_logprobs=[None, {"11": entry, "2": {**entry, "logprob": -2.0}}, {"13": entry}])
        answer = generate(GenerateEndpoint(server), prompt_logprobs=1)
        assert server.inner["sampling_params"]["prompt_logprobs"] == 1
        assert answer.json["prompt_logprobs"] == [None, {"11": -0.5, "2": -2.0}, {"13": -0.5}]

    @pytest.mark.parametrize("status", [400, 401, 500])
    def test_errors_of_the_inner_route_pass_with_status_and_body(self, status: int):
        server = server_of()
        server.answers[INNER] = (status, b'{"error": \t{"message":"no"}}')
        assert generate(GenerateEndpoint(server))[::2] == (status, b'{"error": \t{"message":"no"}}')

    def test_error_of_the_tokenizer_route_passes(self):
        server = server_of()
        server.answers["/tokenize"] = (401, b'{"error":"Unauthorized"}')
        answer = generate(GenerateEndpoint(server), prompt="hello")
        assert (answer.status, answer.json) == (401, {"error": "Unauthorized"})
        assert server.paths == ["/tokenize"]

    def test_error_of_the_tokenizer_route_passes_also_when_it_is_not_json(self):
        server = server_of()
        server.answers["/tokenize"] = (500, b"Internal Server Error")  # how Starlette words an unhandled exception
        assert generate(GenerateEndpoint(server), prompt="hello")[::2] == (500, b"Internal Server Error")

    def test_missing_inner_route_is_501_with_the_option(self):
        server = server_of()
        del server.answers[INNER]
        answer = generate(GenerateEndpoint(server))
        assert answer.status == 501
        assert "--enable-scale-out" in answer.json["error"]["message"]

    def test_one_aborted_choice_makes_the_answer_503_and_is_not_remembered(self):
        versions = [{"version": "1"}]
        server = server_of(choice(0, weight_versions=versions), choice(1, finish_reason="abort"))
        app = GenerateEndpoint(server)
        assert generate(app, n=2).status == 503
        assert policy_versions(app, [*PROMPT, 3, 4]).json == {"policy_versions": [None]}

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"{", "not JSON"),
            (b"[1]", "must be a JSON object, got list"),
            (b"{}", "`prompt` must be"),
            (b'{"prompt": 5}', "got 5"),
            (b'{"prompt": {"prompt_token_ids": "7"}}', "`prompt` must be"),
            (b'{"prompt": "hello", "stream": true}', "`stream` is not supported"),
            (b'{"prompt": {"prompt_token_ids": [7]}, "top-k": 3, "best": 1}', "best, top-k"),
        ],
    )
    def test_bad_request_is_400_with_its_cause_and_never_sampled(self, body: bytes, words: str):
        server = server_of()
        answer = call(GenerateEndpoint(server), "/generate", body)
        assert answer.status == 400
        assert words in answer.json["error"]["message"]
        assert INNER not in server.paths


class TestOtherRoutes:
    @pytest.mark.parametrize(
        ("method", "path"), [("GET", "/generate"), ("POST", "/v1/completions"), ("POST", "/generate_x")]
    )
    def test_bytes_are_the_same_with_and_without_the_middleware(self, method: str, path: str):
        bare, wrapped = TinyServer({path: (201, b"\x00\xff{")}), TinyServer({path: (201, b"\x00\xff{")})
        headers = [(b"content-length", b"4"), (b"accept-encoding", b"gzip")]
        answers = [
            call(app, path, b"\xfe{", b" \n", method=method, headers=headers)
            for app in (bare, GenerateEndpoint(wrapped))
        ]
        assert answers[0] == answers[1] == (201, [(b"x-server", b"tiny")], b"\x00\xff{")
        assert (wrapped.scopes, wrapped.bodies) == (bare.scopes, [b"\xfe{ \n"])

    @pytest.mark.parametrize("kind", ["lifespan", "websocket"])
    def test_what_is_not_http_gets_the_very_same_arguments(self, kind: str):
        seen = []

        async def server(*arguments: Any) -> None:
            seen.extend(arguments)

        async def nothing(*arguments: Any) -> None:
            raise AssertionError("the middleware neither reads nor writes here")

        scope = {"type": kind, "path": "/generate"}
        asyncio.run(GenerateEndpoint(server)(scope, nothing, nothing))
        assert seen[0] is scope
        assert seen[1:] == [nothing, nothing]


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

    @pytest.mark.parametrize(("asked", "shown"), [({"model": "base"}, "base"), ({}, "base")])
    def test_answer_names_the_model_that_was_asked_for(self, asked: dict[str, Any], shown: str):
        server = lora_server()
        # What a policy wrote is not a name, though it looks like one.
        body = {"id": "1", "model": ADAPTER, "choices": [{"text": f'"model":"{ADAPTER}"'}]}
        server.answers[COMPLETIONS] = (200, json.dumps(body, separators=(",", ":")).encode())
        answer = call(routed(server), COMPLETIONS, json.dumps(asked).encode())
        assert answer.json == {**body, "model": shown}
        assert dict(answer.headers) == {b"x-server": b"tiny", b"content-length": str(len(answer.body)).encode()}

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
        assert policy_versions(app, [*PROMPT, 3, 4]).json == {"policy_versions": [3]}

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
        assert policy_versions(app, [*PROMPT, 3, 4]).json == {"policy_versions": [3]}

    def test_adapter_of_somebody_else_has_none(self):
        for make in (routed, GenerateEndpoint):
            app = make(lora_server(choice(weight_versions=self.SPANS)))
            generate(app, model="lora-4")
            assert policy_versions(app, [*PROMPT, 3, 4]).json == {"policy_versions": [None]}

    def test_model_itself_has_that_of_its_label(self):
        for asked in ({}, {"model": "base"}):
            app = routed(lora_server(choice(weight_versions=self.SPANS)))
            route(app, None, 10)
            generate(app, **asked)
            assert policy_versions(app, [*PROMPT, 3, 4]).json == {"policy_versions": [8]}


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


class TestPolicyVersions:
    def test_oldest_span_counts_and_numbers_are_not_compared_as_text(self):
        app = GenerateEndpoint(server_of(choice(weight_versions=[{"version": "9"}, {"version": "10"}])))
        generate(app)
        assert policy_versions(app, [*PROMPT, 3, 4]).json == {"policy_versions": [9]}

    def test_each_choice_has_its_own_and_the_answer_keeps_the_order_of_the_keys(self):
        spans = [{"version": "1"}], [{"version": "2"}]
        app = GenerateEndpoint(server_of(*(choice(i, (i,), weight_versions=spans[i]) for i in range(2))))
        generate(app, n=2)
        answer = policy_versions(app, [*PROMPT, 1], [*PROMPT], [*PROMPT, 0])
        assert answer.json == {"policy_versions": [2, None, 1]}

    @pytest.mark.parametrize("spans", [None, [], [{"version": "default"}], [{"version": "default"}, {"version": "1"}]])
    def test_weights_that_no_trainer_published_have_no_version(self, spans: Any):
        app = GenerateEndpoint(server_of(choice(weight_versions=spans)))
        assert generate(app).status == 200
        assert policy_versions(app, [*PROMPT, 3, 4]).json == {"policy_versions": [None]}

    def test_table_is_bounded_and_forgets_the_one_sampled_longest_ago(self, monkeypatch):
        monkeypatch.setattr(generate_endpoint, "MAX_REMEMBERED_ROLLOUTS", 3)
        server = server_of()
        app = GenerateEndpoint(server)
        # 0 is sampled again before 3 comes, so 1 is the oldest then.
        for version, token in enumerate([0, 1, 2, 0, 3]):
            sampled = choice(token_ids=(token,), weight_versions=[{"version": str(version)}])
            server.answers[INNER] = (200, json.dumps({"choices": [sampled]}).encode())
            generate(app)
        sequences = [[*PROMPT, token] for token in range(4)]
        assert policy_versions(app, *sequences).json == {"policy_versions": [3, None, 2, 4]}

    def test_server_that_refuses_the_caller_answers_itself(self):
        server = server_of()
        server.answers["/v1/models"] = (401, b'{"error":"Unauthorized"}')
        body = b'{"rollout_keys": []}'
        headers = [(b"authorization", b"Bearer wrong")]
        answer = call(GenerateEndpoint(server), "/atropos/policy_versions", body, headers=headers)
        assert answer[::2] == (401, b'{"error":"Unauthorized"}')
        assert (server.scopes[-1]["method"], server.bodies[-1]) == ("GET", b"")
        assert server.header(b"authorization") == [b"Bearer wrong"]
        assert server.header(b"content-length") == [b"0"]

    @pytest.mark.parametrize("body", [b"{", b"{}", b'{"rollout_keys": "a"}', b'{"rollout_keys": [1]}'])
    def test_bad_request_is_400(self, body: bytes):
        assert call(GenerateEndpoint(server_of()), "/atropos/policy_versions", body).status == 400
