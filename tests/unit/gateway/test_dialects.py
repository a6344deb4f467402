"""The same conversation in every dialect, by the unmodified SDKs: the same tokens are sampled from, and the same is recorded."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from gateway_agents import AGENTS, CALL, ChatAgent, Clients, KeptResponsesAgent, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from token_server import CHATML, TokenServer

from trl_atropos.gateway.dialects import DIALECTS
from trl_atropos.gateway.gateway import Gateway, GatewaySession


TEMPLATE = CHATML.replace(
    "{{ m['content']", "{% if m['reasoning'] %}<think>{{ m['reasoning'] }}</think>{% endif %}{{ m['content']"
)
STOP = "halt"
WORDS = st.text('aehilnorstu \n"\\{<\u00e9', min_size=1, max_size=8).filter(str.strip)


@dataclass(frozen=True)
class Step:
    """What is sampled, and what the agent then does."""

    reply: str
    is_streamed: bool
    has_stop: bool
    rewritten: str
    told: str
    of_tools: str


@st.composite
def steps(draw: st.DrawFn) -> Step:
    thoughts = draw(st.sampled_from(["", "", f"<think>{draw(WORDS)}</think>"]))
    text = draw(st.one_of(st.just(""), WORDS))
    ends = draw(st.sampled_from(["", "", CALL, CALL + CALL, "\0", STOP + " on"]))
    told = draw(WORDS)
    return Step(
        thoughts + text + ends,
        draw(st.booleans()),
        STOP in ends,
        draw(st.sampled_from(["", "", "", draw(WORDS)])),
        told if CALL not in ends else draw(st.sampled_from(["", told])),
        draw(WORDS),
    )


@dataclass(frozen=True)
class Place:
    """Where conversations are held: a server with its gateway, and the clients of agents."""

    server: TokenServer
    gateway: Gateway
    clients: Clients
    loop: asyncio.AbstractEventLoop

    def hold(self, kind: type[ChatAgent], conversation: list[Step]) -> list[Any]:
        """Hold a conversation; return what was sampled from, what is trained, and how often it was continued and branched."""
        self.server.requests.clear()
        self.server.replies = [step.reply for step in conversation]
        counts = self.gateway.counts
        num_before = (counts.num_spliced, counts.num_branches)
        session = self.loop.run_until_complete(self._converse(kind, conversation))
        rollouts = [
            (rollout.tokens, rollout.masks, rollout.inference_logprobs, rollout.policy_version)
            for rollout in session.finished().rollouts
        ]
        num = (counts.num_spliced - num_before[0], counts.num_branches - num_before[1])
        return [prompts(self.server), rollouts, num]

    async def _converse(self, kind: type[ChatAgent], conversation: list[Step]) -> GatewaySession:
        async with self.gateway.session() as session:
            session.reward = 1.0
            agent = kind(session, self.clients, "be good", has_tools=True)
            agent.tell("tell")
            for step in conversation:
                await agent.ask(step.is_streamed, stop=[STOP] if step.has_stop else None)
                if step.rewritten and not agent.calls:
                    agent.rewrite(step.rewritten)
                agent.tell(step.told, step.of_tools)
        return session


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    loop = asyncio.new_event_loop()
    with TokenServer(TEMPLATE, parses_thoughts=True) as server:
        gateway, clients = Gateway([server.url]), Clients()
        loop.run_until_complete(gateway.__aenter__())
        yield Place(server, gateway, clients, loop)
        loop.run_until_complete(clients.__aexit__())
        loop.run_until_complete(gateway.__aexit__())
    loop.close()


@settings(max_examples=12, deadline=None)
@given(st.lists(steps(), min_size=2, max_size=4))
def test_a_conversation_is_recorded_in_the_same_way_in_every_dialect(place: Place, conversation: list[Step]):
    expected = place.hold(ChatAgent, conversation)
    for kind in AGENTS[1:]:
        # What is kept cannot be rewritten.
        if kind is not KeptResponsesAgent or not any(step.rewritten for step in conversation):
            assert place.hold(kind, conversation) == expected, kind


@pytest.mark.parametrize("kind", AGENTS)
def test_a_conversation_with_thoughts_and_calls_is_one_rollout(place: Place, kind: type[ChatAgent]):
    thoughts = "<think>hm</think>"
    replies = [f"{thoughts}here {CALL}{CALL}", CALL, f"{thoughts}the sum", "a thousand\0", "", "bye"]
    conversation = [Step(reply, bool(index % 2), False, "", "more", "3") for index, reply in enumerate(replies)]
    sampled_from, rollouts, num = place.hold(kind, conversation)
    server = place.server
    sampled = [server.sampled_ids(reply.rstrip("\0")) + [server.end] * (reply[-1:] != "\0") for reply in replies]
    ((tokens, masks, _, _),) = rollouts
    assert tokens == sampled_from[-1] + sampled[-1]
    assert [label for label in masks if label != -100] == list(itertools.chain(*sampled))
    assert num == (len(replies) - 1, 0)


def test_every_dialect_has_a_path_of_its_own():
    assert len({dialect.path for dialect in DIALECTS}) == len(DIALECTS) == 3
