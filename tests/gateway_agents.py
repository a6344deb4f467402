"""Agents of the OpenAI SDK, and a gateway in front of a server with scripted replies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from openai import AsyncOpenAI
from token_server import TokenServer

from trl_atropos.gateway.gateway import Gateway, GatewaySession
from trl_atropos.gateway.options import GatewayOptions


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two integers.",
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
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
