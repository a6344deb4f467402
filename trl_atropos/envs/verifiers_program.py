"""What plays a seat of verifiers: a chat program inside of this process, and the endpoint that answers it with the policy's text.

Verifiers starts a process with an environment of its own for each of its programs. It allows a program in the process too,
as long as every call of the model goes through its interception server, which records the conversation that rewards read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from aiohttp import web
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harness import Harness
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.runtimes import ProgramResult


__all__ = ["InlineHarness"]

NAME = "trl_atropos_inline"
"""Verifiers looks for a program in the module of its name, which has no dot."""

TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)

Answer = Callable[[str, dict[str, Any]], Awaitable[str]]
"""Text of the policy for the conversation of an id and the body of its request."""


class InlineHarness(Harness[HarnessConfig]):
    """Chat with tools: asks the model until it answers without calling a tool."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
    ) -> ProgramResult:
        """Run one segment of a conversation."""
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(
                aiohttp.ClientSession(headers={"Authorization": f"Bearer {secret}"}, timeout=aiohttp.ClientTimeout())
            )
            tools, dispatch, connections = await connect_mcp({"mcpServers": servers}, stack)
            while True:
                body = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
                async with http.post(f"{endpoint}/chat/completions", json=body) as response:
                    if not response.ok:
                        # One of its stop rules, which the trace names, or an error.
                        return ProgramResult(exit_code=1, stdout="", stderr=await response.text())
                    message = (await response.json())["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return ProgramResult(exit_code=0, stdout="", stderr="")
                for call in message["tool_calls"]:
                    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
                    result: Any = f"error: unknown tool {name!r}"
                    if name in dispatch:
                        result = await call_mcp(connections, dispatch, name, arguments)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


async def serve_policy(answer: Answer) -> str:
    """Serve chat completions whose text `answer` gives, on this machine alone; return the base URL."""

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        text = await answer(request.headers.get("X-Session-ID", ""), body)
        choice = {"index": 0, "message": read_message(text, body), "finish_reason": "stop"}
        completion = {"id": "policy", "object": "chat.completion", "created": 0, "model": body["model"]}
        return web.json_response({**completion, "choices": [choice]})

    # Conversations are long.
    application = web.Application(client_max_size=2**28)
    application.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


def read_message(text: str, body: dict[str, Any]) -> dict[str, Any]:
    """The message that a text of the policy is, with the tools that it calls if it was offered any. A call that is no JSON
    is a part of the text.
    """
    calls = []
    for number, written in enumerate(TOOL_CALL.findall(text) if body.get("tools") else []):
        try:
            call = json.loads(written)
        except json.JSONDecodeError:
            continue
        if isinstance(call.get("name"), str) and isinstance(call.get("arguments", {}), dict):
            function = {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}))}
            calls.append({"id": f"call_{len(body['messages'])}_{number}", "type": "function", "function": function})
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text.partition("<tool_call>")[0], "tool_calls": calls}


def describe_tools(tools: list[dict[str, Any]]) -> str:
    """How the policy learns of its tools: the words that Qwen's and Hermes' chat templates have for them. The templates
    themselves would write the calls of earlier turns anew, in other tokens than were sampled.
    """
    signatures = "\n".join(json.dumps(tool) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
        f"signatures within <tools></tools> XML tags:\n<tools>\n{signatures}\n</tools>\n\nFor each function call, return a "
        "json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
