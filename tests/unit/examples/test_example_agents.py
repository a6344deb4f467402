"""The example agents: plain clients of a base URL, and rewards."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import capitals_agent
import capitals_program
import pytest
from gateway_agents import gateway_of
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
