"""`AgentEnv` without Atropos' loop: the agent as a command, what it is told, and how it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from atroposlib.envs.base import BaseEnv
from tenacity import RetryError, wait_none
from token_server import GENERATE, TokenServer

from trl_atropos.api.refusals import RequestRefused
from trl_atropos.errors import EpisodeError, PreflightError
from trl_atropos.gateway import AgentEnv, GatewayOptions
from trl_atropos.gateway.counts import GatewayCounts
from trl_atropos.gateway.counts_file import COUNTS_VARIABLE, read_counts
from trl_atropos.gateway.options import SCALE_REWARDS_VARIABLE, TEMPERATURE_VARIABLE


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


class Forgetful(Shouter):
    """Asks twice, the second time without its history: a session that branched, whose advantages are computed with it."""

    command = (sys.executable, "-c", AGENT + AGENT.replace("json.load(sys.stdin)", '{"ask": "once more"}'))

    def compute_reward(self, task: Any, outcome: str) -> float:
        self.rewards = [*getattr(self, "rewards", []), 3.0 - 2 * len(getattr(self, "rewards", []))]
        return self.rewards[-1]


def environment(kind: type[AgentEnv], server: TokenServer, max_token_len: int = 1000, **config: Any) -> AgentEnv:
    """As far as `BaseEnv` makes one before its loop; its constructor loads a tokenizer of the hub."""
    made = kind.__new__(kind)
    made.config, _ = kind.config_init()
    made.config = made.config.model_copy(update={"group_size": 2, **config})
    one = SimpleNamespace(base_url=f"{server.url}/v1", api_key="x")
    made.server = SimpleNamespace(servers=[SimpleNamespace(config=one)])
    made.max_token_len = max_token_len
    return made


@pytest.fixture
def counts_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a launch names it to an environment."""
    monkeypatch.setenv(COUNTS_VARIABLE, str(tmp_path / "counts"))
    return tmp_path / "counts"


def collect(
    kind: type[AgentEnv], replies: list[Any], temperatures: list[float] | None = None, **options: Any
) -> list[Any]:
    """The groups of one task; `temperatures` gets those at which the server was asked to sample."""

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
        groups = asyncio.run(run())
        if temperatures is not None:
            bodies = [body for path, body in server.requests if path == GENERATE]
            temperatures += [body["sampling_params"]["temperature"] for body in bodies]
        return groups


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


OWN_TEMPERATURE = type("Own", (Shouter,), {"gateway_options": GatewayOptions(temperature=0.5)})


@pytest.mark.parametrize(
    ("kind", "told", "sampled_at"),
    [
        *((Shouter, None, 1.0), (Shouter, "0.7", 0.7), (OWN_TEMPERATURE, None, 0.5)),
        # What the group was sampled at is what it is scored at, so that an own temperature can stay.
        *((OWN_TEMPERATURE, "0.7", 0.5), (OWN_TEMPERATURE, "0.5", 0.5)),
    ],
)
def test_under_a_launch_it_samples_at_the_temperature_of_the_trainer(kind, told, sampled_at, monkeypatch, caplog):
    monkeypatch.delenv(TEMPERATURE_VARIABLE, raising=False)
    if told is not None:
        monkeypatch.setenv(TEMPERATURE_VARIABLE, told)
    asked: list[float] = []
    (group,) = collect(kind, ["aaa", "a"], asked)
    assert asked == [sampled_at] * 2
    assert group["generation_params"] == {"temperature": sampled_at}
    said = "event=temperature_differs gateway_options=0.5 trainer=0.7"
    assert (said in caplog.text) == (told == "0.7" and kind is OWN_TEMPERATURE)


@pytest.mark.parametrize("told", ["warm", "0", "nan"])
def test_a_temperature_that_is_none_is_refused(told, monkeypatch):
    monkeypatch.setenv(TEMPERATURE_VARIABLE, told)
    with pytest.raises(PreflightError, match="`--temperature` of the trainer"):
        collect(Shouter, [])


@pytest.mark.parametrize(
    ("own", "told", "advantage"),
    [
        # Rewards 3 and 1 are 1 off their mean, and their unbiased deviation is the square root of 2, plus 1e-4.
        *((None, None, 1 / (2**0.5 + 1e-4)), (None, "group", 1 / (2**0.5 + 1e-4)), (None, "none", 1.0)),
        *(("none", None, 1.0), ("none", "group", 1.0), ("none", "batch", 1.0)),
        ("group", "batch", 1 / (2**0.5 + 1e-4)),
    ],
)
def test_advantages_that_it_computes_are_scaled_as_those_of_the_trainer(own, told, advantage, monkeypatch, caplog):
    monkeypatch.delenv(SCALE_REWARDS_VARIABLE, raising=False)
    if told is not None:
        monkeypatch.setenv(SCALE_REWARDS_VARIABLE, told)
    groups = collect(Forgetful, ["a"] * 4, scale_rewards=own)
    # Two sessions of two rollouts each.
    found = sorted(max(values, key=abs) for group in groups for values in group["advantages"])
    assert found == pytest.approx([-advantage, -advantage, advantage, advantage])
    said = "event=scale_rewards_differs environment=none trainer=group"
    assert (said in caplog.text) == ((own, told) == ("none", "group"))


def test_the_deviation_of_a_whole_batch_is_refused(monkeypatch):
    monkeypatch.setenv(SCALE_REWARDS_VARIABLE, "batch")
    with pytest.raises(PreflightError, match=r"--scale_rewards batch.*--env\.scale_rewards group"):
        collect(Shouter, [])


def test_the_context_ends_where_the_trainer_does():
    (group,) = collect(Shouter, ["a" * 99, "a" * 99], max_token_len=60)
    assert [len(tokens) for tokens in group["tokens"]] == [59, 59]


def test_an_agent_that_fails_takes_its_group_along_and_says_why():
    kind = type("Failing", (Shouter,), {"command": (sys.executable, "-c", "raise SystemExit('no idea')")})
    with pytest.raises(EpisodeError, match="no idea"):
        collect(kind, [])


@contextlib.contextmanager
def api_answering(statuses: list[int]) -> Iterator[str]:
    """Something that answers posts as an API does, with one status after the other."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(statuses.pop(0))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_groups_that_the_api_took_and_others_are_counted_where_a_launch_reads_it(counts_dir: Path, monkeypatch):
    # Atropos would wait for seconds between its three attempts.
    monkeypatch.setattr(BaseEnv._send_scored_data_to_api.retry, "wait", wait_none())

    async def run(server: TokenServer, api_url: str) -> GatewayCounts:
        made = environment(Shouter, server, rollout_server_url=api_url)
        await made.setup()
        groups, _ = await made.collect_trajectories(await made.get_next_item())
        # Refused, taken as one and as two, taken in the second attempt, and never answered.
        for sent in (groups, groups[0], groups * 2, groups):
            await made._send_scored_data_to_api(sent)
        with pytest.raises(RetryError):
            await made._send_scored_data_to_api(groups)
        await made.gateway.__aexit__()
        return made.gateway.counts

    statuses = [422, 200, 200, 503, 200, 503, 503, 503]
    with TokenServer() as server, api_answering(statuses) as api_url:
        server.replies = ["aaa", "a"]
        counts = asyncio.run(run(server, api_url))
    assert statuses == []
    # Three letters and an end, one letter and an end.
    assert (counts.num_sessions, counts.num_turns, counts.num_sampled_tokens) == (2, 2, 6)
    assert (counts.num_sessions_discarded, counts.num_groups_sent, counts.num_groups_lost) == (0, 4, 2)
    (read,) = read_counts(counts_dir)
    assert (read.num_sampled_tokens, read.num_groups_sent) == (6, 4)


def test_a_group_is_lost_with_its_agents():
    kind = type("Failing", (Shouter,), {"command": (sys.executable, "-c", "raise SystemExit('no idea')")})

    async def run(server: TokenServer) -> GatewayCounts:
        made = environment(kind, server)
        await made.setup()
        with pytest.raises(EpisodeError, match="no idea"):
            await made.collect_trajectories(await made.get_next_item())
        collecting = asyncio.create_task(made.collect_trajectories(await made.get_next_item()))
        await asyncio.sleep(0)
        # As Atropos does where its queue is full: it comes back to the task.
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting
        await made.gateway.__aexit__()
        return made.gateway.counts

    with TokenServer() as server:
        counts = asyncio.run(run(server))
    # When the first one fails, the other is given up.
    assert (counts.num_sessions, counts.num_sessions_discarded, counts.num_groups_lost) == (2, 2, 1)


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
