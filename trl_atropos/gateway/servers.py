"""The inference servers behind a gateway: which one a session asks, and what happens when one is not there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from ..api.refusals import RequestRefused
from ..errors import PreflightError
from . import sglang
from .sglang import SGLangRoutes
from .streams import Parts


logger = logging.getLogger(__name__)

RENDER = "/v1/chat/completions/render"
GENERATE = "/inference/v1/generate"
DERENDER = "/v1/chat/completions/derender"
DERENDER_TEXT = "/v1/completions/derender"
DETOKENIZE = "/detokenize"
ROUTES = (RENDER, GENERATE, DERENDER)
"""What a vLLM server must have. Nothing else of it is ever asked but its models, its health and `/detokenize`."""

OUT_OF_SGLANG = {
    RENDER: SGLangRoutes.render,
    GENERATE: SGLangRoutes.generate,
    DERENDER: SGLangRoutes.derender,
    DERENDER_TEXT: SGLangRoutes.derender_text,
    DETOKENIZE: SGLangRoutes.detokenize,
}
"""What answers these routes where the server is SGLang."""

START = "Start it with `trl vllm-serve` (vLLM 0.32 or newer)"

CONNECT_TIMEOUT_S = 5.0
HEALTH_INTERVAL_S = 0.5
HEALTH_TIMEOUT_S = 2.0

KEEP_CONNECTION_S = 3.0
"""Less than the 5 s after which vLLM closes a connection that idles."""

MAX_FAILURES = 3
"""So often a request is sent again that servers answered with an error of their own: the request may be the reason."""

LAST_PART = b"[DONE]"

CONNECTION_FAILURES = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError, TimeoutError)


class ServerRefused(RequestRefused):
    """A request that a server answered with an error. Its own words go to the client.

    Args:
        what (`str`):
            What happened, with values and position.
        why (`str`):
            Why it matters, or the usual cause.
        fix (`str`):
            What mends it.
        status_code (`int`, *optional*, defaults to `502`):
            HTTP status for the client.
        body (`bytes`, *optional*, defaults to `b""`):
            What the server answered.
    """

    def __init__(self, what: str, why: str, fix: str, status_code: int = 502, body: bytes = b""):
        super().__init__(what, why, fix, status_code=status_code)
        self.body = body


@dataclass(eq=False)
class InferenceServer:
    """One of the servers, and what is known of it.

    Args:
        url (`str`):
            Without a path.
        model (`str`):
            The name of the model that it serves.
        max_model_len (`int`):
            Tokens that prompt and answer may have together.
        num_in_flight (`int`):
            Requests that it has not answered yet.
        num_chosen (`int`):
            Sessions that came to it.
        is_there (`bool`):
            Whether it was, when it was last asked.
        sglang ([`SGLangRoutes`], *optional*):
            Of an SGLang server; None for vLLM.
    """

    url: str
    model: str = ""
    max_model_len: int = 0
    num_in_flight: int = 0
    num_chosen: int = 0
    is_there: bool = True
    sglang: SGLangRoutes | None = None

    @property
    def health_route(self) -> str:
        """What a server answers that can be asked, also while it is paused: SGLang's `/health` generates a token."""
        return "/health" if self.sglang is None else "/model_info"


@dataclass(eq=False)
class Affinity:
    """Which server answers for a session: its prefix cache has the conversation. None before the first request."""

    server: InferenceServer | None = None


@dataclass(frozen=True)
class ServerReply:
    """An HTTP answer, the server that gave it, its headers by their names in lower case, and the route that was asked."""

    status: int
    text: bytes
    server: InferenceServer
    headers: dict[str, str]
    route: str


@dataclass(frozen=True)
class ServerAnswer:
    """The JSON object of an answer, the server that gave it, and the headers in lower case."""

    values: dict[str, Any]
    server: InferenceServer
    headers: dict[str, str]


class _NotAnswered(Exception):
    """A route of SGLang answered with an error."""

    def __init__(self, reply: ServerReply):
        super().__init__(reply.status)
        self.reply = reply


class InferenceServers:
    """Several servers of the same model as one.

    A session stays on its server. When that is not there its requests go to another one, and what was not answered is
    sent again; while none is there, they wait.

    Args:
        urls (`Sequence[str]`):
            `http://host:port` of each, with or without `/v1`.
        api_key (`str`, *optional*):
            The key of the servers.
        wait_s (`float`, *optional*, defaults to `600.0`):
            Seconds for which a request waits for a server.
    """

    def __init__(self, urls: Sequence[str], api_key: str | None = None, wait_s: float = 600.0):
        self.servers = [InferenceServer(url.rstrip("/").removesuffix("/v1")) for url in dict.fromkeys(urls)]
        self.wait_s = wait_s
        self.num_moves = 0
        self.num_resent = 0
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._http: aiohttp.ClientSession | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def max_model_len(self) -> int:
        """Tokens that a sequence may have on every server."""
        return min(server.max_model_len for server in self.servers)

    async def start(self) -> None:
        """Ask every server what it serves, and begin to watch those that are not there.

        Raises:
            PreflightError: One does not answer or lacks a route, or they are of both kinds.
        """
        # No `trust_env`: what is sent to servers does not pass through a proxy of the environment, nor takes ~/.netrc.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_CONNECTION_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        )
        try:
            await asyncio.gather(*map(self._inspect, self.servers))
            self._refuse_both_kinds()
        except PreflightError:
            await self.close()
            raise
        self._watch = asyncio.create_task(self._watch_absent())

    async def close(self) -> None:
        """Let go of all connections."""
        if self._watch is not None:
            self._watch.cancel()
        if self._http is not None:
            await self._http.close()

    async def post(self, affinity: Affinity, path: str, body: dict[str, Any]) -> ServerAnswer:
        """Send a request to the server of a session, or to another one that is there.

        `body` gets the name of the model.

        Raises:
            ServerRefused: A server answered with an error of the client, or several times with one of its own.
            RequestRefused: No server was there in time (503).
        """
        reply = await self.exchange(affinity, "POST", path, body)
        if reply.status >= 300:
            raise _refusal(reply)
        return ServerAnswer(msgspec.json.decode(reply.text), reply.server, reply.headers)

    async def post_for_parts(self, affinity: Affinity, path: str, body: dict[str, Any], parts: Parts) -> ServerAnswer:
        """As `post`, for an answer that comes in parts, which `parts` gets as they come; a server may also give it at once. Once
        a client has seen something of it, the request is not sent again.

        Raises:
            ServerRefused: As for `post`.
            RequestRefused: As for `post`; or a part was shown, and the rest did not come (502).
        """
        reply = await self.exchange(affinity, "POST", path, body, parts)
        if reply.status >= 300:
            raise _refusal(reply)
        values = msgspec.json.decode(reply.text) if reply.text else parts.whole()
        return ServerAnswer(values, reply.server, reply.headers)

    async def exchange(
        self,
        affinity: Affinity,
        method: str,
        path: str,
        body: bytes | dict[str, Any],
        parts: Parts | None = None,
    ) -> ServerReply:
        """Ask the server of `affinity`, or another one that is there, whatever it answers.

        A request without an answer is sent again: nobody has seen what it may have led to. So is, a few times, one that a
        server answered with an error of its own. A `body` that is an object gets the name of the server's model. What `parts` got
        is not in the reply.

        Raises:
            RequestRefused: No server was there in time (503), or what broke off was shown (502).
        """
        deadline = time.monotonic() + self.wait_s
        num_failures = 0
        while True:
            server = await self._server_of(affinity, deadline)
            reply = await self._send(server, method, path, body, parts)
            if parts is not None and parts.is_shown and (reply is None or reply.status >= 500):
                raise broken_off(server)
            if reply is not None and reply.status < 500:
                return reply
            self.num_resent += 1
            if reply is not None:
                # Also what vLLM answers whose engine has died.
                self._note_absent(server, reply.status)
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    return reply

    async def _send(
        self,
        server: InferenceServer,
        method: str,
        path: str,
        body: bytes | dict[str, Any],
        parts: Parts | None,
    ) -> ServerReply | None:
        """Send a request once; None where the connection broke."""
        server.num_in_flight += 1
        try:
            if server.sglang is not None and isinstance(body, dict):
                return await self._answer_as_vllm(server, server.sglang, path, body)
            data = body if isinstance(body, bytes) else msgspec.json.encode({**body, "model": server.model})
            return await self._request(server, method, path, data, parts)
        except CONNECTION_FAILURES as exc:
            self._note_absent(server, exc)
            return None
        finally:
            server.num_in_flight -= 1

    async def _answer_as_vllm(
        self, server: InferenceServer, routes: SGLangRoutes, path: str, body: dict[str, Any]
    ) -> ServerReply:
        async def ask(route: str, asked: dict[str, Any]) -> Any:
            reply = await self._request(server, "POST", route, msgspec.json.encode(asked))
            if reply.status >= 300:
                raise _NotAnswered(reply)
            return msgspec.json.decode(reply.text)

        try:
            values = await OUT_OF_SGLANG[path](routes, ask, body)
        except _NotAnswered as exc:
            return exc.reply
        return ServerReply(200, msgspec.json.encode(values), server, {}, path)

    async def _request(
        self, server: InferenceServer, method: str, route: str, data: bytes, parts: Parts | None = None
    ) -> ServerReply:
        assert self._http is not None, "start() comes first"
        async with self._http.request(
            method, server.url + route, data=data or None, headers=self._headers
        ) as response:
            status = response.status
            if parts is not None and response.content_type == "text/event-stream":
                error = await _read_parts(response.content, parts)
                status, text = (500, error) if error else (status, b"")
            else:
                text = await response.read()
        headers = {name.lower(): value for name, value in response.headers.items()}
        return ServerReply(status, text, server, headers, route)

    async def _server_of(self, affinity: Affinity, deadline: float) -> InferenceServer:
        while True:
            if affinity.server is not None and affinity.server.is_there:
                return affinity.server
            there = [server for server in self.servers if server.is_there]
            if there:
                self.num_moves += affinity.server is not None
                affinity.server = min(there, key=lambda server: (server.num_in_flight, server.num_chosen))
                affinity.server.num_chosen += 1
                return affinity.server
            if time.monotonic() >= deadline:
                raise RequestRefused(
                    f"None of {len(self.servers)} inference servers was there for {self.wait_s:g} s.",
                    "They ended, or cannot be reached from the gateway.",
                    "Look at their logs and start them again, or correct --servers.",
                    status_code=503,
                    retry_after_s=10,
                )
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _note_absent(self, server: InferenceServer, reason: object) -> None:
        if server.is_there:
            logger.warning("event=server_absent url=%s reason=%r", server.url, reason)
        server.is_there = False

    async def _watch_absent(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            await asyncio.gather(*(self._look(server) for server in self.servers if not server.is_there))

    async def _look(self, server: InferenceServer) -> None:
        assert self._http is not None
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        try:
            async with self._http.get(
                server.url + server.health_route, headers=self._headers, timeout=timeout
            ) as response:
                server.is_there = response.status == 200
        except CONNECTION_FAILURES:
            return
        if server.is_there:
            logger.info("event=server_back url=%s", server.url)

    async def _inspect(self, server: InferenceServer) -> None:
        status, text = await self._get(server, "/v1/models")
        if status in (401, 403):
            raise PreflightError(
                f"{server.url} answers {status}.",
                "It asks for a key and did not get its own.",
                "Set VLLM_API_KEY to the one that it was started with (--api-key).",
            )
        try:
            models = msgspec.json.decode(text)["data"]
            # Adapters have a parent: the model itself is asked for, and the server's middleware gives it the newest one.
            (model, *_) = [model for model in models if not model.get("parent")]
            server.model, server.max_model_len = model["id"], int(model["max_model_len"])
        except (msgspec.DecodeError, LookupError, TypeError, ValueError) as exc:
            raise PreflightError(
                f"What answers at {server.url} is no inference server: it answers /v1/models with {status} and "
                f"{text[:200]!r}.",
                "A gateway samples through the routes for tokens of vLLM or SGLang.",
                "Correct --servers: they name servers that were started with trl vllm-serve, or sglang.launch_server.",
            ) from exc
        if model.get("owned_by") == "sglang":
            server.sglang = await self._read_parsers(server)
        status, text = await self._get(server, "/openapi.json")
        # Without documents the first request tells.
        routes = ROUTES if server.sglang is None else sglang.ROUTES
        missing = [path for path in routes if path.encode() not in text] if status == 200 else []
        if missing:
            raise PreflightError(
                f"The server at {server.url} has no {', '.join(missing)}.",
                "Tokens are rendered, sampled and parsed through these routes.",
                f"{START}, or `vllm serve --enable-scale-out`; SGLang: 0.5.22 or newer.",
            )

    async def _read_parsers(self, server: InferenceServer) -> SGLangRoutes:
        status, text = await self._get(server, "/server_info")
        try:
            info = msgspec.json.decode(text)
            return SGLangRoutes(info.get("tool_call_parser"), info.get("reasoning_parser"))
        except (msgspec.DecodeError, AttributeError) as exc:
            raise PreflightError(
                f"The SGLang server at {server.url} answers /server_info with {status} and {text[:200]!r}.",
                "With which parsers it was started is read there.",
                "Install SGLang 0.5.22 or newer.",
            ) from exc

    def _refuse_both_kinds(self) -> None:
        of_sglang = [server.url for server in self.servers if server.sglang is not None]
        if of_sglang and len(of_sglang) < len(self.servers):
            raise PreflightError(
                f"Of {len(self.servers)} servers, {', '.join(of_sglang)} are SGLang and the others vLLM.",
                "A session that changes its server would be rendered by another, and environments speak to one kind.",
                "Start a gateway for each kind.",
            )

    async def _get(self, server: InferenceServer, path: str) -> tuple[int, bytes]:
        assert self._http is not None
        try:
            async with self._http.get(server.url + path, headers=self._headers) as response:
                return response.status, await response.read()
        except (*CONNECTION_FAILURES, aiohttp.InvalidURL) as exc:
            raise PreflightError(
                f"The inference server at {server.url} does not answer: {type(exc).__name__}: {exc}.",
                "It is not there, still starts, or has another address.",
                "Start it with `trl vllm-serve --model ...` and wait until its /health answers, or correct --servers.",
            ) from exc


async def _read_parts(content: aiohttp.StreamReader, parts: Parts) -> bytes:
    """Hand over the server-sent events of an answer; return the server's own words where it ends with an error.

    Raises:
        ClientPayloadError: It has no end.
    """
    parts.begin()
    rest = b""
    async for data in content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            _, _, said = line.partition(b"data: ")
            if not said:
                continue
            if said == LAST_PART:
                return b""
            part = msgspec.json.decode(said)
            if "error" in part:
                return said
            parts.take(part)
    raise aiohttp.ClientPayloadError("The stream has no end.")


def broken_off(server: InferenceServer) -> RequestRefused:
    """What is raised where an answer that a client has seen the beginning of has no end."""
    return RequestRefused(
        f"The inference server at {server.url} broke an answer off, and a part of it was sent.",
        "The server ended, or a weight update cut it off. Nothing of the answer is recorded: another one would begin anew.",
        "Send the request again.",
        status_code=502,
    )


def _refusal(reply: ServerReply) -> ServerRefused:
    status = reply.status
    if status == 404:
        why, fix = "It lacks this route.", f"{START}; SGLang: 0.5.22 or newer."
    elif status < 500:
        why, fix = "It does not take this request.", "Change the request as it says."
    else:
        why, fix = f"The server at {reply.server.url} failed.", "Look at the server's log."
    return ServerRefused(
        f"{reply.route} of the inference server answered {status}: {reply.text[:500].decode(errors='replace')}.",
        why,
        fix,
        # An agent cannot mend a key or a route that the gateway lacks.
        status_code=status if status in (400, 413, 422) else 502,
        body=reply.text,
    )
