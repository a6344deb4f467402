"""What our routes share: reading a request, answering it, and calling the server inside the process."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class BadRequest(ValueError):
    """A request that is answered with `status` and `body`, which is JSON, instead of being passed on."""

    def __init__(self, status: int, body: bytes):
        super().__init__(status, body)
        self.status = status
        self.body = body


def route_of(scope: Scope) -> str:
    """The path of a request, without the server's root path and a slash at its end."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).rstrip("/")


def error(message: str, kind: str = "BadRequestError") -> bytes:
    """The body of an error, in the shape of vLLM's."""
    return json.dumps({"error": {"message": message, "type": kind}}).encode()


async def read_body(receive: Receive) -> bytes:
    """Read a request's body to its end.

    Raises:
        [`BadRequest`]: if the client disconnects before.
    """
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest(400, error("The client disconnected before the request body was complete."))
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        [`BadRequest`]: if the body is not a JSON object.
    """
    try:
        request = json.loads(body)
    except ValueError as exc:
        raise BadRequest(400, error(f"The request body is not JSON: {exc}")) from exc
    if not isinstance(request, dict):
        raise BadRequest(400, error(f"The request body must be a JSON object, got {type(request).__name__}."))
    return request


async def respond(send: Send, status: int, payload: dict[str, Any]) -> None:
    """Answer with a JSON object."""
    await respond_raw(send, status, json.dumps(payload).encode())


async def respond_raw(send: Send, status: int, body: bytes) -> None:
    """Answer with bytes that are JSON."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def replay(body: bytes, receive: Receive) -> Receive:
    """Make a `receive` that gives `body` first and then what the caller's gives: its disconnect must reach the server,
    which then stops generating.
    """
    is_sent = False

    async def replayed() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def call(
    app: ASGIApp, scope: Scope, receive: Receive, method: str, path: str, payload: dict[str, Any] | None
) -> tuple[int, bytes]:
    """Call the server inside the process, with the caller's headers, and return status and body of its answer.

    `scope` and `receive` are those of the caller's request, whose body was read. `path` is a route below the server's
    root path. `payload` is sent as JSON; None sends an empty body.
    """
    body = b"" if payload is None else json.dumps(payload).encode()
    replaced = {b"content-length", b"content-type", b"content-encoding", b"accept-encoding"}
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in replaced]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    inner_path = scope.get("root_path", "") + path
    inner_scope = {
        **scope,
        "method": method,
        "path": inner_path,
        "raw_path": inner_path.encode(),
        "query_string": b"",
        "headers": headers,
        # Request state of the outer call must not leak into a second one.
        "state": dict(scope.get("state", {})),
    }
    status = 500
    chunks: list[bytes] = []

    async def inner_send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))

    await app(inner_scope, replay(body, receive), inner_send)
    return status, b"".join(chunks)
