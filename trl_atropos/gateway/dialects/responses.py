"""OpenAI's Responses. Items become messages, and a response that another one names as the one before is a turn of the session."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec

from ...api.refusals import RequestRefused
from ..chat import Translation
from ..sessions import Session
from ..streams import BegunTurn
from ..turns import Turn
from .base import content_of, event, openai_error, read_fields


PARTS = ("reasoning", "content", "tool_calls")
"""What an assistant's message consists of, in the order of its items."""

NO_EXTRAS: dict[str, list[Any]] = {"annotations": [], "logprobs": []}


class InputText(msgspec.Struct, tag="input_text"):
    """Text of the agent."""

    text: str


class OutputText(msgspec.Struct, tag="output_text"):
    """Text of the model."""

    text: str


class ReasoningText(msgspec.Struct, tag="reasoning_text"):
    """Thoughts."""

    text: str


class SummaryText(msgspec.Struct, tag="summary_text"):
    """Thoughts in short."""

    text: str


class Message(msgspec.Struct, tag="message"):
    """A message, or the text of one of the model's."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText]


class Reasoning(msgspec.Struct, tag="reasoning"):
    """What the model thought before the items that follow."""

    content: list[ReasoningText] | None = None
    summary: list[SummaryText] = []
    encrypted_content: None = None


class FunctionCall(msgspec.Struct, tag="function_call"):
    """A call of a tool."""

    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class FunctionCallOutput(msgspec.Struct, tag="function_call_output"):
    """What a tool answered."""

    call_id: str
    output: str | list[InputText]


class ItemReference(msgspec.Struct, tag="item_reference"):
    """An item of an earlier response."""

    id: str


Said = Message | Reasoning | FunctionCall
Item = Said | FunctionCallOutput | ItemReference


class Tool(msgspec.Struct, tag="function"):
    """A tool of the agent."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Namespace(msgspec.Struct, tag="namespace"):
    """Tools under one name."""

    name: str
    tools: list[Tool]


class ToolChoice(msgspec.Struct):
    """The tool that must be called."""

    type: Literal["function"]
    name: str


class ReasoningOptions(msgspec.Struct):
    """How the model thinks, and what is shown of it."""

    effort: str | None = None
    summary: str | None = None


class TextOptions(msgspec.Struct):
    """How the model answers."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Fields(msgspec.Struct):
    """What is said in another way than in chat completions."""

    input: str | list[Item]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    tools: list[Tool | Namespace] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None


class Responses:
    """See [`Dialect`]."""

    path = "/v1/responses"
    keep_alive = b": the answer is being sampled\n\n"

    def read(self, values: dict[str, Any], session: Session) -> Translation:
        """Say items as messages, behind the conversation that they go on with."""
        asked = read_fields(_with_types(values), Fields)
        instructions = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
        text, reasoning = asked.text or TextOptions(), asked.reasoning or ReasoningOptions()
        items = [Message("user", asked.input)] if isinstance(asked.input, str) else asked.input
        said = _said(items, session)
        chat = {
            "messages": [*instructions, *_conversation_before(asked.previous_response_id, session), *said],
            "max_tokens": asked.max_output_tokens,
            "tools": [said for tool in asked.tools or [] for said in _tools(tool)],
            "tool_choice": _tool_choice(asked.tool_choice),
            "reasoning_effort": reasoning.effort,
            "response_format": _response_format(text.format),
        }
        not_said = {"reasoning.summary": reasoning.summary, "text.verbosity": text.verbosity}
        others = {name: value for name, value in values.items() if name not in Fields.__struct_fields__}
        # Instructions are those of one request.
        kept_from = None if asked.store is False else len(instructions)
        return Translation({**others, **chat}, [name for name, value in not_said.items() if value], kept_from)

    def answer(self, values: dict[str, Any], turn: Turn) -> dict[str, Any]:
        """A response that has ended."""
        is_cut = turn.finish_reason == "length"
        num_prompt, num_sampled = turn.num_prompt_tokens, len(turn.sampled)
        return {
            **_head(values, turn),
            "status": _status(turn),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": _items(turn, values),
            "usage": {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": num_sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": num_prompt + num_sampled,
            },
        }

    def events(self, values: dict[str, Any], turn: Turn) -> Iterator[bytes]:
        """The response as it begins, its items one after another, the response as it is."""
        made = _Events()
        yield from _begun(made, values, turn)
        yield from _item_events(made, _items(turn, values), 0)
        yield made(_status(turn), response=self.answer(values, turn))

    def live(self, values: dict[str, Any], turn: BegunTurn) -> _LiveMessage:
        """The events of a response whose first item is a message."""
        return _LiveMessage(self, values, turn)

    def error(self, exc: RequestRefused) -> dict[str, Any]:
        """OpenAI's form."""
        return openai_error(exc)

    def error_events(self, exc: RequestRefused) -> Iterator[bytes]:
        """One event, in the form of the reference and in that which the SDK raises."""
        error = openai_error(exc)["error"]
        yield event({"type": "error", "sequence_number": 0, **error, "error": error}, "error")


class _Events:
    """Makes the numbered events of one response."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def __call__(self, kind: str, **fields: Any) -> bytes:
        number = next(self._numbers)
        return event({"type": f"response.{kind}", "sequence_number": number, **fields}, f"response.{kind}")


class _LiveMessage:
    """See [`LiveAnswer`]."""

    def __init__(self, responses: Responses, values: dict[str, Any], turn: BegunTurn):
        self.responses, self.values, self.turn = responses, values, turn
        self._made = _Events()

    def begin(self) -> Iterator[bytes]:
        yield from _begun(self._made, self.values, self.turn)
        head = {"id": f"msg_{self.turn.id}", "type": "message", "role": "assistant"}
        yield self._made("output_item.added", output_index=0, item={**head, "content": [], "status": "in_progress"})
        yield self._of_part("content_part.added", part={"type": "output_text", "text": "", **NO_EXTRAS})

    def text(self, text: str) -> bytes:
        return self._of_part("output_text.delta", delta=text, logprobs=[])

    def end(self, turn: Turn) -> Iterator[bytes]:
        items = _items(turn, self.values)
        (part,) = items[0]["content"]
        yield self._of_part("output_text.done", text=part["text"], logprobs=[])
        yield self._of_part("content_part.done", part=part)
        yield self._made("output_item.done", output_index=0, item=items[0])
        yield from _item_events(self._made, items, 1)
        yield self._made(_status(turn), response=self.responses.answer(self.values, turn))

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        return self._made(kind, item_id=f"msg_{self.turn.id}", output_index=0, content_index=0, **fields)


def _begun(made: _Events, values: dict[str, Any], turn: Turn | BegunTurn) -> Iterator[bytes]:
    begun = {
        **_head(values, turn),
        "status": "in_progress",
        "incomplete_details": None,
        "output": [],
        "usage": None,
    }
    yield made("created", response=begun)
    yield made("in_progress", response=begun)


def _item_events(made: _Events, items: Sequence[dict[str, Any]], first: int) -> Iterator[bytes]:
    """The items of an answer from that of this index on."""
    for index, item in list(enumerate(items))[first:]:
        yield made("output_item.added", output_index=index, item=_as_begun(item))
        for kind, fields in _growth(item):
            yield made(kind, item_id=item["id"], output_index=index, **fields)
        yield made("output_item.done", output_index=index, item=item)


def _with_types(values: dict[str, Any]) -> dict[str, Any]:
    """The request with the type of every item: that of a message may be left out."""
    items = values.get("input")
    if not isinstance(items, list):
        return values
    return {**values, "input": [{"type": "message", **item} if isinstance(item, dict) else item for item in items]}


def _conversation_before(response_id: str | None, session: Session) -> list[dict[str, Any]]:
    if response_id is None:
        return []
    turn = session.turn_of_id(response_id.removeprefix("resp_"))
    if turn is None or turn.kept_from is None:
        raise _not_found("previous_response_id", response_id)
    return turn.conversation()[turn.kept_from :]


def _not_found(field: str, name: str) -> RequestRefused:
    return RequestRefused(
        f"`{field}` is {name!r}, and nothing is kept under this name.",
        "Responses are kept for their own session, unless `store` was false.",
        "Send the items themselves, or do not set `store` to false.",
        status_code=400,
        field=field,
    )


def _said(items: Iterable[Item], session: Session) -> list[dict[str, Any]]:
    """Items as messages: what the model thought, said and called is one."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, FunctionCallOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
        elif isinstance(item, Message) and item.role != "assistant":
            messages.append({"role": item.role, "content": _content(item.content)})
        else:
            _add(messages, *_part(_referred(item, session) if isinstance(item, ItemReference) else item))
    for message in messages:
        message.setdefault("content", None if message.get("tool_calls") else "")
    return messages


def _referred(reference: ItemReference, session: Session) -> Said:
    _, _, name = reference.id.partition("_")
    turn = session.turn_of_id(name.partition("_")[0])
    items = _items(turn, {}) if turn is not None and turn.kept_from is not None else []
    found = next((item for item in items if item["id"] == reference.id), None)
    if found is None:
        raise _not_found("item_reference", reference.id)
    referred: Said = msgspec.convert(found, Said)  # type: ignore[call-overload]
    return referred


def _part(item: Said) -> tuple[str, Any]:
    """What an item adds to an assistant's message: its name there, and what it is."""
    if isinstance(item, Reasoning):
        return "reasoning", "".join(part.text for part in item.content or item.summary)
    if isinstance(item, Message):
        return "content", _content(item.content)
    function = {"name": _flat(item.namespace, item.name), "arguments": item.arguments}
    return "tool_calls", [{"id": item.call_id, "type": "function", "function": function}]


def _add(messages: list[dict[str, Any]], name: str, value: Any) -> None:
    """Add to the assistant's message at the end, or begin one where that has this or what comes behind it."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is not None and name == "tool_calls":
        last[name] = [*last.get(name, []), *value]
    elif last is not None and not any(part in last for part in PARTS[PARTS.index(name) :]):
        last[name] = value
    else:
        messages.append({"role": "assistant", name: value})


def _content(content: str | list[InputText] | list[InputText | OutputText]) -> str | list[dict[str, str]]:
    return content if isinstance(content, str) else content_of([part.text for part in content])


def _flat(namespace: str | None, name: str) -> str:
    """A tool's name where there are no namespaces, as the server's own route has it."""
    return name if namespace is None else f"{namespace}__{name}"


def _tools(tool: Tool | Namespace, namespace: str | None = None) -> Iterator[dict[str, Any]]:
    if isinstance(tool, Namespace):
        for inner in tool.tools:
            yield from _tools(inner, tool.name)
        return
    values = {name: getattr(tool, name) for name in ("description", "parameters", "strict")}
    said = {name: value for name, value in values.items() if value is not None}
    yield {"type": "function", "function": {"name": _flat(namespace, tool.name), **said}}


def _own_names(values: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Namespace and name of the tools of a request, by their flat names."""
    spaces = [tool for tool in values.get("tools") or [] if tool["type"] == "namespace"]
    return {
        _flat(space["name"], tool["name"]): {"namespace": space["name"], "name": tool["name"]}
        for space in spaces
        for tool in space["tools"]
    }


def _tool_choice(choice: str | ToolChoice | None) -> Any:
    return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, ToolChoice) else choice


def _response_format(asked: dict[str, Any] | None) -> dict[str, Any] | None:
    if asked is None or asked.get("type") != "json_schema":
        return asked
    schema = {name: asked[name] for name in ("name", "description", "schema", "strict") if name in asked}
    return {"type": "json_schema", "json_schema": schema}


def _head(values: dict[str, Any], turn: Turn | BegunTurn) -> dict[str, Any]:
    """What a response says of its request."""
    return {
        "id": f"resp_{turn.id}",
        "object": "response",
        "created_at": int(time.time()),
        "model": str(values.get("model") or ""),
        "error": None,
        "tools": values.get("tools") or [],
        "tool_choice": values.get("tool_choice") or "auto",
        "parallel_tool_calls": True,
        "text": values.get("text") or {"format": {"type": "text"}},
        "metadata": values.get("metadata") or {},
        "store": turn.kept_from is not None,
        "truncation": "disabled",
        **{
            name: values.get(name)
            for name in ("instructions", "previous_response_id", "max_output_tokens", "reasoning")
        },
    }


def _status(turn: Turn) -> str:
    return "incomplete" if turn.finish_reason == "length" else "completed"


def _items(turn: Turn, values: dict[str, Any]) -> list[dict[str, Any]]:
    """The answer to a request in items. There is a message where no tool is called, so that one comes back."""
    message = turn.message
    calls = message.get("tool_calls") or []
    items: list[dict[str, Any]] = []
    if message.get("reasoning"):
        thoughts = [{"type": "reasoning_text", "text": message["reasoning"]}]
        items.append({"id": f"rs_{turn.id}", "type": "reasoning", "summary": [], "content": thoughts})
    if message["content"] or not calls:
        said = {"type": "output_text", "text": message["content"] or "", **NO_EXTRAS}
        items.append({"id": f"msg_{turn.id}", "type": "message", "role": "assistant", "content": [said]})
    own_names = _own_names(values)
    for index, call in enumerate(calls):
        head = {"id": f"fc_{turn.id}_{index}", "type": "function_call", "call_id": call["id"]}
        items.append({**head, **call["function"], **own_names.get(call["function"]["name"], {})})
    return [{**item, "status": _status(turn)} for item in items]


def _as_begun(item: dict[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {"arguments": ""} if item["type"] == "function_call" else {"content": []}
    return {**item, **empty, "status": "in_progress"}


def _growth(item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kinds and fields of the events between the beginning of an item and its end."""
    if item["type"] == "function_call":
        yield "function_call_arguments.delta", {"delta": item["arguments"]}
        yield "function_call_arguments.done", {"arguments": item["arguments"], "name": item["name"]}
        return
    (part,) = item["content"]
    logprobs: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
    yield "content_part.added", {"content_index": 0, "part": {**part, "text": ""}}
    yield f"{part['type']}.delta", {"content_index": 0, "delta": part["text"], **logprobs}
    yield f"{part['type']}.done", {"content_index": 0, "text": part["text"], **logprobs}
    yield "content_part.done", {"content_index": 0, "part": part}
