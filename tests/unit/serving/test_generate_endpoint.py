"""`GenerateEndpoint` around a small ASGI application in the place of vLLM: what reaches it, and what comes back.

The real server is met in tests/e2e/test_generate_endpoint.py.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tiny_asgi_server import (
    INNER,
    PROMPT,
    TinyServer,
    call,
    choice,
    generate,
    http_scope,
    policy_versions,
    server_of,
)

from trl_atropos.serving.generate_endpoint import GenerateEndpoint
from trl_atropos.wire import rollout_key


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
        assert policy_versions(app, [*PROMPT, 3, 4]).json["policy_versions"] == [None]

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


class TestPolicyVersions:
    def test_oldest_span_counts_and_numbers_are_not_compared_as_text(self):
        app = GenerateEndpoint(server_of(choice(weight_versions=[{"version": "9"}, {"version": "10"}])))
        generate(app)
        assert policy_versions(app, [*PROMPT, 3, 4]).json["policy_versions"] == [9]

    def test_each_choice_has_its_own_and_the_answer_keeps_the_order_of_the_keys(self):
        spans = [{"version": "1"}], [{"version": "2"}]
        app = GenerateEndpoint(server_of(*(choice(i, (i,), weight_versions=spans[i]) for i in range(2))))
        generate(app, n=2)
        answer = policy_versions(app, [*PROMPT, 1], [*PROMPT], [*PROMPT, 0])
        assert answer.json["policy_versions"] == [2, None, 1]

    @pytest.mark.parametrize("spans", [None, [], [{"version": "default"}], [{"version": "default"}, {"version": "1"}]])
    def test_weights_that_no_trainer_published_have_no_version(self, spans: Any):
        app = GenerateEndpoint(server_of(choice(weight_versions=spans)))
        assert generate(app).status == 200
        assert policy_versions(app, [*PROMPT, 3, 4]).json["policy_versions"] == [None]

    def test_table_is_bounded_and_forgets_the_one_sampled_longest_ago(self, monkeypatch):
        monkeypatch.setattr(rollout_key, "MAX_REMEMBERED_CALLS", 3)
        server = server_of()
        app = GenerateEndpoint(server)
        # 0 is sampled again before 3 comes, so 1 is the oldest then.
        for version, token in enumerate([0, 1, 2, 0, 3]):
            sampled = choice(token_ids=(token,), weight_versions=[{"version": str(version)}])
            server.answers[INNER] = (200, json.dumps({"choices": [sampled]}).encode())
            generate(app)
        sequences = [[*PROMPT, token] for token in range(4)]
        assert policy_versions(app, *sequences).json["policy_versions"] == [3, None, 2, 4]

    @pytest.mark.parametrize(
        ("parameters", "names"),
        [
            ({}, []),
            ({"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "logit_bias": {}}, []),
            ({"temperature": 0.5, "n": 1, "max_tokens": 3, "stop": ["a"], "seed": 1, "top_k": 0}, []),
            ({"top_p": 0.9, "top_k": 20}, ["top_k", "top_p"]),
            ({"min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1},
             ["frequency_penalty", "min_p", "presence_penalty", "repetition_penalty"]),
            ({"min_tokens": 2, "logit_bias": {"3": -100}, "bad_words": ["a"], "allowed_token_ids": [3]},
             ["allowed_token_ids", "bad_words", "logit_bias", "min_tokens"]),
        ],
        ids=["nothing said", "neutral", "no part of the distribution", "nucleus", "penalties", "constraints"],
    )  # fmt: skip
    def test_parameters_that_change_the_distribution_are_remembered_by_name(self, parameters, names):
        app = GenerateEndpoint(server_of(choice(weight_versions=[{"version": "9"}])))
        assert generate(app, **parameters).status == 200
        answer = policy_versions(app, [*PROMPT, 3, 4], [*PROMPT]).json
        assert answer == {"policy_versions": [9, None], "sampling_parameters": [names, None]}

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
