"""A gateway in front of two real servers that are published to, one of which is killed: nothing is lost, nothing is trained twice,
and every token has the version that sampled it.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gateway_agents import AGENTS, Clients, ask, check_logprobs, user
from publishing import Publishing, load
from servers import VLLMServer, add_chat_template, save_tiny_model
from transformers import PreTrainedModel

from trl_atropos import Gateway
from trl_atropos.gateway.gateway import GatewaySession


NUM_SESSIONS = 16
NUM_PUBLISHES = 10
KILLED_BEHIND = 4
MAX_TOKENS = 2048
MAX_TURNS = 40
MAX_TURN_TOKENS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return add_chat_template(save_tiny_model(directory, tied=True, seed=0, max_length=MAX_TOKENS))


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VLLMServer]]:
    directory = tmp_path_factory.mktemp("served")
    options = ("--enforce_eager", "True", "--dtype", "float32", "--max_model_len", str(MAX_TOKENS))
    both = [VLLMServer(model, *options, log_path=directory / f"{number}.log") for number in range(2)]
    try:
        for server in both:
            server.start()
        yield both
    finally:
        for server in both:
            server.stop()


class Publisher(threading.Thread):
    """Publishes one policy after another to all servers that are there, and kills the last server on the way.

    `policies` has them by version, and `spans` the monotonic seconds in which each publish ran.
    """

    def __init__(self, servers: list[VLLMServer], model: Path):
        super().__init__()
        self.servers = servers
        self.publishing = [Publishing(server.url, model) for server in servers]
        self.policies: dict[int, PreTrainedModel] = {}
        self.spans: list[tuple[float, float]] = []
        self.model = load(model)
        self.error: BaseException | None = None
        self.has_ended = False
        self._publish(1)

    def run(self) -> None:
        try:
            for version in range(2, NUM_PUBLISHES + 1):
                self._publish(version)
                if version == KILLED_BEHIND:
                    self.servers[-1].kill()
                    self.publishing.pop().publisher.close()
        except BaseException as exc:
            self.error = exc
            raise
        finally:
            self.has_ended = True

    def close(self) -> None:
        for publishing in self.publishing:
            publishing.publisher.close()

    def _publish(self, version: int) -> None:
        policy = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        self.policies[version] = policy
        start = time.monotonic()
        for publishing in self.publishing:
            publishing.publish(policy, version)
        self.spans.append((start, time.monotonic()))


@pytest.mark.parametrize("kind", AGENTS)
def test_what_is_passed_on_as_it_is_sampled_is_what_is_recorded(model, servers, kind):
    async def run() -> tuple[Gateway, GatewaySession, list[str]]:
        async with Gateway([server.url for server in servers]) as gateway, Clients() as clients:
            async with gateway.session() as session:
                agent = kind(session, clients, "Be good.", has_tools=False)
                for told in ("Tell me more.", "And then?", "And?"):
                    agent.tell(told)
                    # The policy knows no words: what it says has special tokens and broken characters in it.
                    await agent.ask(is_streamed=True, max_tokens=64, stop=["e"] if told == "And?" else None)
                session.reward = 1.0
            return gateway, session, agent.seen

    gateway, session, seen = asyncio.run(run())
    turns = session.recorded.turns
    # One that its stop string ends at once has no text before its end.
    assert gateway.counts.num_streamed >= 2 and len(turns) == 3
    # Else it would not have come as it was sampled, or its message would be another one than that of the whole answer.
    assert gateway.recorder.may_pass_on
    assert [reply["content"] for reply in session.replies] == seen
    policy = load(model)
    for turn in turns:
        check_logprobs(turn, policy)


def test_a_server_dies_between_publishes_and_no_session_notices(model, servers):
    publisher = Publisher(servers, model)
    turn_spans: dict[str, list[tuple[float, float]]] = {}

    async def converse(session: GatewaySession, have_begun: asyncio.Barrier) -> None:
        spans = turn_spans[session.id] = []
        messages: list[dict[str, Any]] = []

        async def turn() -> None:
            messages.append(user("More." if messages else f"Tell me of {session.id[:8]}."))
            start = time.monotonic()
            await ask(session.base_url, messages, max_tokens=MAX_TURN_TOKENS)
            spans.append((start, time.monotonic()))

        await turn()
        if await have_begun.wait() == 0:
            publisher.start()
        while not publisher.has_ended and len(spans) < MAX_TURNS:
            await turn()
        await turn()
        session.reward = 1.0

    async def attempt(gateway: Gateway, have_begun: asyncio.Barrier) -> GatewaySession:
        async with gateway.session() as session:
            await converse(session, have_begun)
        return session

    async def run() -> tuple[Gateway, list[GatewaySession]]:
        async with Gateway([server.url for server in servers]) as gateway:
            have_begun = asyncio.Barrier(NUM_SESSIONS)
            return gateway, await asyncio.gather(*(attempt(gateway, have_begun) for _ in range(NUM_SESSIONS)))

    try:
        gateway, sessions = asyncio.run(run())
    finally:
        if publisher.is_alive():
            publisher.join()
        publisher.close()
    assert publisher.error is None
    assert [server.is_there for server in gateway.servers.servers] == [True, False]
    assert gateway.servers.num_moves > 0
    assert gateway.counts.spliced_share == 1.0
    num_compared = 0
    versions = set()
    for session in sessions:
        turns, spans = session.recorded.turns, turn_spans[session.id]
        assert len(turns) == len(spans) >= 3
        # One conversation, every sampled token of it trained once.
        (rollout,) = session.finished().rollouts
        sampled = [token for turn in turns for token in turn.sampled]
        assert [label for label in rollout.masks if label != -100] == sampled
        of_session = [turn.policy_version for turn in turns]
        assert None not in of_session and of_session == sorted(of_session)
        versions.update(of_session)
        for turn, span in zip(turns, spans, strict=True):
            if any(start < span[1] and span[0] < end for start, end in publisher.spans):
                continue
            check_logprobs(turn, publisher.policies[turn.policy_version])
            num_compared += 1
    # At least those before the first publish and behind the last one.
    assert num_compared >= 2 * NUM_SESSIONS
    assert {1, NUM_PUBLISHES} <= versions
