"""The example agents: plain clients of a base URL, and rewards."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import capitals_agent
import capitals_program
import phone_agent
import phone_env
import pytest
from gateway_agents import gateway_of
from openai import AsyncOpenAI
from token_server import TokenServer


ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "agents").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    how = text.split('"""')[1]
    launch_files = re.findall(r"launch -c (examples/configs/\w+\.yaml)", how)
    # An environment is served; a program of its own is started by a launch file.
    assert f"examples/agents/{path.name} serve" in how or path.name in (ROOT / launch_files[0]).read_text()


@pytest.mark.parametrize(
    ("outcome", "reward"), [("Paris", 1.0), (" Paris.\n", 1.0), ("It is Paris.", 0.25), ("London", 0.0), ("", 0.0)]
)
def test_the_capital_alone_earns_everything(outcome: str, reward: float):
    assert capitals_program.compute_reward("France", outcome) == reward
    assert capitals_agent.CapitalsAgent.compute_reward(None, "France", outcome) == reward


def test_both_questions_are_one_sequence():
    async def run() -> None:
        async with gateway_of(server) as gateway, gateway.session() as session:
            assert await capitals_agent.answer("Peru", session.base_url) == "Lima"
            session.reward = 1.0
        (rollout,) = session.finished().rollouts
        assert [message["content"] for message in rollout.messages][1::2] == ["In the south.", "Lima"]

    with TokenServer() as server:
        server.replies = ["In the south.", "Lima"]
        asyncio.run(run())


TEMPLATE = (ROOT / "examples" / "agents" / "phone_template.jinja").read_text()


def call(tool: str, arguments: str) -> str:
    return f'<tool_call>{{"name": "{tool}",  "arguments": {arguments}}}</tool_call>'


def ask_for_ada(monkeypatch: pytest.MonkeyPatch, *replies: str) -> tuple[list[dict[str, Any]], Any]:
    """The conversation as the agent sees it, and its only rollout."""
    # The stand-in samples single characters.
    monkeypatch.setattr(phone_agent, "MAX_TOKENS", 100)

    async def run() -> list[dict[str, Any]]:
        async with gateway_of(server) as gateway, gateway.session() as session:
            async with AsyncOpenAI(base_url="http://unused", api_key="unused") as openai:
                told = await phone_agent.answer("Ada", openai.with_options(base_url=session.base_url))
            session.reward = 0.0
        rollouts.extend(session.finished().rollouts)
        return told

    rollouts: list[Any] = []
    with TokenServer(TEMPLATE) as server:
        server.replies = list(replies)
        conversation = asyncio.run(run())
        assert server.replies == []
    (rollout,) = rollouts
    return conversation, server.text(rollout.tokens)


ADA = phone_agent.PHONE_BOOK["Ada"]
RIGHT_CALL = call("look_up", '{"name": "Ada"}')


@pytest.mark.parametrize(
    ("replies", "reward"),
    [
        ((RIGHT_CALL, f"The number of Ada is {ADA}."), 1.0),
        ((RIGHT_CALL, "The number of Ada is 1234."), phone_env.REWARD_ARGUMENT),
        ((RIGHT_CALL, ""), phone_env.REWARD_ARGUMENT),
        ((RIGHT_CALL, RIGHT_CALL, RIGHT_CALL), phone_env.REWARD_ARGUMENT),
        ((call("look_up", '{"name": "Bob"}'), f"It is {ADA}."), phone_env.REWARD_CALL),
        ((call("look_up", '{"person": "Ada"}'), ""), phone_env.REWARD_CALL),
        ((call("look_up", '"Ada"'), ""), phone_env.REWARD_CALL),
        ((call("dial", '{"name": "Ada"}'), ""), phone_env.REWARD_CALL),
        ((f"The number of Ada is {ADA}.",), 0.0),
    ],
)
def test_the_number_is_worth_something_where_it_was_looked_up(monkeypatch, replies: tuple[str, ...], reward: float):
    conversation, text = ask_for_ada(monkeypatch, *replies)
    assert phone_env.PhoneAgent.compute_reward(None, "Ada", conversation) == reward
    # One sequence, with every reply as it was sampled.
    behind = text.partition(phone_agent.question("Ada")["content"])[2]
    assert re.findall(r"assistant\n(.*?)<\|im_end\|>", behind, re.DOTALL) == list(replies)


def test_the_example_conversations_are_told_as_the_parser_reads_calls(monkeypatch):
    _, text = ask_for_ada(monkeypatch, "No.")
    assert (
        '<|im_start|>assistant\n<tool_call>{"name": "look_up", "arguments": {"name": "Bob"}}</tool_call><|im_end|>'
        in text
    )
    assert "<|im_start|>user\n4921<|im_end|>\n<|im_start|>assistant\nThe number of Bob is 4921.<|im_end|>" in text
