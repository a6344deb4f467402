"""Answers that are passed on while they are sampled: as they come, recorded as any other, and what becomes of broken ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
import pytest
from gateway_agents import ADD, AGENTS, ChatAgent, Clients, ask, gateway_of, user
from hypothesis import given, settings
from hypothesis import strategies as st
from token_server import GENERATE, TokenServer

from trl_atropos.gateway.gateway import Gateway, GatewaySession


WAIT_S = 20.0
PARTS = ("a thou", "sand ", "words")
TEXT = "".join(PARTS)

Asking = Callable[[GatewaySession, Clients], AsyncIterator[str]]


async def chat(session: GatewaySession, clients: Clients) -> AsyncIterator[str]:
    api = clients.openai.with_options(base_url=session.base_url)
    options = {"include_usage": True}
    stream = await api.chat.completions.create(model="m", messages=[user("tell")], stream=True, stream_options=options)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content
    assert chunk.usage.completion_tokens == len(session.recorded.turns[-1].sampled)


async def messages(session: GatewaySession, clients: Clients) -> AsyncIterator[str]:
    api = clients.anthropic.with_options(base_url=session.anthropic_base_url)
    async with api.messages.stream(model="m", messages=[user("tell")], max_tokens=100) as stream:
        async for text in stream.text_stream:
            yield text
        answer = await stream.get_final_message()
    assert answer.usage.output_tokens == len(session.recorded.turns[-1].sampled)
    assert answer.content[0].text == session.replies[-1]["content"]


async def responses(session: GatewaySession, clients: Clients) -> AsyncIterator[str]:
    api = clients.openai.with_options(base_url=session.base_url)
    numbers = []
    async for event in await api.responses.create(model="m", input="tell", stream=True):
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            yield event.delta
    assert numbers == list(range(len(numbers)))
    assert event.response.output_text == session.replies[-1]["content"]
    assert event.response.id == f"resp_{session.recorded.turns[-1].id}"


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

        async def converse(kind: type[ChatAgent], conversation: list[Said], is_streamed: bool) -> Any:
            async with gateway.session() as session:
                agent = kind(session, clients, "be good", has_tools=False)
                for said in conversation:
                    agent.tell(said.told)
                    await agent.ask(
                        is_streamed, max_tokens=5 if said.is_cut else 400, stop=[STOP] if said.has_stop else None
                    )
                session.reward = 1.0
            assert agent.seen == [reply["content"] for reply in session.replies]
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


@pytest.mark.parametrize(
    ("reply", "parses_thoughts", "options"),
    [("yes", True, {}), ('<tool_call>{"name": "add", "arguments": {}}</tool_call>', False, {"tools": [ADD]})],
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
        assert num_streamed(server) == 0


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

    def test_what_was_not_shown_is_sampled_elsewhere(self):
        def dying(server: TokenServer) -> Iterator[str]:
            server.stop()
            raise ConnectionAbortedError
            yield ""

        async def held() -> None:
            async with gateway_of(first, second) as gateway, Clients() as clients, gateway.session() as session:
                dead, other = await at_home(session, first, second)
                dead.replies, other.replies = [lambda: dying(dead)], ["whole"]
                assert "".join([text async for text in chat(session, clients)]) == "whole"
                assert (len(session.recorded.turns), gateway.servers.num_moves) == (2, 1)

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
