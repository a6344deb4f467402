"""Anthropic's messages. They are said in chat completions as vLLM's own route for them says them, so that both render the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from ...api.refusals import RequestRefused
from ..chat import Translation, refused
from ..sessions import Session
from ..streams import BegunTurn
from ..turns import Turn
from .base import content_of, event, read_fields, server_error


BILLING_HEADER = "x-anthropic-billing-header"
"""Claude Code begins a text of the system prompt with it. It differs with every request, and says nothing to a model."""

UNPARSED = "INVALID_JSON"
"""Anthropic's name for arguments that are no JSON object, in an object that has nothing else."""

TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Text(msgspec.Struct, tag="text"):
    """Text."""

    text: str


class Thinking(msgspec.Struct, tag="thinking"):
    """What the model thought."""

    thinking: str


class RedactedThinking(msgspec.Struct, tag="redacted_thinking"):
    """Thoughts of a model elsewhere, which nobody here can read."""


class ToolUse(msgspec.Struct, tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResult(msgspec.Struct, tag="tool_result"):
    """What a tool answered."""

    tool_use_id: str
    content: str | list[Text] | None = None


class User(msgspec.Struct, tag_field="role", tag="user"):
    """What the agent says."""

    content: str | list[Text | ToolResult]


class Assistant(msgspec.Struct, tag_field="role", tag="assistant"):
    """What the model said."""

    content: str | list[Text | Thinking | RedactedThinking | ToolUse]


class System(msgspec.Struct, tag_field="role", tag="system"):
    """What the agent says on the way, beside its prompt."""

    content: str | list[Text]


class Tool(msgspec.Struct):
    """A tool of the agent."""

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(msgspec.Struct):
    """Whether the model thinks."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputFormat(msgspec.Struct):
    """Of the answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    """How the model answers."""

    effort: str | None = None
    format: OutputFormat | None = None


class Fields(msgspec.Struct):
    """What is said in another way than in chat completions."""

    messages: list[User | Assistant | System]
    system: str | list[Text] | None = None
    max_tokens: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class AnthropicMessages:
    """See [`Dialect`]."""

    path = "/v1/messages"
    keep_alive = event({"type": "ping"}, "ping")

    def read(self, values: dict[str, Any], session: Session) -> Translation:
        """Say blocks as messages, and the other fields by their names there."""
        asked = read_fields(values, Fields)
        if asked.messages and isinstance(asked.messages[-1], Assistant):
            raise refused(
                "The last of `messages` is the assistant's.",
                "It begins the answer with text that the policy did not sample.",
                "End the conversation with a message of the user.",
            )
        chat: dict[str, Any] = {
            "messages": [said for message in (System(asked.system or ""), *asked.messages) for said in _said(message)],
            "max_tokens": asked.max_tokens,
            "stop": asked.stop_sequences,
            "tools": [_tool(tool) for tool in asked.tools or []],
        }
        changed = []
        if asked.tool_choice is not None:
            chat |= _tool_choice(asked.tool_choice)
        if asked.thinking is not None and asked.thinking.budget_tokens is not None:
            changed.append("thinking.budget_tokens")
        if asked.output_config is not None:
            chat |= _output(asked.output_config)
        if asked.thinking is not None and asked.thinking.type == "disabled":
            chat["reasoning_effort"] = "none"
        others = {name: value for name, value in values.items() if name not in Fields.__struct_fields__}
        return Translation({**others, **chat}, changed)

    def answer(self, values: dict[str, Any], turn: Turn) -> dict[str, Any]:
        """A message."""
        stopped = _stopped(turn)
        return {**_head(values, turn), "content": _blocks(turn), **stopped, "usage": _usage(turn, len(turn.sampled))}

    def events(self, values: dict[str, Any], turn: Turn) -> Iterator[bytes]:
        """The head of a message, its blocks one after another, its end."""
        yield _start(values, turn)
        yield from _block_events(turn, 0)
        yield from _end(turn)

    def live(self, values: dict[str, Any], turn: BegunTurn) -> _LiveBlock:
        """The events of a message whose first block is text."""
        return _LiveBlock(values, turn)

    def error(self, exc: RequestRefused) -> dict[str, Any]:
        """Anthropic's form, with the server's own words where they count."""
        message = (server_error(exc) or {}).get("message", str(exc))
        kind = ERRORS.get(exc.status_code, "invalid_request_error" if exc.status_code < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}

    def error_events(self, exc: RequestRefused) -> Iterator[bytes]:
        """One event."""
        yield event(self.error(exc), "error")


class _LiveBlock:
    """See [`LiveAnswer`]."""

    def __init__(self, values: dict[str, Any], turn: BegunTurn):
        self.values, self.turn = values, turn

    def begin(self) -> Iterator[bytes]:
        yield _start(self.values, self.turn)
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def text(self, text: str) -> bytes:
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})

    def end(self, turn: Turn) -> Iterator[bytes]:
        yield _event("content_block_stop", index=0)
        yield from _block_events(turn, 1)
        yield from _end(turn)


def _start(values: dict[str, Any], turn: Turn | BegunTurn) -> bytes:
    head = {**_head(values, turn), "content": [], "stop_reason": None, "stop_sequence": None}
    return _event("message_start", message={**head, "usage": _usage(turn, 0)})


def _block_events(turn: Turn, first: int) -> Iterator[bytes]:
    """The blocks of an answer from that of this index on."""
    for index, block in list(enumerate(_blocks(turn)))[first:]:
        empty, deltas = _in_parts(block)
        yield _event("content_block_start", index=index, content_block=empty)
        for delta in deltas:
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)


def _end(turn: Turn) -> Iterator[bytes]:
    yield _event("message_delta", delta=_stopped(turn), usage=_usage(turn, len(turn.sampled)))
    yield _event("message_stop")


def _said(message: User | Assistant | System) -> Iterator[dict[str, Any]]:
    """What one message is in chat completions: none, one, or several."""
    blocks = [Text(message.content)] if isinstance(message.content, str) else message.content
    texts = [block.text for block in blocks if isinstance(block, Text)]
    if isinstance(message, System):
        text = "".join(text for text in texts if not text.startswith(BILLING_HEADER))
        if text:
            yield {"role": "system", "content": text}
    elif isinstance(message, Assistant):
        yield _reply(blocks, texts)
    else:
        yield from (_result(block) for block in blocks if isinstance(block, ToolResult))
        if texts:
            yield {"role": "user", "content": content_of(texts)}


def _reply(blocks: Sequence[object], texts: list[str]) -> dict[str, Any]:
    calls = [_call(block) for block in blocks if isinstance(block, ToolUse)]
    thoughts = "".join(block.thinking for block in blocks if isinstance(block, Thinking))
    said: dict[str, Any] = {"role": "assistant", "content": content_of(texts)}
    if thoughts:
        said["reasoning"] = thoughts
    if calls:
        said |= {"content": said["content"] or None, "tool_calls": calls}
    return said


def _call(block: ToolUse) -> dict[str, Any]:
    own = block.input.get(UNPARSED) if block.input.keys() == {UNPARSED} else None
    arguments = own if isinstance(own, str) else json.dumps(block.input)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _result(block: ToolResult) -> dict[str, Any]:
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function | ({} if tool.strict is None else {"strict": tool.strict})}


def _tool_choice(choice: ToolChoice) -> dict[str, Any]:
    named = {"type": "function", "function": {"name": choice.name}}
    said: dict[str, Any] = {"tool_choice": TOOL_CHOICES.get(choice.type, named)}
    return said | ({"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {})


def _output(config: OutputConfig) -> dict[str, Any]:
    if config.format is None:
        return {"reasoning_effort": config.effort}
    schema = {"name": config.format.type, "schema": config.format.schema}
    response_format = {"type": config.format.type, "json_schema": schema}
    return {"reasoning_effort": config.effort, "response_format": response_format}


def _head(values: dict[str, Any], turn: Turn | BegunTurn) -> dict[str, Any]:
    model = str(values.get("model") or "")
    return {"id": f"msg_{turn.id}", "type": "message", "role": "assistant", "model": model}


def _usage(turn: Turn | BegunTurn, num_sampled: int) -> dict[str, int]:
    return {"input_tokens": turn.num_prompt_tokens, "output_tokens": num_sampled}


def _stopped(turn: Turn) -> dict[str, str | None]:
    if turn.finish_reason == "stop" and turn.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": turn.stop_string}
    return {"stop_reason": STOP_REASONS.get(turn.finish_reason, "end_turn"), "stop_sequence": None}


def _blocks(turn: Turn) -> list[dict[str, Any]]:
    """The answer in blocks. There is always one: clients look at the first."""
    message = turn.message
    blocks: list[dict[str, Any]] = []
    if message.get("reasoning"):
        # Clients send a signature back as it is.
        blocks.append({"type": "thinking", "thinking": message["reasoning"], "signature": turn.id})
    if message["content"]:
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls") or []:
        function = call["function"]
        arguments = _arguments(function["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
    return blocks or [{"type": "text", "text": ""}]


def _arguments(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {UNPARSED: text}


def _in_parts(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as it begins, and what is added to it."""
    if block["type"] == "tool_use":
        arguments = json.dumps(block["input"])
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": arguments}]
    if block["type"] == "thinking":
        deltas = [{"type": f"{name}_delta", name: block[name]} for name in ("thinking", "signature")]
        return {**block, "thinking": "", "signature": ""}, deltas
    return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]


def _event(kind: str, **values: Any) -> bytes:
    return event({"type": kind, **values}, kind)
