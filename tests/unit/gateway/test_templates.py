"""TRL's chat templates, with random conversations: what is sampled from differs from the rendering inside of replies only."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import trl
from gateway_agents import ADD, renderings
from jinja2 import TemplateError
from token_server import MARKERS, Refused, TokenServer

from trl_atropos.gateway.chat import Translation, read_chat_request
from trl_atropos.gateway.counts import GatewayCounts
from trl_atropos.gateway.groups import rollouts_of
from trl_atropos.gateway.options import GatewayOptions
from trl_atropos.gateway.recorder import Recorder
from trl_atropos.gateway.servers import InferenceServer, ServerAnswer, ServerRefused
from trl_atropos.gateway.sessions import Session


IN_PARTS = ("idefics3", "llava_next", "smolvlm")
"""They take the content of a message as a list of parts only."""
TEMPLATES = [
    path
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.startswith(IN_PARTS)
]
# By which models end a reply; the first that a template has. `\uff5c` and `\u2581` are wide lines in markers.
ENDS = (
    "<|return|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|end|>",
    "<turn|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|user|>",
)
SAMPLED_MARKERS = {"cohere2": "{}<|END_RESPONSE|>", "muse_glimmer": "to=user<|message|>{}"}
"""What a model itself writes around its reply, by template; the parser takes it off."""
NUM_CONVERSATIONS = 6
NUM_REQUESTS = 6
LETTERS = "aehilnorstu"


class InProcess:
    """A server without HTTP."""

    def __init__(self, server: TokenServer):
        self.server = server
        self.max_model_len = 100_000
        self.num_resent = 0

    async def post(self, _affinity: Any, path: str, body: dict[str, Any]) -> ServerAnswer:
        try:
            return ServerAnswer(self.server.answer(path, body), InferenceServer("here"), {})
        except (TemplateError, Refused, TypeError) as exc:
            raise ServerRefused("A template refused.", str(exc), "Leave it out.", 400) from exc


def words(rng: random.Random) -> str:
    """Text that the tokenizer merges where it renders, and without white space around it, which many templates strip."""
    return " ".join("".join(rng.choices(LETTERS, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4)))


def call(rng: random.Random) -> str:
    return f'<tool_call>{{"name": "add", "arguments": {{"a":   {rng.randint(0, 99)}}}}}</tool_call>'


async def converse(
    recorder: Recorder, server: TokenServer, rng: random.Random, has_tools: bool, markers: str
) -> Session:
    """An agent that goes on, calls tools, is cut off, rewrites what it was told, and goes back."""
    session = Session()
    server.requests.clear()
    messages: list[dict[str, Any]] = [{"role": "user", "content": words(rng)}]
    for _ in range(NUM_REQUESTS):
        action = rng.random()
        reply = call(rng) if has_tools and action < 0.4 else words(rng) + ("\0" if action > 0.9 else "")
        server.replies = [markers.format(reply) if not reply.startswith("<tool_call>") else reply]
        values = {"messages": messages, **({"tools": [ADD]} if has_tools else {})}
        turn = await recorder.answer(session, read_chat_request(Translation(values), 1.0), b"")
        rendered = renderings(server)[-1]
        server.requests.clear()
        prompt = turn.token_ids()[: -len(turn.sampled)].tolist()
        check_prompt(server, turn, prompt, rendered)
        said = dict(turn.message)
        if said["content"]:
            said["content"] = MARKERS.sub("", said["content"]).removeprefix("to=user")
            turn.message = said
        messages = [*messages, {**said, "content": said["content"] or ""}]
        if turn.message.get("tool_calls"):
            called = turn.message["tool_calls"][0]
            messages.append({"role": "tool", "name": "add", "tool_call_id": called["id"], "content": words(rng)})
            continue
        what = rng.random()
        if what < 0.15:
            messages[-1] = {"role": "assistant", "content": words(rng)}
        elif what < 0.25:
            messages = messages[: max(1, len(messages) - 4)]
            if messages[-1]["role"] != "user":
                messages = messages[:1]
            continue
        messages.append({"role": "user", "content": words(rng)})
    return session


def check_prompt(server: TokenServer, turn: Any, prompt: list[int], rendered: list[int]) -> None:
    if turn.parent is None:
        assert prompt == rendered
        return
    # The parts that nobody sampled are the template's tokens, in its order, and cover all but the replies.
    parts = [earlier.added.tolist() for earlier in turn.path()]
    assert rendered[-len(parts[-1]) :] == parts[-1] or not parts[-1]
    # As text both are the same conversation. Templates write calls of tools in their own way.
    if not any(earlier.message.get("tool_calls") for earlier in turn.path()[:-1]):
        assert comparable(server.text(prompt)) == comparable(server.text(rendered))


def comparable(text: str) -> str:
    """Without white space around markers, and what some templates write before the last reply only, or before all others."""
    for empty in ("<think>", "</think>", "<|turn>model"):
        text = text.replace(empty, "")
    return "".join(text.split())


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_what_is_sampled_from_is_the_rendering_but_for_what_was_sampled(path: Path):
    template = path.read_text()
    server = TokenServer(template, next((end for end in ENDS if end in template), "</s>"))
    markers = SAMPLED_MARKERS.get(path.stem.removesuffix("_training"), "{}")
    counts = GatewayCounts()
    recorder = Recorder(InProcess(server), GatewayOptions(), counts)  # type: ignore[arg-type]
    rng = random.Random(path.stem)
    num_refused = 0
    for number in range(NUM_CONVERSATIONS):
        try:
            session = asyncio.run(converse(recorder, server, rng, bool(number % 2), markers))
        except ServerRefused:
            # Not every template takes tools.
            num_refused += 1
            continue
        rollouts = rollouts_of(session.turns)
        num_trained = sum(label != -100 for rollout in rollouts for label in rollout.masks)
        assert num_trained == sum(len(turn.sampled) for turn in session.turns)
    assert num_refused <= NUM_CONVERSATIONS // 2
    if path.stem.removesuffix("_training") != "gptoss":
        # There the history has another end than the one that is sampled.
        assert counts.num_spliced >= 6
    else:
        assert counts.num_spliced == 0
