"""The routes of vLLM for tokens, out of those of SGLang: what a gateway asks is the same in front of either.

render                         /v1/tokenize with messages
/inference/v1/generate         /generate with token ids
derender                       /v1/detokenize, /separate_reasoning, /parse_function_call
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..serving.generate_endpoint import NEUTRAL_SAMPLING_PARAMS
from .chat import REFUSED_FIX, refused


TOKENIZE = "/v1/tokenize"
DETOKENIZE = "/v1/detokenize"
GENERATE = "/generate"
SEPARATE_REASONING = "/separate_reasoning"
PARSE_FUNCTION_CALL = "/parse_function_call"
ROUTES = (TOKENIZE, DETOKENIZE, GENERATE, SEPARATE_REASONING, PARSE_FUNCTION_CALL)
"""What a server must have."""

RENDERED = ("tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", "documents", "add_generation_prompt")
"""What of a chat request its tokens depend on, besides the messages."""

PARAMETERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop")
"""Parameters of sampling that have the same name on both kinds of server."""

ALL_TOKENS = -1
"""SGLang's `top_k` for no limit, which is vLLM's 0."""

THOUGHTS_BEGIN = "<think>"
"""Written by a template that opens the thoughts by itself. Most parsers of SGLang look for it."""

NUM_LAST_TOKENS = 16
"""Of a prompt, in which that stands if it stands at its end, also where it is no token of its own."""

Ask = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Asks a route of the server with a body and returns its JSON."""


@dataclass(frozen=True)
class SGLangRoutes:
    """Answers requests for vLLM's routes.

    Args:
        tool_call_parser (`str`, *optional*):
            With which the server was started; without one tools are not parsed, as by its own chat completions.
        reasoning_parser (`str`, *optional*):
            As above.
    """

    tool_call_parser: str | None = None
    reasoning_parser: str | None = None

    async def render(self, ask: Ask, body: Mapping[str, Any]) -> dict[str, Any]:
        """Token ids and parameters of a chat request, as vLLM's `/v1/chat/completions/render`.

        Raises:
            RequestRefused: It asks for a grammar.
        """
        _refuse_grammars(body)
        rendered = {name: body[name] for name in RENDERED if body.get(name) is not None}
        answer = await ask(TOKENIZE, {**rendered, "messages": [_as_sglang(message) for message in body["messages"]]})
        parameters = {name: body[name] for name in (*NEUTRAL_SAMPLING_PARAMS, "stop") if body.get(name) is not None}
        limits = [body.get("max_completion_tokens"), body.get("max_tokens")]
        parameters["max_tokens"] = next((limit for limit in limits if limit is not None), None)
        return {"token_ids": answer["tokens"], "sampling_params": parameters}

    async def generate(self, ask: Ask, body: Mapping[str, Any]) -> dict[str, Any]:
        """A completion of token ids, as vLLM's `/inference/v1/generate`."""
        given = body["sampling_params"]
        parameters = {name: given[name] for name in PARAMETERS if given.get(name) is not None}
        parameters |= {
            "top_k": given["top_k"] or ALL_TOKENS,
            "max_new_tokens": given["max_tokens"],
            # vLLM's tokens go on to the end of a stop string, too.
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        answer = await ask(
            GENERATE, {"input_ids": body["token_ids"], "sampling_params": parameters, "return_logprob": True}
        )
        info = answer["meta_info"]
        # Of each token: logprob, id, text.
        sampled = info["output_token_logprobs"]
        matched = info["finish_reason"].get("matched")
        choice = {
            "index": 0,
            "token_ids": [token for _, token, *_ in sampled],
            "logprobs": {"content": [{"logprob": logprob} for logprob, *_ in sampled]},
            "finish_reason": info["finish_reason"]["type"],
            "stop_reason": matched if isinstance(matched, str) else None,
            "weight_versions": info.get("weight_versions"),
        }
        return {"choices": [choice]}

    async def derender(self, ask: Ask, body: Mapping[str, Any]) -> dict[str, Any]:
        """The message that sampled tokens are, as vLLM's `/v1/chat/completions/derender`."""
        (choice,) = body["generate_response"]["choices"]
        request = body["chat_request"]
        tools = request.get("tools") if request.get("tool_choice") != "none" else None
        # As SGLang's own chat completions: a parser of tools may look for special tokens.
        text = await self._text(ask, choice["token_ids"], skip_special_tokens=not tools)
        message: dict[str, Any] = {"role": "assistant"}
        if self.reasoning_parser is not None:
            prompt_ids = body["generate_response"]["prompt_token_ids"][-NUM_LAST_TOKENS:]
            prompt = await self._text(ask, prompt_ids, skip_special_tokens=False)
            begun = THOUGHTS_BEGIN if prompt.rstrip().endswith(THOUGHTS_BEGIN) else ""
            separated = await ask(
                SEPARATE_REASONING, {"text": begun + text, "reasoning_parser": self.reasoning_parser}
            )
            text = separated["text"] or ""
            if separated["reasoning_text"]:
                message["reasoning"] = separated["reasoning_text"]
        if tools and self.tool_call_parser is not None:
            asked = {"text": text, "tools": tools, "tool_call_parser": self.tool_call_parser}
            parsed = await ask(PARSE_FUNCTION_CALL, asked)
            text = parsed["normal_text"]
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call["name"], "arguments": call["parameters"]}}
                for call in parsed["calls"]
            ]
        return {"choices": [{"index": 0, "message": {**message, "content": text}}]}

    async def derender_text(self, ask: Ask, body: Mapping[str, Any]) -> dict[str, Any]:
        """The text of sampled tokens, without special ones, as vLLM's `/v1/completions/derender`."""
        (response,) = body["generate_responses"]
        (choice,) = response["choices"]
        return {
            "choices": [{"index": 0, "text": await self._text(ask, choice["token_ids"], skip_special_tokens=True)}]
        }

    async def detokenize(self, ask: Ask, body: Mapping[str, Any]) -> dict[str, Any]:
        """The text of tokens, as vLLM's `/detokenize`."""
        return {"prompt": await self._text(ask, body["tokens"], skip_special_tokens=False)}

    async def _text(self, ask: Ask, ids: list[int], *, skip_special_tokens: bool) -> str:
        answer = await ask(DETOKENIZE, {"tokens": ids, "skip_special_tokens": skip_special_tokens})
        return str(answer["text"])


def _as_sglang(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the thoughts of a turn under SGLang's name for them."""
    renamed = dict(message)
    if "reasoning" in renamed:
        renamed["reasoning_content"] = renamed.pop("reasoning")
    return renamed


def _refuse_grammars(body: Mapping[str, Any]) -> None:
    choice = body.get("tool_choice")
    asked = [
        *(["response_format"] if body.get("response_format") else []),
        *(["tool_choice"] if choice not in (None, "auto", "none") else []),
    ]
    if asked:
        raise refused(
            f"The request has `{asked[0]}` {json.dumps(body[asked[0]])[:80]}, and the server behind this gateway is SGLang.",
            "It would be sampled under a grammar, which the gateway asks of vLLM alone.",
            f"{REFUSED_FIX} --grammar lift samples such turns without a grammar.",
        )
