"""Agents of OpenAI's Responses: what becomes of their requests, what they are told, and that they are recorded as any other."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import openai
import pytest
from gateway_agents import ADD, CALL, client, in_session, prompts, recorded
from openai.types.responses import Response
from token_server import TokenServer

from trl_atropos.api.refusals import RequestRefused
from trl_atropos.gateway.dialects import RESPONSES
from trl_atropos.gateway.gateway import GatewaySession
from trl_atropos.gateway.sessions import Session


TOOL = {"type": "function", **ADD["function"]}


async def ask(session: GatewaySession, asked: Any, **options: Any) -> Response:
    """Ask for one response. Where the conversation is a list, its items are put at the end, as agents do."""
    async with client(session.base_url) as api:
        response = await api.responses.create(model="m", input=asked, **options)
    if isinstance(asked, list):
        asked += response.output
    return response


def translated(asked: Any = "tell", **values: Any) -> dict[str, Any]:
    return RESPONSES.read({"input": asked, **values}, Session()).values


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def output(call: Any, text: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call.call_id, "output": text}


class TestRequests:
    def test_items_become_messages_and_those_of_one_answer_one(self):
        def call(number: str) -> dict[str, Any]:
            return {"type": "function_call", "call_id": number, "name": "add", "arguments": '{"a": 3}'}

        def called(number: str) -> dict[str, Any]:
            return {"id": number, "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}

        items = [
            {"role": "developer", "content": "be good"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}] * 2},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "here"}]},
            *(call("1"), call("2")),
            {"type": "function_call_output", "call_id": "1", "output": "3"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "4"}]},
            {"role": "assistant", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
            call("3"),
        ]
        assert translated(items, instructions="first")["messages"] == [
            {"role": "system", "content": "first"},
            {"role": "developer", "content": "be good"},
            {"role": "user", "content": [{"type": "text", "text": "a"}] * 2},
            {"role": "assistant", "reasoning": "so", "content": "here", "tool_calls": [called("1"), called("2")]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
            {"role": "tool", "tool_call_id": "2", "content": "4"},
            {"role": "assistant", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [called("3")]},
        ]
        assert translated()["messages"] == [{"role": "user", "content": "tell"}]

    def test_fields_have_their_names_in_chat_completions(self):
        schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
        values = translated(
            max_output_tokens=9,
            tools=[TOOL],
            tool_choice={"type": "function", "name": "add"},
            reasoning={"effort": "low"},
            text={"format": {"type": "json_schema", **schema}},
            temperature=0.3,
        )
        assert values["max_tokens"] == 9
        assert values["tools"] == [ADD]
        assert values["tool_choice"] == {"type": "function", "function": {"name": "add"}}
        assert values["reasoning_effort"] == "low"
        assert values["response_format"] == {"type": "json_schema", "json_schema": schema}
        assert values["temperature"] == 0.3
        assert translated(tool_choice="required", tools=[TOOL])["tool_choice"] == "required"

    @pytest.mark.parametrize(
        ("values", "named"),
        [
            (
                {"asked": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
                r"input\[0\].content\[0\]",
            ),
            ({"asked": [{"type": "web_search_call", "id": "w"}]}, r"input\[0\].type"),
            ({"asked": [{"type": "reasoning", "encrypted_content": "?"}]}, "encrypted_content"),
            ({"asked": [{"type": "item_reference", "id": "msg_1"}]}, "item_reference"),
            ({"asked": None}, "input"),
            ({"tools": [{"type": "web_search"}]}, r"tools\[0\]"),
            ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
            ({"truncation": "auto"}, "truncation"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ],
    )
    def test_what_cannot_be_said_is_refused_by_its_name(self, values: dict[str, Any], named: str):
        with pytest.raises(RequestRefused, match=named):
            translated(**values)


class TestAnswers:
    def test_a_conversation_of_items_is_one_rollout(self):
        async def agent(session: GatewaySession) -> None:
            items: list[Any] = [user("tell")]
            response = await ask(session, items, tools=[TOOL], instructions="be good")
            said, call = response.output
            assert (response.output_text, said.type, response.status) == ("here", "message", "completed")
            assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 3})
            items.append(output(call, "3"))
            response = await ask(session, items, tools=[TOOL], instructions="be good")
            assert response.output_text == "it is three"
            assert response.usage is not None
            seen.append((response.usage.input_tokens, response.usage.output_tokens))

        seen: list[tuple[int, int]] = []
        server, session, gateway = recorded(agent, [f"here\n{CALL}", "it is three"])
        (rollout,) = session.finished().rollouts
        assert seen == [(len(prompts(server)[1]), len("it is three") + 1)]
        sampled = [[*server.sampled_ids(text), server.end] for text in (f"here\n{CALL}", "it is three")]
        assert [label for label in rollout.masks if label != -100] == sampled[0] + sampled[1]
        assert gateway.counts.num_spliced == 1

    def test_thoughts_are_items_that_come_back(self):
        async def agent(session: GatewaySession) -> None:
            items: list[Any] = [user("tell")]
            thoughts, said = (await ask(session, items)).output
            assert (thoughts.type, thoughts.content[0].text, said.content[0].text) == ("reasoning", "hm", "yes")
            await ask(session, [*items, user("more")])

        server, _, gateway = recorded(agent, ["<think>hm</think>yes", "no"], thinking="keep")
        assert gateway.counts.num_spliced == 1
        bodies = [body for path, body in server.requests if path.endswith("completions/render")]
        assert bodies[-1]["messages"][1] == {"role": "assistant", "content": "yes", "reasoning": "hm"}

    def test_an_answer_cut_by_its_length_is_incomplete_and_goes_on(self):
        async def agent(session: GatewaySession) -> None:
            items: list[Any] = [user("tell")]
            response = await ask(session, items, max_output_tokens=5)
            assert (response.status, response.output_text) == ("incomplete", "a tho")
            assert response.incomplete_details is not None
            assert response.incomplete_details.reason == "max_output_tokens"
            await ask(session, [*items, user("more")])

        _, _, gateway = recorded(agent, ["a thousand", "yes"])
        assert gateway.counts.num_spliced == 1

    def test_an_empty_answer_has_a_message(self):
        async def agent(session: GatewaySession) -> None:
            items: list[Any] = [user("tell")]
            assert (await ask(session, items)).output[0].type == "message"
            await ask(session, [*items, user("more")])

        _, _, gateway = recorded(agent, ["", "yes"])
        assert gateway.counts.num_spliced == 1

    def test_what_an_agent_asks_for_and_does_not_get_is_counted(self):
        async def agent(session: GatewaySession) -> None:
            await ask(
                session,
                "tell",
                tools=[TOOL],
                reasoning={"effort": "low", "summary": "auto"},
                text={"verbosity": "low"},
                include=["reasoning.encrypted_content"],
                temperature=0.1,
                truncation="disabled",
                metadata={"a": "b"},
                prompt_cache_key="k",
            )

        _, _, gateway = recorded(agent, ["yes"])
        names = {"tools.strict", "reasoning.summary", "text.verbosity", "include", "temperature"}
        assert gateway.counts.changed.keys() == names


def test_tools_of_a_namespace_have_its_name_before_their_own():
    async def agent(session: GatewaySession) -> None:
        items: list[Any] = [user("tell")]
        tools: Any = [{"type": "namespace", "name": "numbers", "description": "Sums.", "tools": [TOOL]}, TOOL]
        response = await ask(session, items, tools=tools)
        first, second = response.output
        assert (first.namespace, first.name, second.namespace, second.name) == ("numbers", "add", None, "add")
        items += [output(first, "3"), output(second, "4")]
        await ask(session, items, tools=tools)

    server, _, gateway = recorded(agent, [CALL.replace("add", "numbers__add") + CALL, "yes"])
    (_, body), *_ = server.requests
    assert [tool["function"]["name"] for tool in body["tools"]] == ["numbers__add", "add"]
    assert gateway.counts.num_spliced == 1


class TestPreviousResponses:
    def test_a_conversation_goes_on_by_the_name_of_the_response_before(self):
        async def agent(session: GatewaySession) -> None:
            response = await ask(session, "tell", tools=[TOOL], instructions="be good")
            for text in ("3", "4"):
                response = await ask(
                    session,
                    [output(response.output[-1], text)],
                    tools=[TOOL],
                    instructions="be good",
                    previous_response_id=response.id,
                )
            # Back to the first one, which later turns have taken over.
            again = session.recorded.turns[0]
            await ask(session, "again", tools=[TOOL], instructions="be good", previous_response_id=f"resp_{again.id}")

        _, session, gateway = recorded(agent, [CALL, CALL, "seven", "yes"])
        turns = session.recorded.turns
        assert [turns.index(turn.parent) if turn.parent else None for turn in turns] == [None, 0, 1, 0]
        assert [message["role"] for message in turns[2].conversation()] == [
            *("system", "user", "assistant", "tool", "assistant", "tool", "assistant")
        ]
        assert [message["content"] for message in turns[3].conversation()] == ["be good", "tell", None, "again", "yes"]
        assert gateway.counts.num_spliced == 2

    def test_instructions_are_those_of_one_request(self):
        async def agent(session: GatewaySession) -> None:
            first = await ask(session, "tell", instructions="be good")
            second = await ask(session, "more", instructions="be bad", previous_response_id=first.id)
            await ask(session, "on", previous_response_id=second.id)

        _, session, _ = recorded(agent, ["yes", "no", "so"])
        contents = [[message["content"] for message in turn.conversation()] for turn in session.recorded.turns]
        assert contents == [
            ["be good", "tell", "yes"],
            ["be bad", "tell", "yes", "more", "no"],
            ["tell", "yes", "more", "no", "on", "so"],
        ]

    def test_what_is_not_stored_or_of_another_session_is_not_found(self):
        async def run(session: GatewaySession) -> None:
            response = await ask(session, "tell", store=False)
            assert response.store is False
            for name in (response.id, f"resp_{'0' * 16}"):
                with pytest.raises(openai.BadRequestError, match="previous_response_id") as caught:
                    await ask(session, "more", previous_response_id=name)
                assert caught.value.param == "previous_response_id"
            with pytest.raises(openai.BadRequestError, match="item_reference"):
                await ask(session, [{"type": "item_reference", "id": response.output[0].id}])

        recorded(run, ["yes"])

    def test_items_can_be_named(self):
        async def agent(session: GatewaySession) -> None:
            items: list[Any] = [user("tell")]
            response = await ask(session, items, tools=[TOOL])
            named = [{"type": "item_reference", "id": item.id} for item in response.output]
            assert len(named) == 3
            asked = [user("tell"), *named, output(response.output[-1], "3")]
            await ask(session, asked, tools=[TOOL])

        _, _, gateway = recorded(agent, [f"<think>hm</think>here {CALL}", "yes"], thinking="keep")
        assert gateway.counts.num_spliced == 1


class TestStreams:
    def test_every_item_begins_grows_and_ends(self):
        async def agent(session: GatewaySession) -> None:
            async with client(session.base_url) as api:
                asked: Any = {"model": "m", "input": "tell", "tools": [TOOL]}
                stream = await api.responses.create(**asked, stream=True)
                events.extend([event async for event in stream])
                async with api.responses.stream(**asked) as whole:
                    finals.append(await whole.get_final_response())

        events: list[Any] = []
        finals: list[Any] = []
        _, session, _ = recorded(agent, [f"<think>hm</think>here {CALL}"] * 2)

        def of_text(kind: str) -> list[str]:
            grown = ["content_part.added", f"{kind}.delta", f"{kind}.done", "content_part.done"]
            return ["output_item.added", *grown, "output_item.done"]

        arguments = [f"function_call_arguments.{end}" for end in ("delta", "done")]
        calls = ["output_item.added", *arguments, "output_item.done"]
        kinds = ["created", "in_progress", *of_text("reasoning_text"), *of_text("output_text"), *calls, "completed"]
        assert [event.type for event in events] == [f"response.{kind}" for kind in kinds]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        (final,) = finals
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
        assert final.output[-1].arguments == '{"a": 3}'
        assert len(session.recorded.turns) == 2

    def test_an_answer_cut_by_its_length_ends_as_incomplete(self):
        async def agent(session: GatewaySession) -> None:
            async with client(session.base_url) as api:
                stream = await api.responses.create(model="m", input="tell", max_output_tokens=5, stream=True)
                last = [event async for event in stream][-1]
            assert (last.type, last.response.status, last.response.output_text) == (
                *("response.incomplete", "incomplete"),
                "a tho",
            )

        recorded(agent, ["a thousand"])

    def test_an_error_after_a_sign_of_life_is_raised(self):
        async def agent(session: GatewaySession) -> None:
            async with client(session.base_url) as api:
                stream = await api.responses.create(model="m", input="tell", stream=True)
                with pytest.raises(openai.APIError, match="--servers"):
                    [event async for event in stream]

        server = TokenServer()
        server.start()
        server.replies = [server.stop]
        in_session(server, agent, keep_alive_s=0.05, server_wait_s=0.3)


def test_refusals_have_the_form_of_openai_and_nothing_else_is_there():
    async def agent(session: GatewaySession) -> None:
        with pytest.raises(openai.BadRequestError, match="`background`"):
            await ask(session, "tell", background=True)
        with pytest.raises(openai.BadRequestError, match="`conversation`"):
            await ask(session, "tell", conversation="c")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 4096"):
            await ask(session, "tell " * 2000)
        response = await ask(session, "tell")
        async with aiohttp.ClientSession() as http:
            for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
                url = f"{session.base_url}/responses/{response.id}{path}"
                async with http.request(method, url) as answer:
                    assert answer.status == 404

    recorded(agent, ["yes"])


def test_a_repetition_that_the_sdk_announces_gets_the_answer_that_is_there():
    async def agent(session: GatewaySession) -> None:
        first = await ask(session, "tell")
        again = await ask(session, "tell", extra_headers={"x-stainless-retry-count": "1"})
        assert (first.id, first.output) == (again.id, again.output)

    _, session, gateway = recorded(agent, ["one", "two"])
    assert (len(session.recorded.turns), gateway.counts.num_replayed) == (1, 1)
