"""What environments reach, which record for themselves: the routes on which a server generates, and no other."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from typing import Any

import msgspec

from ..api.http import Request, json_answer
from ..api.refusals import RequestRefused
from .counts import GatewayCounts
from .options import GatewayOptions
from .prefixes import Prefixes
from .servers import DERENDER_TEXT, DETOKENIZE, ROUTES, Affinity, InferenceServer, InferenceServers, ServerReply


logger = logging.getLogger(__name__)

GENERATING = ("/generate", "/v1/completions", "/v1/chat/completions")
FOR_TOKENS = (*ROUTES, DERENDER_TEXT, DETOKENIZE)
"""What an [`AgentEnv`] asks, whose own gateway stands behind this one."""
MODELS = "/v1/models"
HEALTH = "/health"

MIN_SHARED = 0.5
"""A prompt follows its beginning to a server if that is so much of it. Less, such as the system prompt of all tasks, would
bring everything to one server.
"""

MAX_CROWD = 2
"""It does not follow where so many times more requests wait than at the emptiest server."""

SENT_ON = ("content-type", "x-atropos-policy-version", "retry-after")
"""Headers of a server's answer that go on to the environment."""


class _Asked(msgspec.Struct):
    """Where the prompt of a request is: in one of these, depending on the route. SGLang's `/generate` has the last."""

    prompt: msgspec.Raw = msgspec.Raw()
    token_ids: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input_ids: msgspec.Raw = msgspec.Raw()


class PassThrough:
    """Answers environments as one server would, out of several.

    A request and its answer are passed on byte for byte. The next turn of a conversation goes to the server that has its
    beginning; one that no server answered is sent again to another one.

    Args:
        servers ([`InferenceServers`]):
            The servers of the gateway.
        key (`str`):
            What environments show as their API key.
        options ([`GatewayOptions`]):
            `max_body_bytes` and `max_in_flight` bound what environments send, too.
        counts ([`GatewayCounts`]):
            Gets `num_passed`.
    """

    def __init__(self, servers: InferenceServers, key: str, options: GatewayOptions, counts: GatewayCounts):
        self.servers = servers
        self.options = options
        self.counts = counts
        self.num_in_flight = 0
        self._key = key.encode()
        self._prefixes: Prefixes[InferenceServer] = Prefixes()

    def is_asked(self, request: Request) -> bool:
        """Whether a request is one of an environment, by its key."""
        return bool(request.bearer) and hmac.compare_digest(request.bearer.encode(), self._key)

    async def answer(self, request: Request) -> bool:
        """Answer a request of an environment; return whether it has such a route.

        Raises:
            RequestRefused: It is too large, too many are in flight, or no server was there in time.
            ClientGone: The environment broke the connection before its request was whole.
        """
        if (request.method, request.path) == ("GET", HEALTH):
            is_there = any(server.is_there for server in self.servers.servers)
            await json_answer({}, 200 if is_there else 503).send(request)
        elif (request.method, request.path) == ("GET", MODELS):
            await self._pass(request, b"")
        elif request.method == "POST" and request.path in (*GENERATING, *FOR_TOKENS):
            request.content_length(self.options.max_body_bytes)
            await self._pass(request, await request.body(self.options.max_body_bytes))
        else:
            return False
        return True

    async def _pass(self, request: Request, body: bytes) -> None:
        if self.num_in_flight >= self.options.max_in_flight:
            raise RequestRefused(
                f"{self.num_in_flight} requests of environments are answered at once.",
                "More would only wait in the servers.",
                "Ask for less at once, or raise --max_in_flight.",
                status_code=429,
                retry_after_s=1,
            )
        request.watch_client()
        asking = asyncio.create_task(self._exchange(request.method, request.path, body))
        self.num_in_flight += 1
        try:
            while not asking.done() and await request.is_client_there():
                await request.wait_for([asking], self.options.keep_alive_s)
        finally:
            self.num_in_flight -= 1
            # When the environment has gone, the server stops sampling.
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError, RequestRefused):
                await asking
        if asking.cancelled():
            self.counts.num_cancelled += 1
            return
        reply = asking.result()
        self.counts.num_passed += 1
        headers = [(name.encode(), reply.headers[name].encode("latin-1")) for name in SENT_ON if name in reply.headers]
        await request.answer(reply.status, headers, reply.text)

    async def _exchange(self, method: str, path: str, body: bytes) -> ServerReply:
        prompt = _prompt_of(body)
        # Chosen and counted without a pause in between, so that requests that come together see each other.
        reply = await self.servers.exchange(Affinity(self._server_for(prompt)), method, path, body)
        if prompt:
            self._prefixes.note(prompt, reply.server)
        return reply

    def _server_for(self, prompt: bytes) -> InferenceServer | None:
        """The server that has most of a prompt, unless it is crowded; None where it is all the same."""
        server, share = self._prefixes.find(prompt)
        if server is None or share < MIN_SHARED:
            return None
        fewest = min(other.num_in_flight for other in self.servers.servers if other.is_there or other is server)
        return server if server.num_in_flight <= MAX_CROWD * (fewest + 1) else None


def _prompt_of(body: bytes) -> bytes:
    """The prompt of a request as it stands in it; empty where there is none."""
    try:
        asked: Any = msgspec.json.decode(body, type=_Asked)
    except (msgspec.DecodeError, RecursionError):
        # The server says what is wrong with it.
        return b""
    # Without the bracket that closes a list, so that what goes on with it begins with it.
    return bytes(asked.prompt or asked.token_ids or asked.messages or asked.input_ids).rstrip(b"]}")
