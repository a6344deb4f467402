"""Agents of the SDKs of OpenAI and Anthropic, and a gateway in front of a server with scripted replies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from token_server import TokenServer
from transformers import PreTrainedModel

from trl_atropos.gateway.gateway import Gateway, GatewaySession
from trl_atropos.gateway.options import GatewayOptions
from trl_atropos.gateway.turns import Turn


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two integers.",
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
MAX_LOGPROB_ERROR = 1e-3
"""Nats between two sides that compute in float32, in another order."""
CALL = '<tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call>'
"""With other white space than the template writes."""


def client(base_url: str, **options: Any) -> AsyncOpenAI:
    """What agents are built on."""
    return AsyncOpenAI(base_url=base_url, api_key=options.pop("api_key", "x"), max_retries=0, **options)


async def ask(base_url: str, messages: list[dict[str, Any]], **options: Any) -> Any:
    """Ask for one answer, and put it at the end of the conversation, as agents do."""
    async with client(base_url) as openai:
        answer = await openai.chat.completions.create(model="gpt-4o", messages=messages, **options)
    messages.append(answer.choices[0].message.model_dump(exclude_none=True))
    return answer.choices[0]


class Clients:
    """One client of each SDK, for all agents of a test: it takes long to make one."""

    def __init__(self) -> None:
        self.openai = AsyncOpenAI(api_key="x", max_retries=0)
        self.anthropic = AsyncAnthropic(api_key="x", max_retries=0)

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.openai.close()
        await self.anthropic.close()


class ChatAgent:
    """Holds a conversation in chat completions, as the other agents do in their dialects.

    `ask` gets one answer, streamed or not, and puts it at the end of the conversation; `tell` says something, after an answer
    to every call of a tool in the last one; `rewrite` puts other words in the place of the last answer. `seen` has the text of each
    answer, out of the parts in which it came.
    """

    def __init__(self, session: GatewaySession, clients: Clients, system: str, has_tools: bool):
        self.session = session
        self.openai = clients.openai.with_options(base_url=session.base_url)
        self.anthropic = clients.anthropic.with_options(base_url=session.anthropic_base_url)
        self.system = system
        self.has_tools = has_tools
        self.calls: list[str] = []
        self.seen: list[str] = []
        self.start()

    def start(self) -> None:
        self.messages: list[Any] = [{"role": "system", "content": self.system}]

    def tell(self, text: str, of_tools: str = "") -> None:
        self.messages += [{"role": "tool", "tool_call_id": call, "content": of_tools} for call in self.calls]
        if text:
            self.messages.append(user(text))

    def rewrite(self, text: str) -> None:
        self.messages[-1] = {"role": "assistant", "content": text}

    async def ask(self, is_streamed: bool = False, max_tokens: int = 400, stop: list[str] | None = None) -> None:
        asked: Any = {"model": "m", "messages": self.messages, "max_tokens": max_tokens, "stop": stop or []}
        if self.has_tools:
            asked["tools"] = [ADD]
        if is_streamed:
            chunks = [chunk async for chunk in await self.openai.chat.completions.create(**asked, stream=True)]
            message = chunks[0].choices[0].delta
            deltas = [chunk.choices[0].delta for chunk in chunks]
            message.content = "".join(delta.content for delta in deltas if delta.content) or message.content
            message.tool_calls = [call for delta in deltas for call in delta.tool_calls or []] or None
        else:
            message = (await self.openai.chat.completions.create(**asked)).choices[0].message
        self.messages.append({"role": "assistant", **message.model_dump(exclude_none=True)})
        self.seen.append(message.content or "")
        self.calls = [call.id for call in message.tool_calls or []]


class MessagesAgent(ChatAgent):
    """In Anthropic's messages."""

    def start(self) -> None:
        self.messages = []

    def tell(self, text: str, of_tools: str = "") -> None:
        results = [{"type": "tool_result", "tool_use_id": call, "content": of_tools} for call in self.calls]
        self.messages.append(
            {"role": "user", "content": [*results, *([{"type": "text", "text": text}] if text else [])]}
        )

    async def ask(self, is_streamed: bool = False, max_tokens: int = 400, stop: list[str] | None = None) -> None:
        asked: Any = {"model": "m", "messages": self.messages, "max_tokens": max_tokens, "stop_sequences": stop or []}
        if self.has_tools:
            function = ADD["function"]
            tool = {"name": "add", "description": function["description"], "input_schema": function["parameters"]}
            asked["tools"] = [tool]
        if is_streamed:
            async with self.anthropic.messages.stream(**asked, system=self.system) as stream:
                answer = await stream.get_final_message()
        else:
            answer = await self.anthropic.messages.create(**asked, system=self.system)
        self.messages.append({"role": "assistant", "content": answer.content})
        self.seen.append("".join(block.text for block in answer.content if block.type == "text"))
        self.calls = [block.id for block in answer.content if block.type == "tool_use"]


class ResponsesAgent(ChatAgent):
    """In the items of OpenAI's Responses."""

    def start(self) -> None:
        self.messages = []
        self.num_of_answer = 0
        self.previous: str | None = None

    def tell(self, text: str, of_tools: str = "") -> None:
        outputs = [{"type": "function_call_output", "call_id": call, "output": of_tools} for call in self.calls]
        self.messages += [*outputs, *([user(text)] if text else [])]

    def rewrite(self, text: str) -> None:
        self.messages[-self.num_of_answer :] = [{"role": "assistant", "content": text}]

    async def ask(self, is_streamed: bool = False, max_tokens: int = 400, stop: list[str] | None = None) -> None:
        asked: Any = {
            "model": "m",
            "input": self.messages,
            "max_output_tokens": max_tokens,
            "instructions": self.system,
        }
        # The server's own addition.
        asked |= {"previous_response_id": self.previous, "extra_body": {"stop": stop or []}}
        if self.has_tools:
            asked["tools"] = [{"type": "function", **ADD["function"]}]
        if is_streamed:
            events = [event async for event in await self.openai.responses.create(**asked, stream=True)]
            answer = events[-1].response
            self.seen.append("".join(event.delta for event in events if event.type == "response.output_text.delta"))
        else:
            answer = await self.openai.responses.create(**asked)
            self.seen.append(answer.output_text)
        self.go_on(answer)
        self.calls = [item.call_id for item in answer.output if item.type == "function_call"]

    def go_on(self, answer: Any) -> None:
        self.messages += answer.output
        self.num_of_answer = len(answer.output)


class KeptResponsesAgent(ResponsesAgent):
    """In Responses that each name the one before."""

    def go_on(self, answer: Any) -> None:
        self.messages, self.previous = [], answer.id


AGENTS = (ChatAgent, MessagesAgent, ResponsesAgent, KeptResponsesAgent)


@asynccontextmanager
async def gateway_of(*servers: TokenServer, **options: Any) -> AsyncIterator[Gateway]:
    async with Gateway([server.url for server in servers], GatewayOptions(**options)) as gateway:
        yield gateway


def in_session(
    server: TokenServer, agent: Callable[[GatewaySession], Awaitable[Any]], **options: Any
) -> tuple[GatewaySession, Gateway]:
    """Run an agent in a session of its own; return the session, which has ended with reward 1, and its gateway."""

    async def run() -> tuple[GatewaySession, Gateway]:
        async with gateway_of(server, **options) as gateway:
            async with gateway.session() as session:
                session.reward = 1.0
                await agent(session)
            return session, gateway

    return asyncio.run(run())


def recorded(
    agent: Callable[[GatewaySession], Awaitable[Any]], replies: list[Any], **options: Any
) -> tuple[TokenServer, GatewaySession, Gateway]:
    """Run an agent against a server with these replies; return also the server, which has what it was asked."""
    with TokenServer(parses_thoughts=True) as server:
        server.replies = replies
        session, gateway = in_session(server, agent, **options)
    return server, session, gateway


def check_logprobs(turn: Turn, policy: PreTrainedModel) -> None:
    """Its logprobs are those of the policy for its tokens, teacher forced."""
    tokens = torch.tensor([turn.token_ids().tolist()])
    with torch.no_grad():
        logprobs = policy(tokens).logits[0].log_softmax(-1)
    first = tokens.shape[1] - len(turn.sampled)
    expected = [logprobs[first - 1 + i, token].item() for i, token in enumerate(turn.sampled)]
    assert turn.logprobs.tolist() == pytest.approx(expected, abs=MAX_LOGPROB_ERROR)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def tool(call: dict[str, Any], text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


def prompts(server: TokenServer) -> list[list[int]]:
    """What was sampled from, in order."""
    return [body["token_ids"] for path, body in server.requests if path == "/inference/v1/generate"]


def renderings(server: TokenServer) -> list[list[int]]:
    """What the template made of the requests that were answered, in order."""
    bodies = [body for path, body in server.requests if path == "/v1/chat/completions/render"]
    asked = [body for body in bodies if "temperature" in body]
    return [server.rendered(json.loads(json.dumps(body))) for body in asked]
