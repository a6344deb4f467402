"""What agents reach: answers in the dialects of their SDKs and the model's name, each in the agent's own session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from ..api.http import (
    Answer,
    ClientGone,
    Headers,
    Message,
    Receive,
    Request,
    Send,
    json_answer,
)
from ..api.refusals import RequestRefused
from .chat import ChatRequest, read_chat_request
from .dialects import CHAT, DIALECTS, MESSAGES
from .dialects.base import Dialect, LiveAnswer
from .options import LIFT
from .passing import PassThrough
from .recorder import Recorder
from .sessions import UNDELIVERED, Session, Sessions
from .streams import LiveReply
from .turns import Turn


logger = logging.getLogger(__name__)

SESSION_PATH = re.compile(r"/session/([\w-]+)(/v1/.+)")
COUNT_PATH = f"{MESSAGES.path}/count_tokens"
STREAM_HEADERS: Headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
NOT_FOUND = {"error": {"message": "Not Found", "type": "NotFoundError", "param": None, "code": 404}}
"""The answer to everything that is not there, sessions of others among it."""


class AgentApp:
    """The ASGI application that agents talk to.

    `/session/ID` with the path of a dialect, or with `/v1/models`; the same without `/session/ID` where the id comes as the
    API key.

    Args:
        sessions ([`Sessions`]):
            The open sessions.
        recorder ([`Recorder`]):
            Answers requests.
        environments ([`PassThrough`], *optional*):
            Answers requests of environments, which show a key of theirs.
    """

    def __init__(self, sessions: Sessions, recorder: Recorder, environments: PassThrough | None = None):
        self.sessions = sessions
        self.recorder = recorder
        self.environments = environments
        self.options = recorder.options
        self._dialects = {("POST", dialect.path): dialect for dialect in DIALECTS}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http", "the server has neither lifespan nor websockets"
        request = Request(scope, receive, send)
        try:
            await self.answer(request)
        except ClientGone:
            return
        finally:
            await request.close()

    async def answer(self, request: Request) -> None:
        """Answer a request, whatever it is.

        Raises:
            ClientGone: The client broke the connection before its request was whole.
        """
        session, path = self._session_of(request)
        dialect = self._dialects.get((request.method, path))
        try:
            if request.is_from_another_site:
                await json_answer(NOT_FOUND, 404).send(request)
            elif session is None:
                if not await self._is_passed(request):
                    await json_answer(NOT_FOUND, 404).send(request)
            elif dialect is not None:
                await self._ask(request, session, dialect)
            elif (request.method, path) == ("POST", COUNT_PATH):
                await self._count(request, session)
            elif (request.method, path) == ("GET", "/v1/models"):
                models = [{"id": server.model, "object": "model"} for server in self.recorder.servers.servers[:1]]
                await json_answer({"object": "list", "data": models}).send(request)
            else:
                await json_answer(NOT_FOUND, 404).send(request)
        except RequestRefused as exc:
            self.recorder.counts.num_refused += 1
            logger.warning("event=request_refused status=%d error=%r", exc.status_code, str(exc))
            await refusal(exc, MESSAGES if path == COUNT_PATH else dialect or CHAT).send(request)

    async def _is_passed(self, request: Request) -> bool:
        """Whether a request is one of an environment, and answered."""
        environments = self.environments
        return environments is not None and environments.is_asked(request) and await environments.answer(request)

    def _session_of(self, request: Request) -> tuple[Session | None, str]:
        found = SESSION_PATH.fullmatch(request.path)
        if found:
            return self.sessions.find(found[1]), found[2]
        # Where an agent's URL is fixed, its key says which session it is.
        keys = [request.bearer, request.header("x-api-key")]
        return next(filter(None, map(self.sessions.find, keys)), None), request.path

    async def _read(
        self, request: Request, session: Session, dialect: Dialect
    ) -> tuple[bytes, dict[str, Any], ChatRequest]:
        """The body of a request, what it says, and the chat request that it becomes."""
        request.content_length(self.options.max_body_bytes)
        body = await request.body(self.options.max_body_bytes)
        values = _parsed(body)
        asked = read_chat_request(
            dialect.read(values, session), self.options.temperature, self.options.grammar == LIFT
        )
        return body, values, asked

    async def _count(self, request: Request, session: Session) -> None:
        """Tell how many tokens a request of Anthropic's dialect would be sampled from."""
        _, _, asked = await self._read(request, session, MESSAGES)
        with self.sessions.in_flight(session):
            num_tokens = await self.recorder.num_prompt_tokens(session, asked)
        await json_answer({"input_tokens": num_tokens}).send(request)

    async def _ask(self, request: Request, session: Session, dialect: Dialect) -> None:
        body, values, asked = await self._read(request, session, dialect)
        digest = blake2b(body, digest_size=16).digest()
        request.watch_client()
        if request.header("x-stainless-retry-count") not in ("", "0"):
            # The client says that it did not get the answer that it asked for before.
            turn = session.repeated(digest)
            if turn is not None:
                self.recorder.counts.num_replayed += 1
                if turn.why_masked == UNDELIVERED:
                    turn.why_masked = ""
                return await self._send(request, dialect, values, turn)
        stream = _Stream(request, dialect, values) if values.get("stream") else None
        with self.sessions.in_flight(session):
            live = None if stream is None else stream.reply
            sampling = asyncio.create_task(self.recorder.answer(session, asked, digest, live))
            try:
                await self._wait(request, sampling, stream)
                if not sampling.done():
                    self.recorder.counts.num_cancelled += 1
                    return
            finally:
                # When the client has gone, the server stops sampling.
                sampling.cancel()
                with contextlib.suppress(asyncio.CancelledError, RequestRefused):
                    await sampling
        exc = sampling.exception()
        if request.has_begun_to_answer and isinstance(exc, RequestRefused):
            self.recorder.counts.num_refused += 1
            logger.warning("event=stream_refused status=%d error=%r", exc.status_code, str(exc))
            await _send_parts(request, dialect.error_events(exc))
        else:
            await self._send(request, dialect, values, sampling.result(), stream)

    async def _wait(self, request: Request, sampling: asyncio.Task[Turn], stream: _Stream | None) -> None:
        """Wait until the answer is there or the client has gone, and keep its stream going meanwhile, if it has one."""
        while not sampling.done() and await request.is_client_there():
            arrival = [] if stream is None else [stream.reply.arrival()]
            await request.wait_for([sampling, *arrival], self.options.keep_alive_s)
            if stream is not None and not sampling.done() and not request.has_client_gone:
                await stream.go_on()

    async def _send(
        self,
        request: Request,
        dialect: Dialect,
        values: dict[str, Any],
        turn: Turn,
        stream: _Stream | None = None,
    ) -> None:
        if not turn.why_masked and not await request.is_client_there():
            turn.why_masked = UNDELIVERED
        if not values.get("stream"):
            await json_answer(dialect.answer(values, turn)).send(request)
            return
        if not request.has_begun_to_answer:
            await request.begin_answer(200, STREAM_HEADERS)
        if stream is not None and stream.answer is not None:
            self.recorder.counts.num_streamed += 1
            await _send_parts(request, stream.end(stream.answer, turn))
        else:
            await _send_parts(request, dialect.events(values, turn))


class _Stream:
    """The stream of an answer while that is sampled: its text as it comes, and signs of life."""

    def __init__(self, request: Request, dialect: Dialect, values: dict[str, Any]):
        self.request = request
        self.dialect = dialect
        self.values = values
        self.reply = LiveReply()
        self.answer: LiveAnswer | None = None
        """What was begun; None before the first text."""

    async def go_on(self) -> None:
        """Send what has come, or a sign of life where nothing has."""
        if not self.request.has_begun_to_answer:
            await self.request.begin_answer(200, STREAM_HEADERS)
        text = self.reply.pass_on()
        if not text:
            await self.request.send_part(self.dialect.keep_alive)
            return
        if self.answer is None:
            assert self.reply.turn is not None, "it has text"
            self.answer = self.dialect.live(self.values, self.reply.turn)
            await self.request.send_part(b"".join(self.answer.begin()))
        await self.request.send_part(self.answer.text(text))

    def end(self, answer: LiveAnswer, turn: Turn) -> Iterator[bytes]:
        """What is left of an answer that was begun."""
        rest = turn.message["content"][self.reply.num_passed_on :]
        if rest:
            yield answer.text(rest)
        yield from answer.end(turn)


async def _send_parts(request: Request, parts: Iterator[bytes]) -> None:
    for part in parts:
        await request.send_part(part)
    await request.send_part(b"", is_last=True)


def refusal(exc: RequestRefused, dialect: Dialect = CHAT) -> Answer:
    """What a client is told of a refusal, in the form of its dialect."""
    headers = [] if exc.retry_after_s is None else [(b"retry-after", str(exc.retry_after_s).encode())]
    if exc.retry_after_s is None:
        # The SDKs of OpenAI and Anthropic would send a request three times that can never succeed.
        headers.append((b"x-should-retry", b"false"))
    return json_answer(dialect.error(exc), exc.status_code, headers)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise RequestRefused(
            f"The body is no JSON object: {exc}.",
            "It is what an agent asks for.",
            "Send what the SDK sends.",
            status_code=400,
        ) from exc
