"""OpenAI chat completions: which request becomes plain sampling and which cannot, and the forms of an answer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..api.refusals import RequestRefused
from ..serving.generate_endpoint import NEUTRAL_SAMPLING_PARAMS


NEUTRAL = {name: value for name, value in NEUTRAL_SAMPLING_PARAMS.items() if name not in ("n", "max_tokens")}
"""What every request is sampled with, whatever it asks for, but for the temperature, which is an option."""

PASSED = frozenset(
    {
        *("messages", "tools", "tool_choice", "max_tokens", "max_completion_tokens", "stop"),
        *("response_format", "chat_template_kwargs", "reasoning_effort", "include_reasoning", "documents"),
    }
)
"""What reaches the server. Everything else is dropped and counted by name: it cannot change what is sampled."""

HANDLED = frozenset({"model", "stream", "stream_options", "n"})
"""What the gateway itself answers to."""

NO_OPTIONS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""What says nothing of the answer; it is dropped and not counted."""

REFUSED = {
    "logit_bias": "It makes tokens likelier or rarer than the policy says.",
    "bad_words": "It forbids tokens that the policy may sample.",
    "allowed_token_ids": "It forbids tokens that the policy may sample.",
    "min_tokens": "It forbids the end of the answer, which the policy may sample.",
    "structured_outputs": "A grammar forbids tokens that the policy may sample.",
    "guided_json": "A grammar forbids tokens that the policy may sample.",
    "guided_regex": "A grammar forbids tokens that the policy may sample.",
    "guided_choice": "A grammar forbids tokens that the policy may sample.",
    "guided_grammar": "A grammar forbids tokens that the policy may sample.",
    "stop_token_ids": "It ends an answer in the middle of what a turn of the conversation is; `stop` takes texts.",
    "thinking_token_budget": "It forces the end of the thoughts.",
    "use_beam_search": "A beam search does not sample.",
    "ignore_eos": "It goes on behind the end of the answer, where no turn of a conversation goes on.",
    "prediction": "It puts text into the answer that the policy did not sample.",
    "truncate_prompt_tokens": "The prompt would not be what the agent sent.",
    "continue_final_message": "It begins the answer with text that the policy did not sample.",
    "chat_template": "A conversation that is rendered by two templates is no sequence.",
    "functions": "They are the old form of tools.",
    "function_call": "It is the old form of `tool_choice`.",
}
"""Fields that are refused where they say anything, and why."""

REFUSED_FIX = "Leave it out of the agent's model settings."


@dataclass(frozen=True)
class ChatRequest:
    """A request of an agent, checked.

    Args:
        model (`str`):
            As the agent names it, for the answer.
        body (`dict`):
            What is sent to the server, without the model's name.
        is_streamed (`bool`):
            Whether the agent reads the answer as a stream.
        streams_usage (`bool`):
            Whether the stream ends with the number of tokens.
        changed (`tuple[str, ...]`):
            Names of what the agent asked for and does not get.
    """

    model: str
    body: dict[str, Any]
    is_streamed: bool
    streams_usage: bool
    changed: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation."""
        messages: list[dict[str, Any]] = self.body["messages"]
        return messages


def read_chat_request(values: Any, temperature: float, lifts_grammars: bool = False) -> ChatRequest:
    """Check a request and make its sampling plain.

    `values` is the parsed JSON; `temperature` that of the policy. With `lifts_grammars` a tool that must be called is one
    that may be called, and a format is not enforced.

    Raises:
        RequestRefused: It is no chat request, or asks for what cannot be trained.
    """
    if not isinstance(values, dict):
        raise _refused(
            f"The body is a {type(values).__name__}.", "It is a JSON object.", "Send what the OpenAI SDK sends."
        )
    _check_messages(values.get("messages"))
    for name, why in REFUSED.items():
        if values.get(name):
            raise _refused(f"The request has `{name}`.", why, REFUSED_FIX)
    if values.get("n") not in (None, 1):
        raise _refused(
            f"The request asks for n={values['n']!r} answers.",
            "A conversation goes on with one of them, and which one is not known.",
            "Set n to 1 and send the request several times.",
        )
    body = {name: value for name, value in values.items() if name in PASSED and value is not None}
    changed = [
        name
        for name, value in values.items()
        if value is not None and name not in PASSED | HANDLED | NO_OPTIONS | NEUTRAL.keys() | REFUSED.keys()
    ]
    neutral = {**NEUTRAL, "temperature": temperature}
    changed += [name for name, value in neutral.items() if values.get(name) not in (None, value)]
    if body.get("response_format", {}).get("type", "text") == "text":
        body.pop("response_format", None)
    changed += _plain_tools(body)
    if lifts_grammars:
        changed += _lift_grammars(body)
    options = values.get("stream_options")
    return ChatRequest(
        model=str(values.get("model") or ""),
        body={**body, **neutral},
        is_streamed=bool(values.get("stream")),
        streams_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        changed=tuple(sorted(set(changed))),
    )


def _plain_tools(body: dict[str, Any]) -> list[str]:
    """Take out of `tools` what would switch a grammar on; return the names of what was taken out."""
    tools = body.get("tools")
    if not tools:
        # vLLM refuses an empty list, and a choice without tools.
        body.pop("tools", None)
        body.pop("tool_choice", None)
        return []
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in tools
    ):
        raise _refused(
            "`tools` has an entry without a function.",
            "Tools of a provider run there, and not here.",
            'Send tools of the form {"type": "function", "function": {...}}.',
        )
    is_strict = any(tool["function"].get("strict") for tool in tools)
    body["tools"] = [
        {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}
        for tool in tools
    ]
    return ["tools.strict"] if is_strict else []


def _lift_grammars(body: dict[str, Any]) -> list[str]:
    """Leave to the policy whether it calls a tool and in which form it answers; return the names of what was changed."""
    changed = ["response_format"] if body.pop("response_format", None) else []
    if body.get("tool_choice") not in (None, "auto", "none"):
        body["tool_choice"] = "auto"
        changed.append("tool_choice")
    return changed


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise _refused(
            "`messages` is no list of messages.", "It is the conversation.", "Send at least one message of a user."
        )
    for index, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in ("text", "refusal"):
                raise _refused(
                    f"Message {index} has a part of type {kind!r}.",
                    "Only text is trained: without its images the rollout has other probabilities.",
                    "Give the agent text alone.",
                )


def _refused(what: str, why: str, fix: str) -> RequestRefused:
    return RequestRefused(what, why, fix, status_code=400)


def completion(request: ChatRequest, answer_id: str, answer: ChatAnswer) -> dict[str, Any]:
    """The answer to a request that is not streamed."""
    choice = {"index": 0, "message": answer.message, "finish_reason": answer.finish_reason, "logprobs": None}
    head = {"id": answer_id, "object": "chat.completion", "created": int(time.time()), "model": request.model}
    return {**head, "choices": [choice], "usage": answer.usage}


def stream_events(request: ChatRequest, answer_id: str, answer: ChatAnswer) -> Iterator[bytes]:
    """The same answer as server-sent events: the message, its end, the usage if it was asked for."""
    head = {"id": answer_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": request.model}
    delta = dict(answer.message)
    if delta.get("tool_calls"):
        delta["tool_calls"] = [{**call, "index": index} for index, call in enumerate(delta["tool_calls"])]
    for part, finish_reason in ((delta, None), ({}, answer.finish_reason)):
        choice = {"index": 0, "delta": part, "finish_reason": finish_reason, "logprobs": None}
        yield event({**head, "choices": [choice]})
    if request.streams_usage:
        yield event({**head, "choices": [], "usage": answer.usage})
    yield b"data: [DONE]\n\n"


def event(values: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(values, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True)
class ChatAnswer:
    """What a client is told of a turn.

    Args:
        message (`dict`):
            The assistant's message.
        finish_reason (`str`):
            `"stop"`, `"length"` or `"tool_calls"`.
        num_prompt_tokens (`int`):
            Tokens that were sampled from.
        num_sampled_tokens (`int`):
            Tokens that were sampled.
    """

    message: dict[str, Any]
    finish_reason: str
    num_prompt_tokens: int
    num_sampled_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """In OpenAI's form."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_sampled_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_sampled_tokens,
        }


def shown_message(message: dict[str, Any], stop_string: str | None, new_id: str) -> dict[str, Any]:
    """The assistant's message for the client, made from what the server's parsers read out of the tokens.

    Text ends before the stop string that ended the sampling, as OpenAI's does; the parsers see tokens, which go on to its
    end. Tool calls get ids that no other turn has.
    """
    content = message.get("content")
    if stop_string and isinstance(content, str) and stop_string in content:
        content = content[: content.index(stop_string)]
    shown: dict[str, Any] = {"role": "assistant", "content": content}
    if message.get("reasoning"):
        shown["reasoning"] = message["reasoning"]
    calls = message.get("tool_calls") or []
    if calls:
        shown["content"] = content or None
        shown["tool_calls"] = [
            {"id": f"call_{new_id}_{index}", "type": "function", "function": dict(call["function"])}
            for index, call in enumerate(calls)
        ]
    return shown
