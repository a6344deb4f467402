"""One turn: the server renders, the sampled tokens of before are put in, the server samples, the server parses.

    chat request -> render -> continue -> generate -> derender -> answer

Every id comes from the server, which has template, tokenizer and parsers; what is added here is the choice of what a
request continues.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from array import array
from typing import Any

from ..api.refusals import RequestRefused
from ..network import POLICY_VERSION_HEADER
from ..serving.generate_endpoint import FINAL_ONLY, NEUTRAL_SAMPLING_PARAMS, distribution_changes
from ..wire.rollout_key import oldest_version
from .chat import REFUSED_FIX, ChatRequest, refused, shown_message
from .counts import GatewayCounts
from .options import MASK, TEMPLATE, GatewayOptions
from .servers import (
    DERENDER,
    DERENDER_TEXT,
    DETOKENIZE,
    GENERATE,
    RENDER,
    Affinity,
    InferenceServers,
    ServerAnswer,
    ServerRefused,
    broken_off,
)
from .sessions import Session
from .streams import BegunTurn, LiveReply
from .turns import (
    LOGPROB,
    TOKEN,
    Prompt,
    Turn,
    continued,
    digest_of,
    echoes,
    end_of_reply,
    new_id,
    says,
    turns_asking_a_prefix,
)


logger = logging.getLogger(__name__)

GRAMMAR = "grammar"
"""Why a turn is masked that was sampled under a grammar: its logprobs are those of another distribution."""

ABORT_PAUSE_S = 0.2
"""Between an answer that a weight update cut off and the same request again."""


class Recorder:
    """Answers requests of agents and records what was sampled.

    Args:
        servers ([`InferenceServers`]):
            Where it is sampled.
        options ([`GatewayOptions`]):
            How.
        counts ([`GatewayCounts`]):
            What is counted.
    """

    def __init__(self, servers: InferenceServers, options: GatewayOptions, counts: GatewayCounts):
        self.servers = servers
        self.options = options
        self.counts = counts
        self.max_rollout_tokens = options.max_rollout_tokens
        """Tokens of a conversation, prompt and answers. An environment lowers it to what its trainer takes."""
        self._end_tokens: dict[int, str] = {}
        self._closing: list[int] = []
        self._num_generation_tokens: dict[str, int | None] = {}
        self._shows_special: bool | None = None
        self.may_pass_on = True
        """Whether text is passed on as it is sampled: until it was once not that of the message."""
        self.may_pass_on_beside_calls = True
        """The same of the text in front of calls of tools: a parser may put it elsewhere than into the message."""

    async def answer(
        self, session: Session, request: ChatRequest, request_digest: bytes, live: LiveReply | None = None
    ) -> Turn:
        """Sample the answer to a request and record it, unless the session ended meanwhile.

        `live` gets its text as it is sampled, where that is the text of the message whatever comes behind it: where the server
        has no parser that could find thoughts in it, and in front of everything that may be a call of a tool.

        Raises:
            RequestRefused: The request asks for what cannot be trained or does not fit, no server answers it, or one broke off
                in an answer of which `live` has shown something.
        """
        rendered_answer = await self.servers.post(session.affinity, RENDER, self._fitting(request.body))
        rendered = array(TOKEN, rendered_answer.values["token_ids"])
        why_masked = self._why_masked(rendered_answer.values)
        num_generation_tokens = await self._find_num_generation_tokens(session.affinity, request, rendered)
        prompt = await self._continue(session, request, rendered)
        ids = _sequence(prompt)
        turn_id = new_id()
        body = self._body(rendered_answer.values, ids)
        if live is not None and await self._is_text_final(session.affinity, request, rendered_answer.values):
            live.may_have_calls = bool(request.body.get("tools"))
            live.turn = BegunTurn(turn_id, len(ids), request.kept_from)
            generated = await self._generate_live(session.affinity, body, live)
        else:
            generated = await self._generate(session.affinity, body)
        choice = generated.values["choices"][0]
        sampled = array(TOKEN, choice["token_ids"])
        stop_string = choice.get("stop_reason") if isinstance(choice.get("stop_reason"), str) else None
        is_complete = choice["finish_reason"] == "stop" and stop_string is None
        end_token = sampled[-1] if is_complete else None
        if end_token is not None:
            await self._learn_end_token(session.affinity, end_token)
        message = await self._parse(session.affinity, request, ids, sampled, end_token, stop_string, turn_id)
        if live is not None and live.is_shown:
            message = self._as_shown(message, live)
        finish_reason = choice["finish_reason"]
        num_closed = len(rendered) - (num_generation_tokens or 0)
        turn = Turn(
            parent=prompt.parent,
            added=prompt.added,
            sampled=sampled,
            logprobs=_logprobs(choice, len(sampled)),
            policy_version=_policy_version(generated, choice),
            message=message,
            finish_reason="tool_calls" if finish_reason == "stop" and message.get("tool_calls") else finish_reason,
            messages=request.messages,
            num_messages=len(request.messages),
            num_closed=num_closed,
            closed_digest=digest_of(rendered[:num_closed]),
            request_digest=request_digest,
            end_token=end_token,
            is_open=num_generation_tokens is not None and stop_string is None,
            why_masked=why_masked,
            stop_string=stop_string,
            kept_from=request.kept_from,
            id=turn_id,
        )
        if session.is_open:
            session.add(turn)
            self.counts.note_turn(prompt.parent is not None, prompt.is_rewritten)
            self.counts.changed.update(request.changed)
        return turn

    async def num_prompt_tokens(self, session: Session, request: ChatRequest) -> int:
        """Tokens that a request would be sampled from.

        Raises:
            RequestRefused: It does not fit, or no server answers.
        """
        rendered = await self._rendered(session.affinity, self._fitting(request.body))
        return len(_sequence(await self._continue(session, request, array(TOKEN, rendered))))

    def _fitting(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request that asks for no more tokens than the servers take at all: agents ask for what the models take that they
        were written for.
        """
        limits = {
            name: body[name] for name in ("max_tokens", "max_completion_tokens") if isinstance(body.get(name), int)
        }
        return {**body, **{name: min(limit, self.servers.max_model_len) for name, limit in limits.items()}}

    def _why_masked(self, rendered: dict[str, Any]) -> str:
        """Why what is sampled with these parameters is not trained; empty where it is."""
        if rendered.get("features"):
            raise refused(
                "The server found images in the request.", "Only text is trained.", "Give the agent text alone."
            )
        changes = distribution_changes(rendered["sampling_params"])
        if not changes:
            return ""
        if changes == ("structured_outputs",) and self.options.grammar == MASK:
            return GRAMMAR
        raise refused(
            f"The server would sample with {', '.join(changes)}.",
            "Tokens that a grammar or a list forbids have another probability than the policy gives them.",
            f"{REFUSED_FIX} A grammar comes from a tool that must be called or a schema of the answer; --grammar mask samples such "
            "turns without training them, and --grammar lift samples them without it.",
        )

    async def _continue(self, session: Session, request: ChatRequest, rendered: array[int]) -> Prompt:
        """What to sample from: the sequence of the longest turn that the request goes on with, and what comes behind it."""
        candidates = turns_asking_a_prefix(session.turns, rendered, len(request.messages))
        for turn in candidates:
            if not turn.is_open or not echoes(request.messages, turn) or says(turn.message, self._end_tokens.values()):
                continue
            end = end_of_reply(turn, rendered, self._end_tokens, self._closing)
            if end is None or not await self._shows_thoughts(session.affinity, turn, rendered[turn.num_closed : end]):
                continue
            is_rewritten = turn.num_closed < candidates[0].num_closed or bool(turn.children)
            return Prompt(turn, continued(turn, rendered, end), is_rewritten)
        return Prompt(None, rendered, bool(candidates))

    async def _shows_thoughts(self, affinity: Affinity, turn: Turn, reply: array[int]) -> bool:
        """Whether the template still writes the thoughts of a turn, or they are kept anyway."""
        thoughts = (turn.message.get("reasoning") or "").strip()
        if not thoughts or self.options.thinking != TEMPLATE:
            return True
        return thoughts in await self._text_of(affinity, reply.tolist())

    def _body(self, rendered: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        """The request for what comes behind these ids, with the parameters that the server made of the chat request."""
        # A server leaves out what is the default of its sampling parameters: also the limit of an agent that asks for 16 tokens.
        parameters = {**NEUTRAL_SAMPLING_PARAMS, **rendered["sampling_params"]}
        parameters |= {
            "logprobs": 0,
            "output_kind": FINAL_ONLY,
            "max_tokens": self._num_free_tokens(parameters["max_tokens"], len(ids)),
        }
        of_reasoning = {
            name: rendered[name]
            for name in ("reasoning_ended", "reasoning_parser_kwargs")
            if rendered.get(name) is not None
        }
        return {"token_ids": ids, "sampling_params": parameters, "stream": False, **of_reasoning}

    def _num_free_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        """Tokens that may be sampled: what was asked for, or what the context has left."""
        limit = min(self.servers.max_model_len, self.max_rollout_tokens)
        free = limit - num_prompt_tokens
        if free < 1:
            raise refused(
                f"The conversation has {num_prompt_tokens} tokens, and this model's maximum context length is "
                f"{limit} tokens.",
                "Prompt and answers together count.",
                "Shorten the conversation, or raise --max_model_len of the servers and --max_rollout_tokens of the gateway.",
            )
        return free if asked is None else min(asked, free)

    async def _generate(self, affinity: Affinity, body: dict[str, Any]) -> ServerAnswer:
        """Sample; what a weight update cut off is sampled anew."""
        while True:
            generated = await self.servers.post(affinity, GENERATE, body)
            if generated.values["choices"][0]["finish_reason"] != "abort":
                return generated
            self.servers.num_resent += 1
            await asyncio.sleep(ABORT_PAUSE_S)

    async def _generate_live(self, affinity: Affinity, body: dict[str, Any], live: LiveReply) -> ServerAnswer:
        """As `_generate`, with the text as it comes. What a weight update cuts off then cannot be sampled anew.

        Raises:
            RequestRefused: It was cut off.
        """
        # By what the message is read out of in the end: with special tokens where a parser looks for them.
        parameters = {**body["sampling_params"], "skip_special_tokens": not self._shows_special}
        asked = {**body, "sampling_params": parameters, "stream": True, "output_mode": "text"}
        while True:
            generated = await self.servers.post_for_parts(affinity, GENERATE, asked, live)
            if generated.values["choices"][0]["finish_reason"] != "abort":
                return generated
            if live.is_shown:
                raise broken_off(generated.server)
            self.servers.num_resent += 1
            await asyncio.sleep(ABORT_PAUSE_S)

    async def _is_text_final(self, affinity: Affinity, request: ChatRequest, rendered: dict[str, Any]) -> bool:
        """Whether the text of an answer, or what is in front of its calls, stays what it is when the rest has come."""
        may_pass_on = self.may_pass_on_beside_calls if request.body.get("tools") else self.may_pass_on
        # The server names options for its reasoning parser if it has one. Some read thoughts from the first token on, without a mark.
        if not may_pass_on or rendered.get("reasoning_parser_kwargs") is not None:
            return False
        if self._shows_special is None and self._end_tokens:
            self._shows_special = await self._does_parser_show(affinity, next(iter(self._end_tokens)))
        return self._shows_special is not None

    async def _does_parser_show(self, affinity: Affinity, special: int) -> bool:
        """Whether a special token is a part of messages: a server without any parser leaves it out."""
        request = ChatRequest({"messages": [{"role": "user", "content": "x"}]}, ())
        message = await self._parse(affinity, request, [], array(TOKEN, [special]), None, None, "")
        return bool(message["content"])

    def _as_shown(self, message: dict[str, Any], live: LiveReply) -> dict[str, Any]:
        """The message of an answer whose text was passed on: what its client will send back."""
        of_calls = {"tool_calls"} if live.may_have_calls else set()
        if message.keys() <= {"role", "content", *of_calls} and (message["content"] or "").startswith(live.shown):
            return message
        logger.warning(
            "event=stream_differs text=%r message=%r: answers %sare sent whole from here on",
            *(live.shown[-100:], message, "to requests with tools " if live.may_have_calls else ""),
        )
        if live.may_have_calls:
            self.may_pass_on_beside_calls = False
        else:
            self.may_pass_on = False
        calls = message.get("tool_calls") if live.may_have_calls else None
        if calls:
            return {"role": "assistant", "content": live.shown, "tool_calls": calls}
        return {"role": "assistant", "content": live.text}

    async def _parse(
        self,
        affinity: Affinity,
        request: ChatRequest,
        ids: list[int],
        sampled: array[int],
        end_token: int | None,
        stop_string: str | None,
        turn_id: str,
    ) -> dict[str, Any]:
        """The message that the server's parsers read out of the sampled tokens, without the one that ended them."""
        shown = sampled.tolist() if end_token is None else sampled[:-1].tolist()
        if not shown:
            return shown_message({"content": ""}, None, turn_id)
        choice = {"index": 0, "finish_reason": "stop", "token_ids": shown}
        response = {"request_id": turn_id, "choices": [choice], "prompt_token_ids": ids}
        body = {"stream": False, "generate_response": response, "chat_request": request.body}
        parsed = await self.servers.post(affinity, DERENDER, body)
        return shown_message(parsed.values["choices"][0]["message"], stop_string, turn_id)

    async def _find_num_generation_tokens(
        self, affinity: Affinity, request: ChatRequest, rendered: array[int]
    ) -> int | None:
        """How many tokens the template writes behind the last message so that the model answers; None if that cannot be
        told. It depends on the options of the template alone, so it is asked for once for each of them.
        """
        names = ("chat_template_kwargs", "reasoning_effort")
        options = {name: request.body[name] for name in names if name in request.body}
        key = json.dumps(options, sort_keys=True)
        if key not in self._num_generation_tokens:
            if not self._num_generation_tokens:
                await self._find_end_token(affinity)
            self._num_generation_tokens[key] = await self._probe_generation_prompt(affinity, options)
        found = self._num_generation_tokens[key]
        return found if found is not None and found <= len(rendered) else None

    async def _probe_generation_prompt(self, affinity: Affinity, options: dict[str, Any]) -> int | None:
        body = {**options, "messages": [{"role": "user", "content": "x"}]}
        try:
            whole = await self._rendered(affinity, body)
            bare = await self._rendered(affinity, {**body, "add_generation_prompt": False})
        except ServerRefused as exc:
            if exc.status_code >= 500:
                raise
            # Some templates refuse short conversations. Then nothing is continued, and every turn begins anew.
            return None
        # Some templates write an end of the whole text in its place.
        return len(whole) - _num_common(whole, bare)

    async def _find_end_token(self, affinity: Affinity) -> None:
        """Find what the template writes behind a reply, by two that differ: where it is a special token, no text has it."""
        question = {"role": "user", "content": "x"}
        bodies = [
            {"messages": [question, {"role": "assistant", "content": content}], "add_generation_prompt": False}
            for content in ("a", "b")
        ]
        try:
            first, second = [await self._rendered(affinity, body) for body in bodies]
            num_equal = next((i for i, (a, b) in enumerate(zip(first[::-1], second[::-1], strict=False)) if a != b), 0)
            if num_equal and await self._is_special(affinity, first[-num_equal]):
                self._closing = first[-num_equal:]
                await self._learn_end_token(affinity, self._closing[0])
        except ServerRefused as exc:
            if exc.status_code >= 500:
                raise
            # Then it is learned from the first turn that ends by itself.

    async def _is_special(self, affinity: Affinity, token: int) -> bool:
        choice = {"index": 0, "finish_reason": "stop", "token_ids": [token]}
        body = {"stream": False, "generate_responses": [{"choices": [choice]}]}
        # Special tokens are left out of the text of a completion.
        answer = await self.servers.post(affinity, DERENDER_TEXT, body)
        return not answer.values["choices"][0]["text"]

    async def _learn_end_token(self, affinity: Affinity, token: int) -> None:
        if token not in self._end_tokens:
            self._end_tokens[token] = await self._text_of(affinity, [token])

    async def _rendered(self, affinity: Affinity, body: dict[str, Any]) -> list[int]:
        answer = await self.servers.post(affinity, RENDER, body)
        ids: list[int] = answer.values["token_ids"]
        return ids

    async def _text_of(self, affinity: Affinity, ids: list[int]) -> str:
        answer = await self.servers.post(affinity, DETOKENIZE, {"tokens": ids})
        return str(answer.values["prompt"])


def _num_common(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def _sequence(prompt: Prompt) -> list[int]:
    before = prompt.parent.token_ids().tolist() if prompt.parent is not None else []
    return [*before, *prompt.added]


def _logprobs(choice: dict[str, Any], num_sampled: int) -> array[float]:
    values = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    if len(values) != num_sampled or not all(map(math.isfinite, values)):
        raise RequestRefused(
            f"The server gave {len(values)} logprobs for {num_sampled} sampled tokens, or one that is not finite.",
            "Each token is trained with the logprob with which it was sampled.",
            "Look at the server's log, and restart it.",
            status_code=502,
        )
    return array(LOGPROB, values)


def _policy_version(answer: ServerAnswer, choice: dict[str, Any]) -> int | None:
    """The oldest policy that sampled any token of an answer; None where the server does not say.

    Where an adapter answers, our middleware names its version in a header: the label of the weights is that of the newest
    one, not of the one that the answer began with.
    """
    header = answer.headers.get(POLICY_VERSION_HEADER, "")
    return int(header) if header.isdecimal() else oldest_version(choice.get("weight_versions"))
