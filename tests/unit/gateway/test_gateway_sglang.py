"""A gateway in front of SGLang: the same is recorded as in front of vLLM. With a real server: tests/sglang/test_sglang_gateway.py."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from gateway_agents import ADD, CALL, ask, client, gateway_of, in_session, tool, user
from token_server import CHATML, Refused, SGLangTokenServer, TokenServer

from trl_atropos.errors import PreflightError
from trl_atropos.gateway.gateway import Gateway, GatewaySession


REPLIES = ["<think>so</think>Hello there.", CALL, "the sum is three then", "all the rest\0"]


async def converse(session: GatewaySession) -> list[Any]:
    """Thoughts, a call of a tool, a stop string, and an answer that is cut."""
    messages = [user("hi")]
    answers = [await ask(session.base_url, messages, tools=[ADD], temperature=1)]
    messages.append(user("add"))
    answers.append(await ask(session.base_url, messages, tools=[ADD], top_p=0.5))
    messages.append(tool(messages[-1]["tool_calls"][0], "3"))
    answers.append(await ask(session.base_url, messages, tools=[ADD], stop=["three"]))
    messages.append(user("and?"))
    answers.append(await ask(session.base_url, messages, tools=[ADD]))
    return answers


def recorded_by(server: TokenServer, replies: list[str]) -> tuple[list[Any], list[Any], dict[str, int]]:
    """What the agent saw, what was recorded, and what was counted as changed."""
    seen: list[Any] = []

    async def agent(session: GatewaySession) -> None:
        seen.extend(await converse(session))

    with server:
        server.replies = list(replies)
        session, gateway = in_session(server, agent)
    told = [
        (answer.finish_reason, answer.message.content, [call.function for call in answer.message.tool_calls or []])
        for answer in seen
    ]
    turns = [
        (*(turn.added.tolist(), turn.sampled.tolist(), turn.logprobs.tolist()), turn.policy_version, turn.message)
        for turn in session.recorded.turns
    ]
    for *_, message in turns:
        for call in message.get("tool_calls") or []:
            # Made of the turn's own.
            del call["id"]
    return told, [turns, session.finished().rollouts], dict(gateway.counts.changed)


@pytest.mark.parametrize("opens_thoughts", [False, True])
def test_what_is_recorded_is_what_is_recorded_of_vllm(opens_thoughts: bool):
    template, replies = CHATML, list(REPLIES)
    if opens_thoughts:
        template = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
        replies[0] = replies[0].removeprefix("<think>")
        # What is cut off in its thoughts has no text.
        replies[1:] = ["</think>" + reply for reply in replies[1:]]
    of_vllm = recorded_by(TokenServer(template, parses_thoughts=True), replies)
    of_sglang = recorded_by(SGLangTokenServer(template), replies)
    assert of_sglang == of_vllm
    (turns, rollouts) = of_sglang[1]
    assert len(turns) == 4 and {rollout.policy_version for rollout in rollouts} == {3}
    assert turns[0][-1]["reasoning"] == "so"
    assert turns[1][-1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 3}'}
    assert turns[2][-1]["content"] == "the sum is "


def test_sampling_is_told_in_sglangs_words():
    server = SGLangTokenServer()

    async def agent(session: GatewaySession) -> None:
        await ask(session.base_url, [user("hi")], max_tokens=7, stop=["x"], top_p=0.5)

    with server:
        server.replies = ["hello"]
        in_session(server, agent, temperature=0.7)
    (body,) = [body for path, body in server.requests if path == "/generate"]
    assert body["return_logprob"] is True
    assert body["sampling_params"] == {
        **{"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        **{"max_new_tokens": 7, "stop": ["x"], "no_stop_trim": True, "skip_special_tokens": False},
    }


def test_a_streamed_answer_comes_whole():
    server = SGLangTokenServer()
    shown: list[str] = []

    async def agent(session: GatewaySession) -> None:
        async with client(session.base_url) as agent:
            for _ in range(2):
                stream = await agent.chat.completions.create(model="m", messages=[user("hi")], stream=True)
                shown.append("".join([part.choices[0].delta.content or "" async for part in stream if part.choices]))

    with server:
        server.replies = ["hello there"] * 2
        session, _ = in_session(server, agent)
    assert shown == ["hello there"] * 2
    assert [turn.message["content"] for turn in session.recorded.turns] == shown


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"tools": [ADD], "tool_choice": "required"}, '`tool_choice` "required"'),
        ({"response_format": {"type": "json_object"}}, '`response_format` {"type": "json_object"}'),
    ],
)
def test_a_grammar_is_refused_and_lifted_where_that_is_said(asked: dict[str, Any], named: str):
    server = SGLangTokenServer()

    async def agent(session: GatewaySession) -> None:
        await ask(session.base_url, [user("hi")], **asked)

    async def refused(session: GatewaySession) -> None:
        with pytest.raises(openai.BadRequestError, match="--grammar lift") as error:
            await agent(session)
        assert named in error.value.message

    with server:
        in_session(server, refused)
        server.replies = ["hello"]
        session, _ = in_session(server, agent, grammar="lift")
    assert len(session.recorded.turns) == 1


def test_what_sglang_refuses_is_told_with_its_route():
    class Refusing(SGLangTokenServer):
        def rendered(self, body: dict[str, Any]) -> list[int]:
            raise Refused("no such role")

    async def agent(session: GatewaySession) -> None:
        with pytest.raises(openai.BadRequestError, match=r"/v1/tokenize of the .* answered 400: .*no such role"):
            await ask(session.base_url, [user("hi")])

    with Refusing() as server:
        in_session(server, agent)


def test_a_session_goes_on_at_another_server_when_its_own_is_gone():
    first, second = SGLangTokenServer(), SGLangTokenServer()

    async def run() -> None:
        async with gateway_of(first, second) as gateway, gateway.session() as session:
            messages = [user("hi")]
            for server in (first, second):
                server.replies = ["hello", "again"]
            await ask(session.base_url, messages)
            (used,) = [server for server in (first, second) if len(server.replies) == 1]
            used.stop()
            messages.append(user("more"))
            await ask(session.base_url, messages)
            assert gateway.servers.num_moves == 1
            session.reward = 1.0
        assert len(session.finished().rollouts) == 1

    with first, second:
        asyncio.run(run())


def start(*servers: TokenServer) -> None:
    async def run() -> None:
        async with Gateway([server.url for server in servers]):
            raise AssertionError("it began")

    asyncio.run(run())


def test_servers_of_both_kinds_are_refused():
    with (
        TokenServer() as vllm,
        SGLangTokenServer() as sglang,
        pytest.raises(PreflightError, match=r"Of 2 servers, http.* are SGLang and the others vLLM"),
    ):
        start(vllm, sglang)


def test_a_server_that_does_not_say_its_parsers_is_refused():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = b'{"data": [{"id": "policy", "max_model_len": 64, "owned_by": "sglang"}]}'
            self.send_response(200)
            self.end_headers()
            self.wfile.write(models if self.path == "/v1/models" else b"[]")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    async def run(url: str) -> None:
        async with Gateway([url]):
            raise AssertionError("it began")

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(PreflightError, match=r"/server_info with 200 and b'\[\]'"):
            asyncio.run(run(f"http://127.0.0.1:{server.server_address[1]}"))
        server.shutdown()
