"""The chat request that a request of any dialect becomes: which is plain sampling, which cannot be, and what is told of the
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
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

HANDLED = frozenset({"model", "stream", "stream_options", "n", "parallel_tool_calls"})
"""What the gateway itself answers to."""

NO_OPTIONS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "cache_control", "inference_geo", "speed"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "diagnostics", "user_profile_id"),
        "client_metadata",
    }
)
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
    "background": "An answer is recorded when its client is there.",
    "conversation": "Conversations are kept for `previous_response_id` alone.",
    "prompt": "A prompt that a provider keeps is not here.",
    "container": "Tools of a provider run there, and not here.",
    "mcp_servers": "Tools of a provider run there, and not here.",
}
"""Fields that are refused where they say anything, and why."""

REFUSED_FIX = "Leave it out of the agent's model settings."


@dataclass(frozen=True)
class Translation:
    """A request as its dialect says it in the words of chat completions, not checked yet.

    Args:
        values (`dict`):
            What a client of chat completions would send for it. What is not the dialect's own stands in it as it came.
        changed (`Sequence[str]`, *optional*):
            Names of what the agent asked for, and what chat completions cannot say.
        kept_from (`int`, *optional*):
            Index of the first message that another request takes over that names this answer as the one before; None if
            none may.
    """

    values: dict[str, Any]
    changed: Sequence[str] = ()
    kept_from: int | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A request of an agent, checked.

    Args:
        body (`dict`):
            What is sent to the server, without the model's name.
        changed (`tuple[str, ...]`):
            Names of what the agent asked for and does not get.
        kept_from (`int`, *optional*):
            As in [`Translation`].
    """

    body: dict[str, Any]
    changed: tuple[str, ...]
    kept_from: int | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation."""
        messages: list[dict[str, Any]] = self.body["messages"]
        return messages


def read_chat_request(translation: Translation, temperature: float, lifts_grammars: bool = False) -> ChatRequest:
    """Check a request and make its sampling plain.

    `temperature` is that of the policy. With `lifts_grammars` a tool that must be called is one that may be called, and a
    format is not enforced.

    Raises:
        RequestRefused: It is no chat request, or asks for what cannot be trained.
    """
    values = translation.values
    _check_messages(values.get("messages"))
    for name, why in REFUSED.items():
        if values.get(name):
            raise refused(f"The request has `{name}`.", why, REFUSED_FIX)
    if values.get("n") not in (None, 1):
        raise refused(
            f"The request asks for n={values['n']!r} answers.",
            "A conversation goes on with one of them, and which one is not known.",
            "Set n to 1 and send the request several times.",
        )
    body = {name: value for name, value in values.items() if name in PASSED and value is not None}
    changed = [*translation.changed, *(name for name, value in values.items() if _is_dropped(name, value))]
    neutral = {**NEUTRAL, "temperature": temperature}
    changed += [name for name, value in neutral.items() if values.get(name) not in (None, value)]
    if values.get("parallel_tool_calls") is False:
        changed.append("parallel_tool_calls")
    if body.get("response_format") == {"type": "text"}:
        del body["response_format"]
    changed += _plain_tools(body)
    if lifts_grammars:
        changed += _lift_grammars(body)
    return ChatRequest({**body, **neutral}, tuple(sorted(set(changed))), translation.kept_from)


def _is_dropped(name: str, value: Any) -> bool:
    """Whether a field asks for something that nothing here answers to."""
    return value is not None and name not in PASSED | HANDLED | NO_OPTIONS | NEUTRAL.keys() | REFUSED.keys()


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
        raise refused(
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
        raise refused(
            "`messages` is no list of messages.", "It is the conversation.", "Send at least one message of a user."
        )
    for index, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in ("text", "refusal"):
                raise refused(
                    f"Message {index} has a part of type {kind!r}.",
                    "Only text is trained: without its images the rollout has other probabilities.",
                    "Give the agent text alone.",
                )


def refused(what: str, why: str, fix: str) -> RequestRefused:
    """What an agent is told that asks for what it cannot get (400)."""
    return RequestRefused(what, why, fix, status_code=400)


def shown_message(message: dict[str, Any], stop_string: str | None, turn_id: str) -> dict[str, Any]:
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
            {"id": f"call_{turn_id}_{index}", "type": "function", "function": dict(call["function"])}
            for index, call in enumerate(calls)
        ]
    return shown
