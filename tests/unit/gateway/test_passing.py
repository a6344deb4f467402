"""Environments behind a gateway: what they reach, which server answers, and what happens when one is not there."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from gateway_agents import client
from hypothesis import given
from hypothesis import strategies as st
from token_server import SGLangTokenServer, TokenServer

from trl_atropos.gateway.gateway import Gateway
from trl_atropos.gateway.options import GatewayOptions
from trl_atropos.gateway.passing import MAX_CROWD
from trl_atropos.gateway.prefixes import CHUNK_BYTES, Prefixes


KEY = "of environments"


class Environment:
    """Asks a gateway as environments do."""

    def __init__(self, gateway: Gateway, http: aiohttp.ClientSession):
        self.gateway, self.http = gateway, http

    async def ask(self, path: str = "/generate", key: str = KEY, method: str = "POST", **body: Any) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        async with self.http.request(method, self.gateway.address + path, json=body, headers=headers) as response:
            return response.status, await response.json(content_type=None)


@asynccontextmanager
async def environment_of(*servers: TokenServer, **options: Any) -> AsyncIterator[Environment]:
    urls = [server.url for server in servers]
    async with (
        Gateway(urls, GatewayOptions(**options), environment_key=KEY) as gateway,
        aiohttp.ClientSession() as http,
    ):
        yield Environment(gateway, http)


def ids(first: int, number: int) -> dict[str, Any]:
    return {"prompt_token_ids": [first * 1000 + i for i in range(number)]}


def held_reply() -> tuple[threading.Event, Callable[[], str]]:
    """A reply that comes when the event is set."""
    may_go_on = threading.Event()

    def wait() -> str:
        assert may_go_on.wait(20)
        return "yes"

    return may_go_on, wait


def test_a_request_and_its_answer_are_passed_on_as_they_are():
    async def run() -> None:
        async with environment_of(server) as environment:
            headers = {"Authorization": f"Bearer {KEY}"}
            body = b'{"prompt":  "tell", "top_p": 0.5}'
            async with environment.http.post(
                f"{environment.gateway.address}/generate", data=body, headers=headers
            ) as response:
                assert response.headers["x-atropos-policy-version"] == "7"
                assert await response.json(content_type=None) == {
                    "logprobs": [[[{str(token): -(token % 64) / 64}] for token in server.sampled_ids("yes")]],
                    "finish_reasons": ["stop"],
                }
            assert environment.gateway.counts.num_passed == 1
            assert await environment.ask("/v1/models", method="GET") == (200, {"data": [model]})
            assert await environment.ask("/health", method="GET") == (200, {})

    with TokenServer() as server:
        server.headers = {"x-atropos-policy-version": "7"}
        server.replies = ["yes"]
        model = {"id": "policy", "max_model_len": 4096, "parent": None, "owned_by": "vllm"}
        asyncio.run(run())
        assert server.requests == [("/generate", {"prompt": "tell", "top_p": 0.5})]


@pytest.mark.parametrize(
    "path", ["/pause", "/update_weights", "/v1/load_lora_adapter", "/atropos/adapter", "/session"]
)
def test_no_other_route_of_a_server_can_be_reached(path: str):
    async def run() -> None:
        async with environment_of(server) as environment:
            for method in ("POST", "GET"):
                status, _ = await environment.ask(path, method=method)
                assert status == 404

    with TokenServer() as server:
        asyncio.run(run())
        assert server.requests == []


def test_an_agent_behind_two_gateways_is_recorded_by_its_own():
    async def run() -> None:
        async with (
            environment_of(server) as environment,
            Gateway([environment.gateway.address], api_key=KEY) as inner,
            inner.session() as session,
        ):
            messages: list[Any] = [{"role": "user", "content": "tell"}]
            for is_streamed in (False, True):
                async with client(session.base_url) as openai:
                    asked = openai.chat.completions.create(model="m", messages=messages, stream=is_streamed)
                    if is_streamed:
                        texts = [chunk.choices[0].delta.content or "" async for chunk in await asked]
                        assert "".join(texts) == "the second"
                    else:
                        text = (await asked).choices[0].message.content
                        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "more"}]
            session.reward = 1.0
            (rollout,) = session.finished().rollouts
            sampled = [*server.sampled_ids("yes"), server.end, *server.sampled_ids("the second"), server.end]
            assert [label for label in rollout.masks if label != -100] == sampled

    with TokenServer() as server:
        server.replies = ["yes", "the second"]
        asyncio.run(run())


def test_nobody_generates_without_the_key_of_environments():
    async def run() -> None:
        async with environment_of(server) as environment, environment.gateway.session() as session:
            for key in ("", "other", session.id):
                assert (await environment.ask(prompt="tell", key=key))[0] == 404
        async with Gateway([server.url]) as gateway, aiohttp.ClientSession() as http:
            assert (await Environment(gateway, http).ask(prompt="tell"))[0] == 404

    with TokenServer() as server:
        asyncio.run(run())
        assert server.requests == []


def test_what_a_server_refuses_is_told_and_not_sent_again():
    async def run() -> None:
        async with environment_of(server) as environment:
            status, answer = await environment.ask(max_tokens=3)
            assert (status, answer["error"]["message"]) == (400, "prompt is missing")

    with TokenServer() as server:
        asyncio.run(run())
        assert len(server.requests) == 1


def as_vllm(prompt: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt}


def as_sglang(prompt: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": prompt["prompt_token_ids"], "sampling_params": {"max_new_tokens": 9}}


@pytest.mark.parametrize(("kind", "body_of"), [(TokenServer, as_vllm), (SGLangTokenServer, as_sglang)])
def test_a_conversation_stays_where_its_beginning_is_and_others_spread(kind, body_of):
    async def run() -> None:
        async with environment_of(*servers) as environment:
            for number_of_tokens in (200, 300, 400):
                for task in range(4):
                    assert (await environment.ask(**body_of(ids(task + 1, number_of_tokens))))[0] == 200

    with kind() as one, kind() as other:
        servers = (one, other)
        for server in servers:
            server.replies = ["yes"] * 12
        asyncio.run(run())
    prompts = [
        [body.get("input_ids") or body["prompt"]["prompt_token_ids"] for _, body in s.requests] for s in servers
    ]
    tasks = [{prompt[0] for prompt in of_one} for of_one in prompts]
    assert not tasks[0] & tasks[1]
    assert [len(of_one) for of_one in tasks] == [2, 2]


def test_a_beginning_that_all_share_brings_nobody_to_a_crowded_server():
    async def run() -> None:
        async with environment_of(*servers) as environment:
            await environment.ask(prompt=ids(1, 400))
            held = [asyncio.create_task(environment.ask(prompt=ids(1, 400))) for _ in range(8)]
            while sum(server.num_in_flight for server in environment.gateway.servers.servers) < 8:
                await asyncio.sleep(0.01)
            in_flight = sorted(server.num_in_flight for server in environment.gateway.servers.servers)
            # The first in order of arrival follow their beginning until it is MAX_CROWD times as full, and one more.
            assert in_flight[1] <= MAX_CROWD * (in_flight[0] + 1) + 1
            assert in_flight[0] > 0
            may_go_on.set()
            assert {status for status, _ in await asyncio.gather(*held)} == {200}

    may_go_on, wait = held_reply()
    with TokenServer() as one, TokenServer() as other:
        servers = (one, other)
        one.replies = ["yes", *[wait] * 8]
        other.replies = [wait] * 8
        asyncio.run(run())


def test_a_request_whose_server_dies_is_answered_by_another():
    async def run() -> None:
        async with environment_of(*servers) as environment:
            assert (await environment.ask(prompt=ids(1, 200)))[0] == 200
            (first,) = [server for server in servers if server.requests]
            first.replies = [first.stop]
            status, answer = await environment.ask(prompt=ids(1, 300))
            assert (status, answer["finish_reasons"]) == (200, ["stop"])
            assert environment.gateway.servers.num_resent == 1

    with TokenServer() as one, TokenServer() as other:
        servers = (one, other)
        for server in servers:
            server.replies = ["yes", "yes"]
        asyncio.run(run())


def test_when_the_environment_goes_its_request_is_given_up():
    async def run() -> None:
        async with environment_of(server) as environment:
            asking = asyncio.create_task(environment.ask(prompt="tell"))
            while not server.requests:
                await asyncio.sleep(0.01)
            asking.cancel()
            while environment.gateway.counts.num_cancelled == 0:
                await asyncio.sleep(0.01)
            may_go_on.set()
            assert environment.gateway.counts.num_passed == 0

    may_go_on, wait = held_reply()
    with TokenServer() as server:
        server.replies = [wait]
        asyncio.run(asyncio.wait_for(run(), 20))


def test_more_than_may_be_in_flight_are_told_to_come_again():
    async def run() -> None:
        async with environment_of(server, max_in_flight=1) as environment:
            asking = asyncio.create_task(environment.ask(prompt="tell"))
            while not server.requests:
                await asyncio.sleep(0.01)
            status, answer = await environment.ask(prompt="tell")
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            may_go_on.set()
            assert (await asking)[0] == 200

    may_go_on, wait = held_reply()
    with TokenServer() as server:
        server.replies = [wait]
        asyncio.run(run())


@given(st.lists(st.binary(min_size=1, max_size=4 * CHUNK_BYTES), min_size=1, max_size=8), st.data())
def test_the_longest_known_beginning_is_found(prompts: list[bytes], data: st.DataObject):
    prefixes: Prefixes[int] = Prefixes()
    for number, prompt in enumerate(prompts):
        prefixes.note(prompt, number)
    known = data.draw(st.sampled_from(prompts))
    rest = data.draw(st.binary(max_size=2 * CHUNK_BYTES))
    asked = known + rest

    def shared(prompt: bytes) -> int:
        whole = [
            end for end in range(0, len(asked) + 1, CHUNK_BYTES) if prompt[:end] == asked[:end] and end <= len(prompt)
        ]
        return len(asked) if prompt == asked else max(whole)

    place, share = prefixes.find(asked)
    assert share * len(asked) == pytest.approx(max(map(shared, prompts)))
    assert place is None if share == 0 else shared(prompts[place]) == max(map(shared, prompts))


def test_what_is_remembered_is_bounded_and_what_was_used_last_stays():
    prefixes: Prefixes[int] = Prefixes(max_beginnings=3)
    prompts = [json.dumps(ids(number, 10)).encode() for number in range(4)]
    for number in range(3):
        prefixes.note(prompts[number], number)
    assert prefixes.find(prompts[0]) == (0, 1.0)
    prefixes.note(prompts[3], 3)
    assert [prefixes.find(prompt)[0] for prompt in prompts] == [0, None, 2, 3]
