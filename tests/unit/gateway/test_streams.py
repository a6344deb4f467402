"""Answers that are passed on while they are sampled: as they come, recorded as any other, and what becomes of broken ones."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import anthropic
import httpx
import openai
import pytest
from gateway_agents import ADD, AGENTS, CALL, ChatAgent, Clients, ask, gateway_of, user
from hypothesis import given, settings
from hypothesis import strategies as st
from token_server import GENERATE, TokenServer

from trl_atropos.gateway.gateway import Gateway, GatewaySession
from trl_atropos.gateway.streams import LiveReply


WAIT_S = 20.0
KEEP_ALIVE_S = 0.05
PARTS = ("a thou", "sand ", "words")
TEXT = "".join(PARTS)


class Asking(Protocol):
    """Asks in one dialect, with a tool or without; the text of the answer as it comes."""

    def __call__(self, session: GatewaySession, clients: Clients, has_tools: bool = False) -> AsyncIterator[str]: ...


def ids_of_calls(session: GatewaySession) -> list[str]:
    """Of the last answer."""
    return [call["id"] for call in session.replies[-1].get("tool_calls", [])]


async def chat(session: GatewaySession, clients: Clients, has_tools: bool = False) -> AsyncIterator[str]:
    api = clients.openai.with_options(base_url=session.base_url)
    asked: Any = {"stream_options": {"include_usage": True}, **({"tools": [ADD]} if has_tools else {})}
    stream = await api.chat.completions.create(model="m", messages=[user("tell")], stream=True, **asked)
    calls = []
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content
        calls += [call.id for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert calls == ids_of_calls(session)
    assert chunk.usage.completion_tokens == len(session.recorded.turns[-1].sampled)


async def messages(session: GatewaySession, clients: Clients, has_tools: bool = False) -> AsyncIterator[str]:
    api = clients.anthropic.with_options(base_url=session.anthropic_base_url)
    asked: Any = {"tools": [{"name": "add", "input_schema": FUNCTION["parameters"]}]} if has_tools else {}
    async with api.messages.stream(model="m", messages=[user("tell")], max_tokens=100, **asked) as stream:
        async for text in stream.text_stream:
            yield text
        answer = await stream.get_final_message()
    assert answer.usage.output_tokens == len(session.recorded.turns[-1].sampled)
    assert answer.content[0].text == session.replies[-1]["content"]
    assert [block.id for block in answer.content[1:]] == ids_of_calls(session)


async def responses(session: GatewaySession, clients: Clients, has_tools: bool = False) -> AsyncIterator[str]:
    api = clients.openai.with_options(base_url=session.base_url)
    asked: Any = {"tools": [{"type": "function", **FUNCTION}]} if has_tools else {}
    numbers, items = [], []
    async for event in await api.responses.create(model="m", input="tell", stream=True, **asked):
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            yield event.delta
        if event.type == "response.output_item.done":
            items.append(event.item)
    assert items == event.response.output
    assert [item.call_id for item in items[1:]] == ids_of_calls(session)
    assert numbers == list(range(len(numbers)))
    assert event.response.output_text == session.replies[-1]["content"]
    assert event.response.id == f"resp_{session.recorded.turns[-1].id}"


FUNCTION: Any = ADD["function"]
ASKINGS = (chat, messages, responses)


def run(server: TokenServer, agent: Callable[[GatewaySession, Clients], Awaitable[None]], **options: Any) -> Gateway:
    async def held() -> Gateway:
        async with gateway_of(server, **options) as gateway, Clients() as clients, gateway.session() as session:
            await agent(session, clients)
            return gateway

    return asyncio.run(held())


def num_streamed(server: TokenServer) -> int:
    return sum(path == GENERATE and body["stream"] for path, body in server.requests)


@pytest.mark.parametrize("asking", ASKINGS)
def test_text_comes_while_the_rest_is_not_sampled_yet(asking: Asking):
    came = threading.Event()

    def reply() -> Iterator[str]:
        yield PARTS[0]
        assert came.wait(WAIT_S), "the client has seen nothing"
        yield from PARTS[1:]

    async def agent(session: GatewaySession, clients: Clients) -> None:
        seen = []
        async for text in asking(session, clients):
            seen.append(text)
            came.set()
        assert "".join(seen) == TEXT
        assert seen[0] == PARTS[0]
        (turn,) = session.recorded.turns
        assert turn.message == {"role": "assistant", "content": TEXT}
        assert turn.sampled.tolist() == [*server.sampled_ids(TEXT), server.end]
        assert turn.logprobs.tolist() == [-(token % 64) / 64 for token in turn.sampled]
        assert (turn.policy_version, turn.finish_reason, turn.why_masked) == (3, "stop", "")

    with TokenServer() as server:
        server.replies = [reply]
        assert run(server, agent).counts.num_streamed == 1


@pytest.mark.parametrize("asking", ASKINGS)
def test_text_in_front_of_a_call_comes_while_the_call_is_not_sampled_yet(asking: Asking):
    came = threading.Event()

    def reply() -> Iterator[str]:
        yield "I will add"
        assert came.wait(WAIT_S), "the client has seen nothing"
        yield " them."
        # Signs of life come in between, which no SDK may take for a part of the answer.
        time.sleep(5 * KEEP_ALIVE_S)
        yield from ("\n", CALL[:4], CALL[4:])

    async def agent(session: GatewaySession, clients: Clients) -> None:
        seen = []
        async for text in asking(session, clients, has_tools=True):
            seen.append(text)
            came.set()
        # The stand-in's parser, as many, takes the white space in front of a call away.
        assert "".join(seen) == session.replies[-1]["content"] == "I will add them."
        assert seen[0] == "I will add"
        (turn,) = session.recorded.turns
        (call,) = turn.message["tool_calls"]
        assert (call["function"]["name"], turn.finish_reason, turn.why_masked) == ("add", "tool_calls", "")
        assert turn.sampled.tolist() == [*server.sampled_ids(f"I will add them.\n{CALL}"), server.end]

    with TokenServer() as server:
        server.replies = [reply]
        gateway = run(server, agent, keep_alive_s=KEEP_ALIVE_S)
        assert (gateway.counts.num_streamed, gateway.recorder.may_pass_on_beside_calls) == (1, True)


BESIDE_CALLS = st.lists(
    st.sampled_from(["f", "functools", "wolf ", " ", "\n", "a < b", "[1]", "{", "word"]), max_size=6
)


@given(BESIDE_CALLS, st.lists(st.integers(0, 60), max_size=6))
def test_what_may_be_a_call_is_not_passed_on_however_it_comes(pieces: list[str], cuts: list[int]):
    text = "".join(pieces)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    passed = asyncio.run(passed_on([text[start:end] for start, end in pairwise(places)]))
    assert passed == asyncio.run(passed_on(list(text)))
    in_front = re.split(r"[<\[{`]|functools", text)[0]
    assert in_front.startswith(passed)
    # All of it but the white space at its end, and what may become a word that begins a call.
    certain = in_front.removesuffix("f") if in_front == text else in_front
    assert passed == ("" if text[:1].isspace() else certain.rstrip())


async def passed_on(parts: list[str]) -> str:
    live = LiveReply()
    live.may_have_calls = True
    passed = ""
    for part in parts:
        choice = {"token_ids": [], "logprobs": {"content": []}, "text": part}
        live.take({"choices": [choice]})
        passed += live.pass_on()
    return passed


@dataclass(frozen=True)
class Said:
    """A reply, whether its length or a stop string cuts it off, and what the client says next."""

    reply: str
    is_cut: bool
    has_stop: bool
    told: str


STOP = "stop"
SAYINGS = st.builds(
    Said,
    st.text("aehn é日😀\n", min_size=0, max_size=12).map(lambda text: text + STOP + text)
    | st.text("aehn é日😀\n", max_size=12),
    st.booleans(),
    st.booleans(),
    st.text("aehn", min_size=1, max_size=4),
)


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[TokenServer, Callable[..., Any]]]:
    loop = asyncio.new_event_loop()
    with TokenServer() as server:
        gateway, clients = Gateway([server.url]), Clients()
        loop.run_until_complete(gateway.__aenter__())

        async def converse(
            kind: type[ChatAgent], conversation: list[Said], is_streamed: bool, has_tools: bool = False
        ) -> Any:
            async with gateway.session() as session:
                agent = kind(session, clients, "be good", has_tools)
                for said in conversation:
                    agent.tell(said.told, of_tools="7")
                    await agent.ask(
                        is_streamed, max_tokens=5 if said.is_cut else 400, stop=[STOP] if said.has_stop else None
                    )
                session.reward = 1.0
            assert agent.seen == [reply["content"] or "" for reply in session.replies]
            assert gateway.recorder.may_pass_on and gateway.recorder.may_pass_on_beside_calls
            for turn in session.recorded.turns:
                # They are named after their turn.
                for call in turn.message.get("tool_calls") or []:
                    call["id"] = call["id"].replace(turn.id, "")
            finished = session.finished()
            rows = [(row.tokens, row.masks, row.inference_logprobs, row.policy_version) for row in finished.rollouts]
            return rows, session.replies, [turn.finish_reason for turn in session.recorded.turns]

        def hold(*asked: Any) -> Any:
            return loop.run_until_complete(converse(*asked))

        yield server, hold
        loop.run_until_complete(clients.__aexit__())
        loop.run_until_complete(gateway.__aexit__())
    loop.close()


@settings(max_examples=12, deadline=None)
@given(st.lists(SAYINGS, min_size=1, max_size=3))
def test_rows_are_the_same_streamed_and_whole(place: tuple[TokenServer, Callable[..., Any]], conversation: list[Said]):
    server, hold = place
    for kind in AGENTS:
        held = []
        for is_streamed in (False, True):
            server.requests.clear()
            server.replies = [said.reply for said in conversation]
            held.append(hold(kind, conversation, is_streamed))
            assert num_streamed(server) == (len(conversation) if is_streamed else 0)
        assert held[0] == held[1]


WITH_CALLS = st.builds(
    Said,
    st.lists(st.sampled_from(["one ", " two", "\n", "1 < 2", CALL]), max_size=4).map("".join),
    st.booleans(),
    st.just(False),
    st.text("aehn", min_size=1, max_size=4),
)


@settings(max_examples=12, deadline=None)
@given(st.lists(WITH_CALLS, min_size=1, max_size=3))
def test_rows_are_the_same_streamed_and_whole_beside_tools(
    place: tuple[TokenServer, Callable[..., Any]], conversation: list[Said]
):
    server, hold = place
    for kind in AGENTS:
        held = []
        for is_streamed in (False, True):
            server.replies = [said.reply for said in conversation]
            held.append(hold(kind, conversation, is_streamed, True))
        assert held[0] == held[1]


@pytest.mark.parametrize(
    ("reply", "parses_thoughts", "options"),
    [("yes", True, {}), (CALL, False, {"tools": [ADD]}), (f" yes {CALL}", False, {"tools": [ADD]})],
)
def test_what_a_parser_may_read_otherwise_is_sent_when_it_is_whole(reply: str, parses_thoughts: bool, options: Any):
    async def agent(session: GatewaySession, clients: Clients) -> None:
        api = clients.openai.with_options(base_url=session.base_url)
        asked: Any = {"model": "m", "messages": [user("tell")], **options}
        assert [chunk async for chunk in await api.chat.completions.create(**asked, stream=True)]
        assert len(session.recorded.turns) == 1

    with TokenServer(parses_thoughts=parses_thoughts) as server:
        server.replies = [reply]
        assert run(server, agent).counts.num_streamed == 0


def test_a_server_that_gives_no_parts_is_waited_for():
    async def agent(session: GatewaySession, clients: Clients) -> None:
        assert [text async for text in chat(session, clients)] == [TEXT]

    with TokenServer() as server:
        server.gives_parts, server.replies = False, [TEXT]
        assert run(server, agent).counts.num_streamed == 0


def test_a_message_that_is_not_what_was_shown_is_kept_as_shown_and_the_next_ones_are_whole():
    async def agent(session: GatewaySession, clients: Clients) -> None:
        # The first to learn whether the parser shows special tokens.
        assert "".join([text async for text in chat(session, clients)]) == TEXT
        derender = server._derender

        def stripping(body: dict[str, Any]) -> dict[str, Any]:
            answer = derender(body)
            answer["choices"][0]["message"]["content"] = "words"
            return answer

        server._derender = stripping  # type: ignore[method-assign]
        conversation: list[Any] = [user("tell")]
        shown = "".join([text async for text in chat(session, clients)])
        assert session.replies[-1] == {"role": "assistant", "content": shown}
        assert shown == TEXT
        server._derender = derender  # type: ignore[method-assign]
        conversation += [session.replies[-1], user("more")]
        await ask(session.base_url, conversation)
        assert session.recorded.turns[-1].parent is session.recorded.turns[-2]
        before = num_streamed(server)
        assert [text async for text in chat(session, clients)] == [TEXT]
        assert num_streamed(server) == before == 2

    with TokenServer() as server:
        server.replies = [lambda: iter(PARTS), lambda: iter(PARTS), "yes", TEXT]
        run(server, agent)


def test_text_that_a_parser_drops_beside_calls_is_kept_as_shown_and_the_next_ones_with_tools_are_whole():
    async def agent(session: GatewaySession, clients: Clients) -> None:
        derender = server._derender

        def dropping(body: dict[str, Any]) -> dict[str, Any]:
            answer = derender(body)
            message = answer["choices"][0]["message"]
            message["content"] = None if message["tool_calls"] else message["content"]
            return answer

        server._derender = dropping  # type: ignore[method-assign]
        agent = ChatAgent(session, clients, "be good", has_tools=True)
        agent.tell("go")
        await agent.ask(is_streamed=True)
        assert agent.seen == ["I add."] and len(agent.calls) == 1
        agent.tell("", of_tools="7")
        await agent.ask(is_streamed=True)
        assert agent.seen[1:] == ["It is 7."]
        first, second = session.recorded.turns
        assert (first.message["content"], second.parent) == ("I add.", first)
        assert num_streamed(server) == 1
        assert "".join([text async for text in chat(session, clients)]) == TEXT

    with TokenServer() as server:
        server.replies = [f"I add. {CALL}", "It is 7.", lambda: iter(PARTS)]
        assert run(server, agent).counts.num_streamed == 2


async def at_home(session: GatewaySession, first: TokenServer, second: TokenServer) -> tuple[TokenServer, TokenServer]:
    """Ask once; return the server that answers for a session, and the other one."""
    await ask(session.base_url, [user("tell")])
    home = session.recorded.affinity.server
    assert home is not None
    return (first, second) if home.url == first.url else (second, first)


class TestBrokenOff:
    @pytest.mark.parametrize("asking", ASKINGS)
    def test_nothing_is_recorded_of_what_a_client_left(self, asking: Asking):
        goes_on = threading.Event()

        def reply() -> Iterator[str]:
            yield PARTS[0]
            goes_on.wait(WAIT_S)
            # Until nobody reads any more.
            while True:
                yield "a" * 1000

        async def held() -> None:
            async with gateway_of(server) as gateway, gateway.session() as session, httpx.AsyncClient() as http:
                path, body = {
                    chat: ("chat/completions", {"messages": [user("tell")]}),
                    messages: ("messages", {"messages": [user("tell")], "max_tokens": 9}),
                    responses: ("responses", {"input": "tell"}),
                }[asking]
                asked = {"model": "m", "stream": True, **body}
                async with http.stream("POST", f"{session.base_url}/{path}", json=asked) as response:
                    async for line in response.aiter_lines():
                        if PARTS[0] in line:
                            break
                while not gateway.counts.num_cancelled:
                    await asyncio.sleep(0.01)
                goes_on.set()
                assert session.recorded.turns == []
                # What it has seen is text of its own, and context.
                conversation = [user("tell"), {"role": "assistant", "content": PARTS[0]}, user("more")]
                await ask(session.base_url, conversation)
                (turn,) = session.recorded.turns
                assert (turn.parent, turn.message["content"]) == (None, "yes")

        with TokenServer() as server:
            server.replies = [reply, "yes"]
            asyncio.run(held())

    @pytest.mark.parametrize("asking", ASKINGS)
    def test_a_server_that_dies_ends_the_answer_with_an_error_of_the_dialect(self, asking: Asking):
        def dying(server: TokenServer) -> Iterator[str]:
            yield PARTS[0]
            server.stop()
            raise ConnectionAbortedError

        async def held() -> None:
            async with gateway_of(first, second) as gateway, Clients() as clients, gateway.session() as session:
                dead, other = await at_home(session, first, second)
                dead.replies, other.replies = [lambda: dying(dead)], ["whole"]
                seen = []
                with pytest.raises((openai.APIError, anthropic.APIError), match="broke an answer off") as caught:
                    async for text in asking(session, clients):
                        seen.append(text)
                assert "Send the request again" in str(caught.value)
                assert seen == [PARTS[0]]
                assert [reply["content"] for reply in session.replies] == ["yes"]
                assert "".join([text async for text in asking(session, clients)]) == "whole"
                assert [reply["content"] for reply in session.replies] == ["yes", "whole"]
                assert (gateway.servers.num_moves, gateway.counts.num_refused) == (1, 1)

        with TokenServer() as first, TokenServer() as second:
            first.replies, second.replies = ["yes"], ["yes"]
            asyncio.run(held())

    @pytest.mark.parametrize(("begun", "has_tools"), [([], False), (["<tool"], True)])
    def test_what_was_not_shown_is_sampled_elsewhere(self, begun: list[str], has_tools: bool):
        def dying(server: TokenServer) -> Iterator[str]:
            yield from begun
            server.stop()
            raise ConnectionAbortedError

        async def held() -> None:
            async with gateway_of(first, second) as gateway, Clients() as clients, gateway.session() as session:
                dead, other = await at_home(session, first, second)
                dead.replies, other.replies = [lambda: dying(dead)], [lambda: iter(PARTS)]
                assert "".join([text async for text in chat(session, clients, has_tools)]) == TEXT
                assert (len(session.recorded.turns), gateway.servers.num_moves) == (2, 1)
                assert gateway.counts.num_streamed == 1

        with TokenServer() as first, TokenServer() as second:
            first.replies, second.replies = ["yes"], ["yes"]
            asyncio.run(held())

    @pytest.mark.parametrize("is_shown", [False, True])
    def test_what_a_weight_update_cuts_off_is_sampled_anew_unless_it_was_shown(self, is_shown: bool):
        async def agent(session: GatewaySession, clients: Clients) -> None:
            if is_shown:
                with pytest.raises(openai.APIError, match="broke an answer off"):
                    assert [text async for text in chat(session, clients)] == [PARTS[0]]
                assert session.recorded.turns == []
            else:
                assert "".join([text async for text in chat(session, clients)]) == "whole"

        with TokenServer() as server:
            parts = server.parts

            def cut_once(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
                if server.replies[0] != "cut":
                    yield from parts(body)
                    return
                server.replies.pop(0)
                if is_shown:
                    yield server._part(server.sampled_ids(PARTS[0]), PARTS[0])
                yield server._part([], "", finish_reason="abort")

            server.parts = cut_once  # type: ignore[method-assign]
            server.replies = ["cut", "whole"]
            run(server, agent)

    def test_an_error_in_the_stream_of_a_server_is_one_of_the_server(self):
        async def agent(session: GatewaySession, clients: Clients) -> None:
            with pytest.raises(openai.InternalServerError, match="the engine is dead"):
                assert not [text async for text in chat(session, clients)]

        with TokenServer() as server:
            server.parts = lambda body: iter([{"error": {"message": "the engine is dead"}}])  # type: ignore[method-assign]
            run(server, agent)
            assert num_streamed(server) == 0
