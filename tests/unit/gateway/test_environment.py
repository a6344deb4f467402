"""`AgentEnv` without Atropos' loop: the agent as a command, what it is told, and how it fails."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from token_server import TokenServer

from trl_atropos.api.refusals import RequestRefused
from trl_atropos.errors import EpisodeError, PreflightError
from trl_atropos.gateway import AgentEnv


AGENT = """
import json, os, sys, urllib.request
task = json.load(sys.stdin)
assert os.environ["OPENAI_API_KEY"] in os.environ["OPENAI_BASE_URL"]
assert os.environ["ANTHROPIC_BASE_URL"].endswith("/session/" + os.environ["ANTHROPIC_API_KEY"])
body = json.dumps({"model": "m", "messages": [{"role": "user", "content": task["ask"]}]}).encode()
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
answer = json.load(urllib.request.urlopen(urllib.request.Request(url, body)))
print(answer["choices"][0]["message"]["content"], end="")
"""


class Shouter(AgentEnv):
    name = "shouter"
    tasks = ({"ask": "shout"},)
    command = (sys.executable, "-c", AGENT)

    def compute_reward(self, task: Any, outcome: str) -> float:
        return float(outcome.count("a"))


def environment(kind: type[AgentEnv], server: TokenServer, max_token_len: int = 1000, **config: Any) -> AgentEnv:
    """As far as `BaseEnv` makes one before its loop; its constructor loads a tokenizer of the hub."""
    made = kind.__new__(kind)
    made.config, _ = kind.config_init()
    made.config = made.config.model_copy(update={"group_size": 2, **config})
    one = SimpleNamespace(base_url=f"{server.url}/v1", api_key="x")
    made.server = SimpleNamespace(servers=[SimpleNamespace(config=one)])
    made.max_token_len = max_token_len
    return made


def collect(kind: type[AgentEnv], replies: list[Any], **options: Any) -> list[Any]:
    async def run() -> list[Any]:
        made = environment(kind, server, **options)
        await made.setup()
        try:
            groups, backlog = await made.collect_trajectories(await made.get_next_item())
        finally:
            await made.gateway.__aexit__()
        assert backlog == []
        return groups

    with TokenServer() as server:
        server.replies = replies
        return asyncio.run(run())


def test_a_command_becomes_a_group():
    (group,) = collect(Shouter, ["aaa", "a"])
    assert sorted(group["scores"]) == [1.0, 3.0]
    assert [sum(label != -100 for label in masks) for masks in group["masks"]] == [
        score + 1 for score in group["scores"]
    ]
    assert json.dumps(group)


def test_turns_have_rewards_of_an_environment():
    class Counting(Shouter):
        def compute_reward(self, task: Any, outcome: str) -> float | None:
            return None

        def compute_turn_rewards(self, task: Any, outcome: str, replies: Any) -> dict[int, float]:
            return {index: float(reply["content"].count("a")) for index, reply in enumerate(replies)}

    (group,) = collect(Counting, ["aaa", "a"])
    assert sorted(group["scores"]) == [1.0, 3.0]
    kind = type("Wrong", (Counting,), {"compute_turn_rewards": lambda *_: {1: 1.0}})
    with pytest.raises(RequestRefused, match="the session has 1 turns"):
        collect(kind, ["aaa", "a"])
    kind = type("Empty", (Counting,), {"compute_turn_rewards": lambda *_: {}})
    with pytest.raises(EpisodeError, match="no reward"):
        collect(kind, ["aaa", "a"])


def test_the_context_ends_where_the_trainer_does():
    (group,) = collect(Shouter, ["a" * 99, "a" * 99], max_token_len=60)
    assert [len(tokens) for tokens in group["tokens"]] == [59, 59]


def test_an_agent_that_fails_takes_its_group_along_and_says_why():
    kind = type("Failing", (Shouter,), {"command": (sys.executable, "-c", "raise SystemExit('no idea')")})
    with pytest.raises(EpisodeError, match="no idea"):
        collect(kind, [])


def test_an_agent_that_cannot_be_started_says_so():
    with pytest.raises(EpisodeError, match="`command`"):
        collect(type("Missing", (Shouter,), {"command": ("/nowhere/agent",)}), [])


def test_an_agent_that_does_not_end_is_ended():
    kind = type("Endless", (Shouter,), {"command": (sys.executable, "-c", "import time; time.sleep(60)")})
    with pytest.raises(EpisodeError, match=r"--env\.agent_timeout_s"):
        collect(kind, [], agent_timeout_s=0.3)


def test_an_agent_that_asks_nothing_is_no_rollout():
    kind = type("Silent", (Shouter,), {"command": (sys.executable, "-c", "print('a')")})
    with pytest.raises(EpisodeError, match="without one answer"):
        collect(kind, [])


def test_without_tasks_or_an_agent_it_does_not_begin():
    with pytest.raises(PreflightError, match="`tasks`"):
        collect(type("Idle", (Shouter,), {"tasks": ()}), [])
    with pytest.raises(EpisodeError, match="`run_agent`"):
        collect(type("Nobody", (Shouter,), {"command": ()}), [])
