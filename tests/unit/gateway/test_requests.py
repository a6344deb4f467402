"""What agents may ask for, and what is refused, limited, repeated or broken off."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import openai
import pytest
from gateway_agents import ADD, ask, client, gateway_of, in_session, user
from token_server import TokenServer

from trl_atropos.api.refusals import RequestRefused
from trl_atropos.errors import PreflightError
from trl_atropos.gateway.chat import NEUTRAL, ChatRequest, Translation, read_chat_request
from trl_atropos.gateway.gateway import Gateway, GatewaySession
from trl_atropos.gateway.sessions import UNDELIVERED, Session
from trl_atropos.gateway.turns import Turn


MESSAGES = [user("tell")]


def asked_for(values: dict[str, Any], temperature: float, lifts_grammars: bool = False) -> ChatRequest:
    return read_chat_request(Translation(values), temperature, lifts_grammars)


class TestSampling:
    @pytest.mark.parametrize(
        "name",
        [
            "logit_bias",
            "bad_words",
            "allowed_token_ids",
            "min_tokens",
            "structured_outputs",
            "guided_json",
            "stop_token_ids",
        ],
    )
    def test_what_changes_the_distribution_is_refused_by_name(self, name: str):
        with pytest.raises(RequestRefused, match=f"`{name}`"):
            asked_for({"messages": MESSAGES, name: [3]}, 1.0)

    @pytest.mark.parametrize("name", ["continue_final_message", "prediction", "chat_template", "functions"])
    def test_what_is_not_the_agents_to_say_is_refused_by_name(self, name: str):
        with pytest.raises(RequestRefused, match=f"`{name}`"):
            asked_for({"messages": MESSAGES, name: "x"}, 1.0)

    def test_several_answers_at_once_are_refused(self):
        with pytest.raises(RequestRefused, match="n=3"):
            asked_for({"messages": MESSAGES, "n": 3}, 1.0)

    def test_the_rest_is_made_neutral_and_counted(self):
        asked = {"temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "frequency_penalty": 1, "seed": 3}
        request = asked_for({"messages": MESSAGES, "user": "me", "unheard_of": 1, **asked}, 0.7)
        assert request.body == {"messages": MESSAGES, **NEUTRAL, "temperature": 0.7}
        assert request.changed == tuple(sorted([*asked, "unheard_of"]))

    def test_what_is_neutral_already_is_not_counted(self):
        values = {"messages": MESSAGES, "temperature": 1, "top_p": 1.0, "logit_bias": {}, "n": 1, "logprobs": None}
        values |= {"parallel_tool_calls": True, "background": False}
        assert asked_for(values, 1.0).changed == ()

    def test_what_switches_a_grammar_on_is_taken_out_of_tools(self):
        request = asked_for({"messages": MESSAGES, "tools": [ADD], "parallel_tool_calls": False}, 1.0)
        assert "strict" not in request.body["tools"][0]["function"]
        assert "parallel_tool_calls" not in request.body
        assert request.changed == ("parallel_tool_calls", "tools.strict")

    def test_a_limit_that_is_the_servers_default_is_kept(self):
        """The server leaves 16 out of the parameters that it shows."""
        with TokenServer() as server:
            server.replies = ["a" * 30]

            async def agent(session: GatewaySession) -> None:
                choice = await ask(session.base_url, [*MESSAGES], max_tokens=16)
                assert (choice.finish_reason, choice.message.content) == ("length", "a" * 16)

            in_session(server, agent)

    def test_a_text_format_is_none_and_an_empty_list_of_tools_too(self):
        values = {"messages": MESSAGES, "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto"}
        assert asked_for(values, 1.0).body.keys() == {"messages", *NEUTRAL}

    @pytest.mark.parametrize(
        "values", [{}, {"messages": []}, {"messages": ["a"]}, {"messages": MESSAGES, "tools": [{"type": "web"}]}]
    )
    def test_what_is_no_chat_request_is_refused(self, values: Any):
        with pytest.raises(RequestRefused):
            asked_for(values, 1.0)

    def test_images_are_refused(self):
        message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
        with pytest.raises(RequestRefused, match="Only text is trained"):
            asked_for({"messages": [message]}, 1.0)

    def test_a_grammar_can_be_lifted(self):
        values = {
            "messages": MESSAGES,
            "tools": [ADD],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        }
        request = asked_for(values, 1.0, lifts_grammars=True)
        assert request.body["tool_choice"] == "auto"
        assert "response_format" not in request.body
        assert request.changed == ("response_format", "tool_choice", "tools.strict")
        assert asked_for(values, 1.0).body["tool_choice"] == "required"

    def test_a_grammar_is_refused_where_it_shall_not_be_masked(self):
        async def agent(session: GatewaySession) -> None:
            with pytest.raises(openai.BadRequestError, match="structured_outputs"):
                await ask(session.base_url, [user("tell")], tools=[ADD], tool_choice="required")

        with TokenServer() as server:
            session, _ = in_session(server, agent, grammar="refuse")
        assert session.recorded.turns == []


class TestStreams:
    def test_a_streamed_answer_is_recorded_as_any_other_and_shows_life_while_it_waits(self):
        async def agent(session: GatewaySession) -> str:
            text = ""
            async with client(session.base_url) as api:
                stream = await api.chat.completions.create(
                    model="m", messages=[user("tell")], stream=True, stream_options={"include_usage": True}
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or "" if chunk.choices else ""
            assert chunk.usage is not None and chunk.usage.completion_tokens == len("a word") + 1
            seen.append(text)

        def slow() -> str:
            threading.Event().wait(0.3)
            return "a word"

        seen: list[str] = []
        with TokenServer() as server:
            server.replies = [slow]
            session, _ = in_session(server, agent, keep_alive_s=0.05)
        assert seen == ["a word"]
        assert len(session.recorded.turns) == 1

    def test_calls_of_tools_are_streamed(self):
        async def agent(session: GatewaySession) -> None:
            async with (
                client(session.base_url) as api,
                api.chat.completions.stream(
                    model="m",
                    messages=[user("tell")],
                    tools=[{**ADD, "function": {**ADD["function"], "strict": True}}],
                ) as stream,
            ):
                final = await stream.get_final_completion()
            (call,) = final.choices[0].message.tool_calls or []
            assert call.function.arguments == '{"a": 3}'
            assert final.choices[0].finish_reason == "tool_calls"

        with TokenServer() as server:
            server.replies = ['<tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call>']
            in_session(server, agent)

    def test_a_refusal_before_the_stream_has_its_status(self):
        async def agent(session: GatewaySession) -> None:
            async with client(session.base_url) as api:
                with pytest.raises(openai.BadRequestError, match="logit_bias"):
                    await api.chat.completions.create(
                        model="m", messages=[user("tell")], stream=True, logit_bias={"3": 1}
                    )

        with TokenServer() as server:
            in_session(server, agent)


class TestBrokenOff:
    def test_a_client_that_goes_is_not_answered_and_nothing_is_recorded(self):
        release = threading.Event()

        def waiting() -> str:
            release.wait(20)
            return "too late"

        async def run() -> list[str]:
            async with gateway_of(server) as gateway, gateway.session() as session:
                await ask(session.base_url, [user("warm up")])
                async with client(session.base_url, timeout=0.5) as api:
                    with pytest.raises(openai.APITimeoutError):
                        await api.chat.completions.create(model="m", messages=[user("tell")])
                while not gateway.counts.num_cancelled:
                    await asyncio.sleep(0.01)
                release.set()
                await ask(session.base_url, [user("tell")])
                return [turn.message["content"] for turn in session.recorded.turns]

        with TokenServer() as server:
            server.replies = ["yes", waiting, "in time"]
            assert asyncio.run(run()) == ["yes", "in time"]

    def test_a_repetition_that_the_sdk_announces_gets_the_answer_that_is_there(self):
        async def agent(session: GatewaySession) -> None:
            first = await ask(session.base_url, [user("tell")])
            again = await ask(session.base_url, [user("tell")], extra_headers={"x-stainless-retry-count": "1"})
            assert again.message.content == first.message.content == "one"

        with TokenServer() as server:
            server.replies = ["one", "two"]
            session, gateway = in_session(server, agent)
        assert (len(session.recorded.turns), gateway.counts.num_replayed) == (1, 1)

    def test_an_answer_that_arrived_nowhere_is_masked_until_a_client_goes_on_from_it(self):
        session = Session()
        messages = [user("tell")]
        for parent in (None, 0):
            turn = turn_of(session.turns[0] if parent == 0 else None, messages)
            if parent is None:
                turn.why_masked = UNDELIVERED
            session.add(turn)
            assert session.turns[0].why_masked == (UNDELIVERED if parent is None else "")

    def test_of_two_answers_to_one_request_the_one_that_was_left_is_masked(self):
        async def agent(session: GatewaySession) -> None:
            await ask(session.base_url, [user("tell")])
            messages = [user("tell")]
            await ask(session.base_url, messages)
            await ask(session.base_url, [*messages, user("more")])

        with TokenServer() as server:
            server.replies = ["one", "two", "end"]
            session, gateway = in_session(server, agent)
        (rollout,) = session.finished().rollouts
        assert sum(label != -100 for label in rollout.masks) == len("two") + 1 + len("end") + 1
        assert gateway.counts.masked_tokens == {"abandoned": len("one") + 1}


def turn_of(parent: Turn | None, messages: list[Any]) -> Turn:
    """A turn without a token."""
    empty, said = array("i"), {"role": "assistant", "content": ""}
    return Turn(parent, empty, empty, array("f"), 1, said, "stop", messages, len(messages), 0, b"")


def failing(agent: Callable[[GatewaySession, Gateway], Awaitable[None]], **options: Any) -> None:
    """Run something against a gateway whose server says "yes" to everything."""

    async def run() -> None:
        async with gateway_of(server, **options) as gateway, gateway.session() as session:
            await agent(session, gateway)

    with TokenServer() as server:
        server.replies = ["yes"] * 10 if "max_rollout_tokens" not in options else ["yes" * 20]
        asyncio.run(run())


class TestLimits:
    def test_tokens_of_a_conversation(self):
        async def agent(session: GatewaySession, _: Gateway) -> None:
            messages = [user("tell")]
            choice = await ask(session.base_url, messages)
            assert choice.finish_reason == "length"
            assert len(session.recorded.turns[0].token_ids()) == 40
            with pytest.raises(openai.BadRequestError, match="--max_rollout_tokens"):
                await ask(session.base_url, [*messages, user("more")])

        failing(agent, max_rollout_tokens=40)

    def test_turns(self):
        async def agent(session: GatewaySession, _: Gateway) -> None:
            for _ in range(2):
                await ask(session.base_url, [user("tell")])
            with pytest.raises(openai.RateLimitError, match="--max_turns"):
                await ask(session.base_url, [user("tell")])

        failing(agent, max_turns=2)

    def test_tokens(self):
        async def agent(session: GatewaySession, _: Gateway) -> None:
            await ask(session.base_url, [user("tell")])
            with pytest.raises(openai.RateLimitError, match="--max_session_tokens"):
                await ask(session.base_url, [user("tell")])

        failing(agent, max_session_tokens=10)

    def test_bytes(self):
        async def agent(session: GatewaySession, _: Gateway) -> None:
            with pytest.raises(openai.APIStatusError, match="--max_body_bytes") as caught:
                await ask(session.base_url, [user("tell" * 1000)])
            assert caught.value.status_code == 413

        failing(agent, max_body_bytes=1000)

    def test_sessions(self):
        async def agent(_: GatewaySession, gateway: Gateway) -> None:
            with pytest.raises(RequestRefused, match="--max_sessions"):
                async with gateway.session():
                    raise AssertionError("it is open")

        failing(agent, max_sessions=1)

    def test_in_flight(self):
        release = threading.Event()

        async def run() -> None:
            async with gateway_of(server, max_in_flight=1) as gateway, gateway.session() as session:
                first = asyncio.create_task(ask(session.base_url, [user("tell")]))
                while not gateway.sessions.num_in_flight:
                    await asyncio.sleep(0.01)
                with pytest.raises(openai.RateLimitError, match="--max_in_flight") as caught:
                    await ask(session.base_url, [user("tell")])
                assert caught.value.response.headers["retry-after"] == "1"
                release.set()
                await first

        with TokenServer() as server:
            server.replies = [lambda: str(release.wait(20)), "yes"]
            asyncio.run(run())

    def test_an_idle_session_is_given_up(self):
        async def agent(session: GatewaySession, gateway: Gateway) -> None:
            await ask(session.base_url, [user("tell")])
            while len(gateway.sessions):
                await asyncio.sleep(0.05)
            with pytest.raises(openai.NotFoundError):
                await ask(session.base_url, [user("tell")])
            assert gateway.counts.num_sessions_discarded == 1

        failing(agent, idle_s=0.1)


class TestWhoMayAsk:
    def test_wrong_ids_and_other_routes_learn_nothing(self):
        async def agent(session: GatewaySession, gateway: Gateway) -> None:
            own = session.base_url.removesuffix("/v1")
            wrong = own[:-4] + "AAAA"
            control = (
                "/pause",
                "/update_weights",
                "/v1/load_lora_adapter",
                "/collective_rpc",
                "/server_info",
                "/tokenize",
            )
            paths = [own + path for path in (*control, "/v1/completions", "/inference/v1/generate", "")]
            paths += [gateway.address + path for path in (*control, "/generate", "/health", "/openapi.json", "/docs")]
            answered = ("chat/completions", "messages", "messages/count_tokens", "responses", "models")
            paths += [f"{base}/v1/{path}" for path in answered for base in (wrong, gateway.address)]
            paths += [f"{own}/v1/messages/batches", f"{own}/v1/responses/resp_1", f"{own}/v1/../../../pause"]
            async with aiohttp.ClientSession() as http:
                answers = []
                for path in paths:
                    for method in ("GET", "POST"):
                        async with http.request(method, path, json={}) as response:
                            answers.append((response.status, await response.text()))
            assert len(set(answers)) == 1
            assert answers[0][0] == 404

        failing(agent)

    def test_the_id_can_come_as_the_key(self):
        async def agent(session: GatewaySession, gateway: Gateway) -> None:
            for key, error in ((session.id, None), ("wrong", openai.NotFoundError)):
                async with client(f"{gateway.address}/v1", api_key=key) as api:
                    asking = api.chat.completions.create(model="m", messages=[user("tell")])
                    if error is None:
                        assert (await asking).choices[0].message.content == "yes"
                    else:
                        with pytest.raises(error):
                            await asking

        failing(agent)

    def test_a_session_that_ended_takes_nothing(self):
        async def run() -> None:
            async with gateway_of(server) as gateway:
                async with gateway.session() as session:
                    pass
                with pytest.raises(openai.NotFoundError):
                    await ask(session.base_url, [user("tell")])

        with TokenServer() as server:
            asyncio.run(run())

    def test_a_web_page_is_not_answered(self):
        async def agent(session: GatewaySession, _: Gateway) -> None:
            with pytest.raises(openai.NotFoundError):
                await ask(session.base_url, [user("tell")], extra_headers={"Origin": "http://somewhere.example"})

        failing(agent)


class TestServers:
    def test_a_session_stays_on_its_server_and_moves_when_that_dies(self):
        async def run() -> Gateway:
            async with gateway_of(first, second) as gateway:
                async with gateway.session() as session, gateway.session() as other:
                    messages = [user("tell")]
                    await ask(session.base_url, messages)
                    await ask(other.base_url, [user("tell")])
                    home = session.recorded.affinity.server
                    assert home is not other.recorded.affinity.server
                    assert home is not None
                    dying = first if home.url == first.url else second
                    dying.replies = [lambda: die(dying), "from the first"]
                    messages.append(user("more"))
                    await ask(session.base_url, messages)
                    assert messages[-1]["content"] == "yes"
                    assert session.recorded.affinity.server is other.recorded.affinity.server
                    assert len(session.recorded.turns) == 2
                return gateway

        def die(server: TokenServer) -> str:
            server.stop()
            raise ConnectionAbortedError

        with TokenServer() as first, TokenServer() as second:
            first.replies, second.replies = ["yes"] * 3, ["yes"] * 3
            gateway = asyncio.run(run())
        assert (gateway.servers.num_moves, gateway.counts.num_spliced) == (1, 1)

    def test_requests_wait_for_a_server_that_comes_back(self):
        async def run() -> None:
            async with gateway_of(server) as gateway, gateway.session() as session:
                await ask(session.base_url, [user("tell")])
                server.stop()
                waiting = asyncio.create_task(ask(session.base_url, [user("tell")]))
                await asyncio.sleep(0.3)
                assert not waiting.done()
                server.start(server.port)
                assert (await waiting).message.content == "yes"

        with TokenServer() as server:
            server.replies = ["yes"] * 3
            asyncio.run(run())

    def test_a_server_that_does_not_come_is_a_503(self):
        async def run() -> None:
            async with gateway_of(server, server_wait_s=0.2) as gateway, gateway.session() as session:
                server.stop()
                with pytest.raises(openai.InternalServerError, match="--servers") as caught:
                    await ask(session.base_url, [user("tell")])
                assert caught.value.status_code == 503

        with TokenServer() as server:
            asyncio.run(run())

    def test_what_the_server_says_of_a_request_reaches_the_agent(self):
        async def agent(session: GatewaySession, _: Gateway) -> None:
            with pytest.raises(openai.BadRequestError, match="maximum context length is 4096"):
                await ask(session.base_url, [user("tell " * 2000)])

        failing(agent)

    def test_what_a_weight_update_cut_off_is_sampled_again(self):
        async def run() -> None:
            async with gateway_of(server) as gateway, gateway.session() as session:
                await ask(session.base_url, [user("tell")])
                (turn,) = session.recorded.turns
                assert turn.message["content"] == "whole"

        with TokenServer() as server:
            generate = server._generate

            def cut_once(body: dict[str, Any]) -> dict[str, Any]:
                answer = generate(body)
                if server.replies:
                    answer["choices"][0]["finish_reason"] = "abort"
                return answer

            server._generate = cut_once  # type: ignore[method-assign]
            server.replies = ["half", "whole"]
            asyncio.run(run())

    def test_a_server_without_the_routes_is_refused_at_the_start(self):
        async def run() -> None:
            async with Gateway(["http://127.0.0.1:9"]):
                raise AssertionError("it began")

        with pytest.raises(PreflightError, match="--servers"):
            asyncio.run(run())
