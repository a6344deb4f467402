"""Agents of the Anthropic SDK: what becomes of their requests, what they are told, and that they are recorded as any other."""

from __future__ import annotations

import json
import threading
from typing import Any

import aiohttp
import anthropic
import pytest
from anthropic import AsyncAnthropic
from gateway_agents import ADD, CALL, in_session, prompts, recorded
from token_server import TokenServer

from trl_atropos.api.refusals import RequestRefused
from trl_atropos.gateway.dialects import MESSAGES
from trl_atropos.gateway.gateway import GatewaySession
from trl_atropos.gateway.sessions import Session


TOOL = {"name": "add", "description": "Add.", "input_schema": ADD["function"]["parameters"]}
ASKED = [{"role": "user", "content": "tell"}]


def client(session: GatewaySession, **options: Any) -> AsyncAnthropic:
    return AsyncAnthropic(**{"base_url": session.anthropic_base_url, "api_key": "x", "max_retries": 0, **options})


async def ask(session: GatewaySession, messages: list[Any], **options: Any) -> anthropic.types.Message:
    """Ask for one answer, and put it at the end of the conversation, as agents do."""
    async with client(session) as api:
        answer = await api.messages.create(**{"model": "m", "max_tokens": 100, "messages": messages, **options})
    messages.append({"role": "assistant", "content": answer.content})
    return answer


def translated(**values: Any) -> dict[str, Any]:
    return MESSAGES.read({"messages": ASKED, "max_tokens": 9, **values}, Session()).values


class TestRequests:
    def test_blocks_become_messages(self):
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "so", "signature": "s"},
                    {"type": "redacted_thinking", "data": "??"},
                    {"type": "text", "text": "here", "citations": None},
                    {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 3}},
                    {"type": "tool_use", "id": "2", "name": "add", "input": {"INVALID_JSON": "[3"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "and", "cache_control": {"type": "ephemeral"}},
                    {"type": "tool_result", "tool_use_id": "1", "content": "3", "is_error": True},
                    {"type": "tool_result", "tool_use_id": "2", "content": [{"type": "text", "text": "4"}] * 2},
                ],
            },
            {"role": "system", "content": "hurry"},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "3"}]},
        ]
        system = [{"type": "text", "text": text} for text in ("x-anthropic-billing-header: 1", "be ", "good")]
        call = {"type": "function"}
        assert translated(messages=messages, system=system)["messages"] == [
            {"role": "system", "content": "be good"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": "here",
                "reasoning": "so",
                "tool_calls": [
                    {**call, "id": "1", "function": {"name": "add", "arguments": '{"a": 3}'}},
                    {**call, "id": "2", "function": {"name": "add", "arguments": "[3"}},
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            {"role": "tool", "tool_call_id": "2", "content": "4\n4"},
            {"role": "user", "content": "and"},
            {"role": "system", "content": "hurry"},
            {"role": "tool", "tool_call_id": "3", "content": ""},
        ]

    def test_fields_have_their_names_in_chat_completions(self):
        values = translated(
            stop_sequences=["x"],
            tools=[{**TOOL, "strict": True}],
            output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
            temperature=0.3,
        )
        assert values["max_tokens"] == 9
        assert values["stop"] == ["x"]
        assert values["tools"] == [ADD | {"function": ADD["function"] | {"description": "Add."}}]
        assert values["reasoning_effort"] == "low"
        assert values["response_format"]["json_schema"]["schema"] == {"type": "object"}
        assert values["temperature"] == 0.3
        assert translated(thinking={"type": "disabled"})["reasoning_effort"] == "none"

    @pytest.mark.parametrize(
        ("choice", "expected"),
        [
            ({"type": "auto"}, "auto"),
            ({"type": "any"}, "required"),
            ({"type": "none"}, "none"),
            ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
        ],
    )
    def test_choices_of_tools(self, choice: dict[str, Any], expected: Any):
        assert translated(tool_choice=choice)["tool_choice"] == expected
        assert translated(tool_choice={**choice, "disable_parallel_tool_use": True})["parallel_tool_calls"] is False

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            (
                {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
                r"messages\[0\].content\[0\]",
            ),
            ({"messages": [*ASKED, {"role": "assistant", "content": "I"}]}, "`messages` is the assistant's"),
            ({"messages": "tell"}, "messages"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\]"),
            ({"tool_choice": "auto"}, "tool_choice"),
            ({"thinking": {"type": "deep"}}, "thinking.type"),
            ({"system": [{"type": "image"}]}, r"system\[0\]"),
        ],
    )
    def test_what_cannot_be_said_is_refused_by_its_name(self, values: dict[str, Any], named: str):
        with pytest.raises(RequestRefused, match=named):
            translated(**values)


class TestAnswers:
    def test_a_conversation_with_a_call_and_thoughts_is_one_rollout(self):
        async def agent(session: GatewaySession) -> None:
            messages = [*ASKED]
            answer = await ask(session, messages, tools=[TOOL], system="be good")
            text, call = answer.content
            assert (text.type, text.text) == ("text", "here")
            assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 3})
            assert answer.stop_reason == "tool_use"
            messages.append(
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "3"}]}
            )
            answer = await ask(session, messages, tools=[TOOL], system="be good")
            assert [block.type for block in answer.content] == ["text"]
            assert answer.stop_reason == "end_turn"
            assert answer.usage.output_tokens == len("it is three") + 1
            turns.append(answer.usage.input_tokens)

        turns: list[int] = []
        server, session, gateway = recorded(agent, [f"here\n{CALL}", "it is three"])
        (rollout,) = session.finished().rollouts
        assert turns == [len(prompts(server)[1])]
        sampled = [[*server.sampled_ids(text), server.end] for text in (f"here\n{CALL}", "it is three")]
        assert [label for label in rollout.masks if label != -100] == sampled[0] + sampled[1]
        assert gateway.counts.num_spliced == 1

    def test_thoughts_are_blocks_that_come_back(self):
        async def agent(session: GatewaySession) -> None:
            messages = [*ASKED]
            thoughts, text = (await ask(session, messages)).content
            assert (thoughts.type, thoughts.thinking, text.text) == ("thinking", "hm", "yes")
            await ask(session, [*messages, *ASKED])

        server, _, gateway = recorded(agent, ["<think>hm</think>yes", "no"], thinking="keep")
        assert gateway.counts.num_spliced == 1
        bodies = [body for path, body in server.requests if path.endswith("completions/render")]
        assert bodies[-1]["messages"][1] == {"role": "assistant", "content": "yes", "reasoning": "hm"}

    def test_stops(self):
        async def agent(session: GatewaySession) -> None:
            answer = await ask(session, [*ASKED], max_tokens=5)
            assert (answer.stop_reason, answer.content[0].text) == ("max_tokens", "a tho")
            answer = await ask(session, [*ASKED], stop_sequences=["stop"])
            assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "stop")
            assert answer.content[0].text == "on and "
            # More than the server takes, which SDKs ask for that know other models.
            assert (await ask(session, [*ASKED], max_tokens=5000)).stop_reason == "end_turn"

        recorded(agent, ["a thousand", "on and stop", "yes"])

    def test_arguments_that_are_no_object_come_back_as_they_were_sampled(self):
        call = '<tool_call>{"name": "add", "arguments": [3]}</tool_call>'

        async def agent(session: GatewaySession) -> None:
            messages = [*ASKED]
            (block,) = (await ask(session, messages, tools=[TOOL])).content
            assert block.input == {"INVALID_JSON": "[3]"}
            messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id}]})
            await ask(session, messages, tools=[TOOL])

        _, _, gateway = recorded(agent, [call, "oh"])
        assert gateway.counts.num_spliced == 1

    def test_an_empty_answer_has_a_block(self):
        async def agent(session: GatewaySession) -> None:
            messages = [*ASKED]
            assert [block.text for block in (await ask(session, messages)).content] == [""]
            await ask(session, [*messages, *ASKED])

        _, _, gateway = recorded(agent, ["", "yes"])
        assert gateway.counts.num_spliced == 1

    def test_what_an_agent_asks_for_and_does_not_get_is_counted(self):
        async def agent(session: GatewaySession) -> None:
            await ask(
                session,
                [*ASKED],
                tools=[{**TOOL, "strict": True}],
                tool_choice={"type": "auto", "disable_parallel_tool_use": True},
                thinking={"type": "enabled", "budget_tokens": 1024},
                metadata={"user_id": "me"},
                extra_body={"temperature": 0.1, "context_management": {"edits": []}},
            )

        _, _, gateway = recorded(agent, ["yes"])
        names = {"tools.strict", "parallel_tool_calls", "thinking.budget_tokens", "temperature", "context_management"}
        assert gateway.counts.changed.keys() == names


class TestStreams:
    def test_every_block_begins_grows_and_ends(self):
        async def agent(session: GatewaySession) -> None:
            async with client(session) as api:
                asked = {"model": "m", "max_tokens": 100, "messages": ASKED, "tools": [TOOL]}
                stream = await api.messages.create(**asked, stream=True)
                kinds = [event.type async for event in stream]
                async with api.messages.stream(**asked) as whole:
                    final = await whole.get_final_message()
            block = ["content_block_start", "content_block_delta", "content_block_stop"]
            thoughts = ["content_block_start", *["content_block_delta"] * 2, "content_block_stop"]
            assert kinds == ["message_start", *thoughts, *block, *block, "message_delta", "message_stop"]
            assert [part.type for part in final.content] == ["thinking", "text", "tool_use"]
            assert final.content[-1].input == {"a": 3}
            assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", len(reply) + 1)

        reply = f"<think>hm</think>here {CALL}"
        _, session, _ = recorded(agent, [reply] * 2)
        assert len(session.recorded.turns) == 2

    def test_pings_come_while_it_waits(self):
        def slow() -> str:
            threading.Event().wait(0.3)
            return "a word"

        async def agent(session: GatewaySession) -> None:
            url = f"{session.anthropic_base_url}/v1/messages"
            asked = {"model": "m", "max_tokens": 9, "messages": ASKED, "stream": True}
            async with aiohttp.ClientSession() as http, http.post(url, json=asked) as answer:
                events.extend((await answer.text()).split("\n\n"))

        events: list[str] = []
        recorded(agent, [slow], keep_alive_s=0.05)
        assert events[0] == 'event: ping\ndata: {"type":"ping"}'
        assert 'event: message_stop\ndata: {"type":"message_stop"}' in events

    def test_an_error_after_a_ping_is_an_event(self):
        async def agent(session: GatewaySession) -> None:
            with pytest.raises(anthropic.APIStatusError, match="--servers"):
                async with (
                    client(session) as api,
                    api.messages.stream(model="m", max_tokens=9, messages=ASKED) as stream,
                ):
                    await stream.get_final_message()

        server = TokenServer()
        server.start()
        server.replies = [server.stop]
        in_session(server, agent, keep_alive_s=0.05, server_wait_s=0.3)


class TestErrors:
    def test_each_status_has_its_kind(self):
        async def agent(session: GatewaySession) -> None:
            with pytest.raises(anthropic.BadRequestError, match="logit_bias") as caught:
                await ask(session, [*ASKED], extra_body={"logit_bias": {"3": 1}})
            assert caught.value.body["error"]["type"] == "invalid_request_error"
            with pytest.raises(anthropic.BadRequestError) as caught:
                await ask(session, [{"role": "user", "content": "tell " * 2000}])
            # The server's own words.
            message = "This model's maximum context length is 4096 tokens"
            assert caught.value.body == {
                "type": "error",
                "error": {"type": "invalid_request_error", "message": message},
            }
            await ask(session, [*ASKED])
            with pytest.raises(anthropic.RateLimitError, match="--max_turns") as caught:
                await ask(session, [*ASKED])
            assert caught.value.body["error"]["type"] == "rate_limit_error"
            assert caught.value.response.headers["x-should-retry"] == "false"

        _, _, gateway = recorded(agent, ["yes"], max_turns=1)
        assert gateway.counts.num_refused == 3

    @pytest.mark.parametrize("body", ["[]", "{", "3", '{"max_tokens": 3}'])
    def test_what_is_no_request_is_a_400(self, body: str):
        async def agent(session: GatewaySession) -> None:
            async with (
                aiohttp.ClientSession() as http,
                http.post(f"{session.anthropic_base_url}/v1/messages", data=body) as answer,
            ):
                assert answer.status == 400
                assert (await answer.json())["type"] == "error"

        recorded(agent, [])

    def test_a_repetition_that_the_sdk_announces_gets_the_answer_that_is_there(self):
        async def agent(session: GatewaySession) -> None:
            first = await ask(session, [*ASKED])
            again = await ask(session, [*ASKED], extra_headers={"x-stainless-retry-count": "1"})
            assert first == again

        _, session, gateway = recorded(agent, ["one", "two"])
        assert (len(session.recorded.turns), gateway.counts.num_replayed) == (1, 1)


class TestWhoMayAsk:
    @pytest.mark.parametrize("key", ["api_key", "auth_token"])
    def test_the_id_can_come_as_the_key(self, key: str):
        async def agent(session: GatewaySession) -> None:
            address = session.anthropic_base_url.partition("/session/")[0]
            for value, error in ((session.id, None), ("wrong", anthropic.NotFoundError)):
                async with client(session, base_url=address, **{"api_key": None, key: value}) as api:
                    asking = api.messages.create(model="m", max_tokens=9, messages=ASKED)
                    if error is None:
                        assert (await asking).content[0].text == "yes"
                    else:
                        with pytest.raises(error):
                            await asking

        recorded(agent, ["yes"])


def test_tokens_are_counted_as_they_would_be_sampled_from():
    async def agent(session: GatewaySession) -> None:
        messages = [*ASKED]
        await ask(session, messages, tools=[TOOL])
        messages.append({"role": "user", "content": "more"})
        async with client(session) as api:
            counted.append((await api.messages.count_tokens(model="m", messages=messages, tools=[TOOL])).input_tokens)
            with pytest.raises(anthropic.BadRequestError, match="messages"):
                await api.messages.count_tokens(model="m", messages="?")
        await ask(session, messages, tools=[TOOL])

    counted: list[int] = []
    server, session, _ = recorded(agent, ["a thousand", "yes"])
    # Letter by letter: more than their text has as the tokenizer merges it.
    assert counted == [len(prompts(server)[1])]
    assert len(session.recorded.turns) == 2


def test_arguments_reach_the_agent_as_json():
    async def agent(session: GatewaySession) -> None:
        async with client(session) as api:
            asked = {"model": "m", "max_tokens": 100, "messages": ASKED, "tools": [TOOL]}
            stream = await api.messages.create(**asked, stream=True)
            deltas = [event.delta async for event in stream if event.type == "content_block_delta"]
        assert json.loads("".join(delta.partial_json for delta in deltas)) == {"a": 3}

    recorded(agent, [CALL])
