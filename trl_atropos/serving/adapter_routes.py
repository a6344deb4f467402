"""Which LoRA adapter answers for the model: environments name the model, and every policy is an adapter of its own.

A request that names no model or the served one goes to the adapter that was routed to last, as a whole: it ends with the
adapter that it began with. A request that names an adapter is passed on as it is. How many requests use each adapter is
counted from before the server sees them until they are answered, so that a trainer knows which ones it may take away:
vLLM reads an adapter again from its directory if newer ones have displaced it, also in the middle of a request.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..network import POLICY_VERSION_HEADER
from .asgi import (
    ASGIApp,
    BadRequest,
    Message,
    Receive,
    Scope,
    Send,
    call,
    error,
    parse_object,
    read_body,
    replay,
    respond,
    respond_raw,
)


ROUTED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/inference/v1/generate"})
"""vLLM's routes that generate, beside our own `/generate`."""


class AdapterRoutes:
    """Answers `/atropos/adapter` and rewrites the `model` of requests that generate.

    `app` is the vLLM server. `lora_name` is the adapter that answers for the model, None for the model itself, and
    `policy_version` is the number that the trainer gave to what answers; None before the trainer has routed anything.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.lora_name: str | None = None
        self.policy_version: int | None = None
        self._base_models: tuple[str, ...] = ()
        self._num_in_flight: Counter[str] = Counter()

    def answers_for(self, model: Any) -> bool:
        """Whether a request with this `model` goes to the adapter."""
        return self.lora_name is not None and (not model or model in self._base_models)

    async def is_served_model(self, model: Any, scope: Scope, receive: Receive) -> bool:
        """Whether a request with this `model` is for the served model, not for an adapter that it names."""
        if model and not self._base_models:
            self._learn(await self._models(scope, receive))
        return not model or model in self._base_models

    @contextmanager
    def in_flight(self, lora_name: Any) -> Iterator[None]:
        """Count a request as one that uses this adapter. A `model` that is no name is left to the server."""
        if not isinstance(lora_name, str):
            yield
            return
        self._num_in_flight[lora_name] += 1
        try:
            yield
        finally:
            self._num_in_flight[lora_name] -= 1
            if not self._num_in_flight[lora_name]:
                del self._num_in_flight[lora_name]

    async def get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `GET /atropos/adapter`."""
        try:
            await self._models(scope, receive)
        except BadRequest as exc:
            return await respond_raw(send, exc.status, exc.body)
        await respond(send, 200, self._state())

    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer `POST /atropos/adapter`."""
        try:
            lora_name, policy_version = _checked(parse_object(await read_body(receive)))
            models = await self._models(scope, receive)
            if lora_name is not None and lora_name not in {model["id"] for model in models if model.get("parent")}:
                raise BadRequest(404, error(f"The adapter `{lora_name}` is not loaded.", "NotFoundError"))
        except BadRequest as exc:
            return await respond_raw(send, exc.status, exc.body)
        self._learn(models)
        self.lora_name, self.policy_version = lora_name, policy_version
        await respond(send, 200, self._state())

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request on one of `ROUTED_PATHS` while an adapter answers for the model."""
        try:
            body = await read_body(receive)
        except BadRequest as exc:
            return await respond_raw(send, exc.status, exc.body)
        try:
            request = parse_object(body)
        except BadRequest:
            # The server has its own words for it.
            return await self.app(scope, replay(body, receive), send)
        model = request.get("model")
        if self.answers_for(model):
            lora_name = self.lora_name
            send = _with_policy_version(send, self.policy_version)
            body = json.dumps({**request, "model": lora_name}).encode()
            scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
            send = _RestoredModel(send, lora_name, model or self._base_models[0])
            model = lora_name
        with self.in_flight(model):
            await self.app(scope, replay(body, receive), send)

    def _learn(self, models: list[dict[str, Any]]) -> None:
        self._base_models = tuple(model["id"] for model in models if not model.get("parent"))

    def _state(self) -> dict[str, Any]:
        return {
            "lora_name": self.lora_name,
            "policy_version": self.policy_version,
            "num_in_flight": dict(self._num_in_flight),
        }

    async def _models(self, scope: Scope, receive: Receive) -> list[dict[str, Any]]:
        # The server's own answer to an authenticated route decides whether this caller may ask.
        status, body = await call(self.app, scope, receive, "GET", "/v1/models", None)
        if status >= 400:
            raise BadRequest(status, body)
        models: list[dict[str, Any]] = json.loads(body)["data"]
        return models


class _RestoredModel:
    """Sends an answer on, with the name that the client asked for in the place of the adapter's.

    Exact without parsing: inside of a JSON string the quotes of the pattern would be escaped. A stream is not held back;
    vLLM sends each of its events whole.
    """

    def __init__(self, send: Send, lora_name: str | None, model: str):
        self._send = send
        self._shown = _member(lora_name)
        self._asked = _member(model)
        self._start: Message | None = None
        self._chunks: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not _is_stream(message):
            self._start = message
        elif message["type"] == "http.response.body" and self._start is not None:
            self._chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                await self._send_whole(self._start)
        elif message["type"] == "http.response.body":
            await self._send({**message, "body": self._restored(message.get("body", b""))})
        else:
            await self._send(message)

    async def _send_whole(self, start: Message) -> None:
        body = self._restored(b"".join(self._chunks))
        await self._send({**start, "headers": _with_length(start["headers"], len(body))})
        await self._send({"type": "http.response.body", "body": body})

    def _restored(self, body: bytes) -> bytes:
        return body.replace(self._shown, self._asked)


def _with_policy_version(send: Send, policy_version: int | None) -> Send:
    """Name the version of the adapter that answers in the head of the answer: the label of the weights is another one."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            header = (POLICY_VERSION_HEADER.encode(), str(policy_version).encode())
            message = {**message, "headers": [*message.get("headers", []), header]}
        await send(message)

    return named


def _member(model: str | None) -> bytes:
    return b'"model":' + json.dumps(model, ensure_ascii=False).encode()


def _is_stream(start: Message) -> bool:
    types = [value for name, value in start.get("headers", []) if name.lower() == b"content-type"]
    return any(value.startswith(b"text/event-stream") for value in types)


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


def _checked(request: dict[str, Any]) -> tuple[str | None, int]:
    if "lora_name" not in request or not (request["lora_name"] is None or isinstance(request["lora_name"], str)):
        raise BadRequest(400, error("`lora_name` must be the name of a loaded adapter, or null for the model itself."))
    version = request.get("policy_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise BadRequest(400, error("`policy_version` must be an integer, 0 or more."))
    return request["lora_name"], version
