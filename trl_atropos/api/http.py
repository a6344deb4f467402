"""Requests and answers of the ASGI application: limits on what is read, gzip on both sides."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from isal import isal_zlib as zlib

from .refusals import RequestRefused


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

API_HEADER = (b"trl-atropos-api", b"1")
"""In every answer, by which our client knows that it may ask for receipts."""

MIN_GZIP_BYTES = 1000
"""Answers of so many bytes or more are compressed for clients that accept it, as atroposlib does."""


class ClientGone(ConnectionError):
    """The client broke the connection before its request was whole."""


class Request:
    """One HTTP request. `path` is without query; `query` holds the last value of each parameter; `own_headers` are in every
    answer to it.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send, own_headers: Headers | None = None):
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
        self.has_begun_to_answer = False
        self._headers: dict[str, str] = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        self._own_headers = own_headers or []
        self._receive = receive
        self._send = send
        self._watch: asyncio.Task[None] | None = None

    def header(self, name: str) -> str:
        """Value of a header, by its name in lower case; empty without it."""
        return self._headers.get(name, "")

    @property
    def bearer(self) -> str:
        """The token that it shows as its bearer; empty without one."""
        scheme, _, token = self.header("authorization").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""

    @property
    def accepts_gzip(self) -> bool:
        """Whether the client takes compressed answers."""
        return "gzip" in self.header("accept-encoding").lower()

    @property
    def is_gzipped(self) -> bool:
        """Whether the body came compressed."""
        return "gzip" in self.header("content-encoding").lower()

    @property
    def is_from_another_site(self) -> bool:
        """Whether a page of the web sent it, which browsers say and programs do not."""
        return self.header("sec-fetch-site") in ("cross-site", "same-site") or bool(self.header("origin"))

    def content_length(self, max_bytes: int) -> int:
        """Bytes of the body as the header says; 0 if it does not.

        Raises:
            RequestRefused: They are more than `max_bytes` (413), or no number (400).
        """
        text = self.header("content-length") or "0"
        if not (text.isascii() and text.isdecimal()):
            raise RequestRefused(
                f"`Content-Length` is {text[:50]!r}.",
                "It is a number of bytes.",
                "Let the HTTP library set it.",
                status_code=400,
            )
        # Python refuses to read integers of very many digits.
        length = max_bytes + 1 if len(text) > 18 else int(text)
        if length > max_bytes:
            raise _too_large(max_bytes)
        return length

    async def body(self, max_bytes: int) -> bytes:
        """Read the body as it came.

        Raises:
            RequestRefused: It has more than `max_bytes` bytes (413).
            ClientGone: The client broke the connection.
        """
        chunks: list[bytes] = []
        num_bytes = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("The client broke the connection.")
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def watch_client(self) -> None:
        """Notice from here on when the client breaks the connection; to be called after the body was read."""
        self._watch = asyncio.create_task(self._wait_for_end())

    @property
    def has_client_gone(self) -> bool:
        """Whether the client is known to have broken the connection since `watch_client` was called."""
        return self._watch is not None and self._watch.done()

    async def is_client_there(self) -> bool:
        """Whether the client has not broken the connection, by what the server knows at this moment."""
        if self._watch is not None:
            # A part that was being sent returns in the moment of the break, before the watching task has run.
            await asyncio.wait({self._watch}, timeout=0)
        return not self.has_client_gone

    async def wait_for(self, awaited: Iterable[asyncio.Future[Any]], timeout_s: float) -> None:
        """Wait until one of them is done, the client has gone, or the time is over; after `watch_client`."""
        assert self._watch is not None, "watch_client() comes first"
        await asyncio.wait({*awaited, self._watch}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Send an answer."""
        await self.begin_answer(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.send_part(body, is_last=True)

    async def begin_answer(self, status: int, headers: Headers) -> None:
        """Send the head of an answer."""
        self.has_begun_to_answer = True
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self._own_headers]})

    async def send_part(self, body: bytes, is_last: bool = False) -> None:
        """Send a part of the body of an answer."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def close(self) -> None:
        """Let go of the connection."""
        if self._watch is not None:
            self._watch.cancel()

    async def _wait_for_end(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


@dataclass(frozen=True)
class Answer:
    """A short answer, in memory. `headers` are beside the type and the length."""

    content: bytes
    status: int = 200
    media_type: bytes = b"application/json"
    headers: Headers = field(default_factory=list)

    async def send(self, request: Request) -> None:
        """Send it, compressed if it is long and the client takes that."""
        body, headers = self.content, [(b"content-type", self.media_type), *self.headers]
        if len(body) >= MIN_GZIP_BYTES:
            headers.append((b"vary", b"Accept-Encoding"))
            if request.accepts_gzip:
                body = zlib.compress(body, 1, wbits=31)
                headers.append((b"content-encoding", b"gzip"))
        await request.answer(self.status, headers, body)


def json_answer(value: Any, status: int = 200, headers: Headers | None = None) -> Answer:
    """An answer in JSON."""
    return Answer(json.dumps(value, separators=(",", ":")).encode(), status, headers=headers or [])


def text_answer(text: str, status: int = 200) -> Answer:
    """An answer in plain text."""
    return Answer(text.encode(), status, b"text/plain; charset=utf-8")


def refusal_answer(exc: RequestRefused) -> Answer:
    """What a client is told that is refused; the form is FastAPI's for values that it cannot take."""
    if exc.status_code == 422:
        location = ["body", exc.field] if exc.field else ["body"]
        return json_answer({"detail": [{"type": "value_error", "loc": location, "msg": str(exc)}]}, 422)
    headers = [] if exc.retry_after_s is None else [(b"retry-after", str(exc.retry_after_s).encode())]
    return json_answer({"detail": str(exc)}, exc.status_code, headers)


def has_key(request: Request, key: str) -> bool:
    """Whether a request shows the key: as a bearer token, or as the password of the URL `http://name:KEY@host:port`."""
    shown = request.bearer
    scheme, _, value = request.header("authorization").partition(" ")
    if scheme.lower() == "basic":
        try:
            shown = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    return bool(shown) and hmac.compare_digest(shown.encode(), key.encode())


def _too_large(max_bytes: int) -> RequestRefused:
    return RequestRefused(
        f"The body has more than {max_bytes} bytes.",
        "It is read in memory, so its size is limited.",
        "Send less at once, or raise `--max_body_bytes`.",
        status_code=413,
    )
