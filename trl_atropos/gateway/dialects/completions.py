"""OpenAI chat completions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ...api.refusals import RequestRefused
from ..chat import Translation
from ..sessions import Session
from ..streams import BegunTurn
from ..turns import Turn
from .base import event, openai_error


DONE = b"data: [DONE]\n\n"


class ChatCompletions:
    """See [`Dialect`]. The other dialects are translated into this one."""

    path = "/v1/chat/completions"
    keep_alive = b": the answer is being sampled\n\n"

    def read(self, values: dict[str, Any], session: Session) -> Translation:
        """Take a request as it is."""
        return Translation(values)

    def answer(self, values: dict[str, Any], turn: Turn) -> dict[str, Any]:
        """A completion with one choice."""
        choice = {"index": 0, "message": turn.message, "finish_reason": turn.finish_reason, "logprobs": None}
        return {**_head(values, turn, "chat.completion"), "choices": [choice], "usage": _usage(turn)}

    def events(self, values: dict[str, Any], turn: Turn) -> Iterator[bytes]:
        """The message, its end, the usage if it was asked for."""
        head = _head(values, turn, "chat.completion.chunk")
        yield _chunk(head, {**turn.message, **_calls(turn)})
        yield from _end(head, values, turn)

    def live(self, values: dict[str, Any], turn: BegunTurn) -> _LiveChunks:
        """A chunk with the role, chunks of text, and the end as in `events`."""
        return _LiveChunks(values, turn)

    def error(self, exc: RequestRefused) -> dict[str, Any]:
        """OpenAI's form."""
        return openai_error(exc)

    def error_events(self, exc: RequestRefused) -> Iterator[bytes]:
        """The error in the place of a chunk."""
        yield event(openai_error(exc))
        yield DONE


class _LiveChunks:
    """See [`LiveAnswer`]."""

    def __init__(self, values: dict[str, Any], turn: BegunTurn):
        self.values = values
        self._head = _head(values, turn, "chat.completion.chunk")

    def begin(self) -> Iterator[bytes]:
        yield _chunk(self._head, {"role": "assistant", "content": ""})

    def text(self, text: str) -> bytes:
        return _chunk(self._head, {"content": text})

    def end(self, turn: Turn) -> Iterator[bytes]:
        calls = _calls(turn)
        if calls:
            yield _chunk(self._head, calls)
        yield from _end(self._head, self.values, turn)


def _calls(turn: Turn) -> dict[str, Any]:
    """The calls of an answer as a part of a delta; empty where there are none."""
    calls = [{**call, "index": index} for index, call in enumerate(turn.message.get("tool_calls") or [])]
    return {"tool_calls": calls} if calls else {}


def _chunk(head: dict[str, Any], delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
    return event({**head, "choices": [choice]})


def _end(head: dict[str, Any], values: dict[str, Any], turn: Turn) -> Iterator[bytes]:
    yield _chunk(head, {}, turn.finish_reason)
    options = values.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        yield event({**head, "choices": [], "usage": _usage(turn)})
    yield DONE


def _head(values: dict[str, Any], turn: Turn | BegunTurn, kind: str) -> dict[str, Any]:
    model = str(values.get("model") or "")
    return {"id": f"chatcmpl-{turn.id}", "object": kind, "created": int(time.time()), "model": model}


def _usage(turn: Turn) -> dict[str, int]:
    num_prompt, num_sampled = turn.num_prompt_tokens, len(turn.sampled)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_sampled,
        "total_tokens": num_prompt + num_sampled,
    }
