"""A gateway in front of a real SGLang server: what it samples from is what SGLang's own chat completions sample from, and what it
records is what the policy samples.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import requests
import torch
from gateway_agents import ADD, CALL, ask, user
from inference_server_contract import Served

from trl_atropos import Gateway
from trl_atropos.gateway.gateway import GatewaySession
from trl_atropos.gateway.servers import DERENDER, Affinity
from trl_atropos.gateway.turns import Turn


NUM_SESSIONS = 4
NUM_TURNS = 4
MAX_TURN_TOKENS = 16
# Two layers in bfloat16 with large weights: rounding explains 0.04.
MAX_LOGPROB_ERROR = 0.1


def test_a_conversation_is_recorded_token_by_token_through_publishes(served: Served) -> None:
    served.publish(30)
    seeds = {served.version: 30}

    async def agent(gateway: Gateway, number: int) -> GatewaySession:
        async with gateway.session() as session:
            messages = [user(f"Tell me of {number}.")]
            for turn in range(NUM_TURNS):
                # The last answers may end at a text, so that what was sampled beyond it is seen. Nothing continues such an answer.
                stop = ["e"] if turn == NUM_TURNS - 1 else None
                await ask(session.base_url, messages, max_tokens=MAX_TURN_TOKENS, stop=stop)
                messages.append(user("More."))
                if number == 0 and turn == 1:
                    await asyncio.to_thread(served.publish, 31)
                    seeds[served.version] = 31
            session.reward = 1.0
        return session

    async def run() -> tuple[Gateway, list[GatewaySession]]:
        async with Gateway([served.url]) as gateway:
            return gateway, await asyncio.gather(*(agent(gateway, number) for number in range(NUM_SESSIONS)))

    gateway, sessions = asyncio.run(run())
    assert gateway.counts.spliced_share == 1.0
    policies = {version: served.policy(seed) for version, seed in seeds.items()}
    of_turns = []
    for session in sessions:
        turns = session.recorded.turns
        (rollout,) = session.finished().rollouts
        assert [label for label in rollout.masks if label != -100] == [t for turn in turns for t in turn.sampled]
        assert [turn.policy_version for turn in turns] == sorted(turn.policy_version for turn in turns)
        for turn in turns:
            of_turns.append(turn.policy_version)
            tokens = turn.token_ids().tolist()
            with torch.no_grad():
                logits = policies[turn.policy_version](torch.tensor([tokens])).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            found = torch.tensor(turn.logprobs)
            assert (found - expected[-len(found) :]).abs().mean() < MAX_LOGPROB_ERROR
    assert set(of_turns) == set(seeds)


def test_the_prompt_is_that_of_the_servers_own_chat_completions(served: Served) -> None:
    # Of few bytes, each of which is a token.
    add = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        user("hi"),
        {"role": "assistant", "content": "What?"},
        user("hello"),
    ]
    for more in ({}, {"tools": [add]}):
        asked = {"messages": messages, "max_tokens": 8, **more}
        answer = requests.post(
            f"{served.url}/v1/chat/completions", json={**asked, "model": str(served.model_dir)}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        (turn,) = asyncio.run(turns_of(served, asked))
        assert len(turn.added) == answer.json()["usage"]["prompt_tokens"]
        if not more:
            # Tools get fields that the template shows, too, from SGLang.
            assert turn.added.tolist() == served.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )


async def turns_of(served: Served, asked: dict[str, Any]) -> list[Turn]:
    async with Gateway([served.url]) as gateway, gateway.session() as session:
        session.reward = 1.0
        options = {name: value for name, value in asked.items() if name != "messages"}
        await ask(session.base_url, list(asked["messages"]), **options)
    return session.recorded.turns


def test_what_was_sampled_is_parsed_by_the_parsers_of_the_server(served: Served) -> None:
    """Replies that a model without a training never samples, as tokens."""

    def ids_of(text: str) -> list[int]:
        return served.tokenizer.encode(text, add_special_tokens=False)

    async def parse(gateway: Gateway, text: str, prompt: str = "a:", **asked: Any) -> dict[str, Any]:
        response = {
            "request_id": "r",
            "choices": [{"index": 0, "token_ids": ids_of(text)}],
            "prompt_token_ids": ids_of(prompt),
        }
        body = {"stream": False, "generate_response": response, "chat_request": {"messages": [], **asked}}
        answer = await gateway.servers.post(Affinity(), DERENDER, body)
        return answer.values["choices"][0]["message"]

    async def run() -> list[dict[str, Any]]:
        async with Gateway([served.url]) as gateway:
            call = "<think>so</think>Well.\n" + CALL.replace("<tool_call>", "<tool_call>\n").replace(
                "</tool", "\n</tool"
            )
            return [
                await parse(gateway, "plain"),
                await parse(gateway, "<think>so</think>Well."),
                await parse(gateway, "so</think>Well.", prompt="a:<think>\n"),
                await parse(gateway, call, tools=[ADD]),
                await parse(gateway, call, tools=[ADD], tool_choice="none"),
            ]

    plain, thoughtful, begun, calling, forbidden = asyncio.run(run())
    assert plain == {"role": "assistant", "content": "plain"}
    assert (thoughtful["reasoning"], thoughtful["content"]) == ("so", "Well.")
    assert begun == thoughtful
    (called,) = calling["tool_calls"]
    assert called["function"]["name"] == "add" and json.loads(called["function"]["arguments"]) == {"a": 3}
    assert calling["reasoning"] == "so" and calling["content"].strip() == "Well."
    assert "tool_calls" not in forbidden and "<tool_call>" in forbidden["content"]
