"""The trajectory API as an ASGI application: atroposlib 0.4.0's routes, and `/acknowledge`, `/healthz` and `/metrics`."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from isal import isal_zlib as zlib

from .http import (
    API_HEADER,
    Answer,
    ClientGone,
    Headers,
    Message,
    Receive,
    Request,
    Send,
    has_key,
    json_answer,
    refusal_answer,
    text_answer,
)
from .messages import NO_EXAMPLE, UNREGISTERED, EnvironmentId, EnvironmentRegistration, Receipt, Registration
from .metrics import render_metrics
from .options import ApiOptions
from .packing import QueuedGroup
from .refusals import ApiDatabaseError, RequestRefused
from .scored_data import ReceivedGroup, completed_parts, digest_of, inflate, inflated_parts, read_group, read_groups
from .service import TrajectoryService
from .store import Lease, Store, StoredBody


logger = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Answer | None]]

NUM_READERS = 2
"""Threads that unpack and check posts. More would only wait for the interpreter."""

PARSING = threading.Lock()
"""JSON is parsed without letting go of the interpreter, some 1.5 ms a megabyte. Two readers that did so at once would make `/status`
wait for both.
"""

MAX_BYTES_IN_MEMORY = 64 * 2**20
"""Bodies of posts that are read and checked at once; further ones wait."""

MAX_SMALL_BODY_BYTES = 64 * 2**10
"""Of a request that is no post of groups."""

CLEAN_UP_INTERVAL_S = 60.0


class TrajectoryApp:
    """The application. It opens the database when the server starts it and closes it when the server ends it.

    `service` is None outside of that.

    Raises:
        ApiDatabaseError: The database cannot be used.
    """

    def __init__(self, options: ApiOptions):
        self.options = options
        self.service: TrajectoryService | None = None
        self._store = Store(options.db)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="reader")
        self._bodies = ThreadPoolExecutor(1, thread_name_prefix="bodies")
        self._num_bytes_in_memory = 0
        self._memory = asyncio.Condition()
        self._routes: dict[str, tuple[str, Handler]] = {
            "/": ("GET", self._root),
            "/register": ("POST", self._register),
            "/register-env": ("POST", self._register_environment),
            "/disconnect-env": ("POST", self._disconnect_environment),
            "/wandb_info": ("GET", self._wandb_info),
            "/info": ("GET", self._info),
            "/batch": ("GET", self._batch),
            "/acknowledge": ("POST", self._acknowledge),
            "/latest_example": ("GET", self._latest_example),
            "/scored_data": ("POST", self._scored_data),
            "/scored_data_list": ("POST", self._scored_data),
            "/status": ("GET", self._status),
            "/status-env": ("GET", self._environment_status),
            "/reset_data": ("GET", self._reset_data),
            "/healthz": ("GET", self._healthz),
            "/metrics": ("GET", self._metrics),
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or start and end with the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            request = Request(scope, receive, send, [API_HEADER])
            try:
                await self._answer(request)
            finally:
                await request.close()

    def close(self) -> None:
        """Finish what was begun and close the database."""
        self._readers.shutdown()
        self._bodies.shutdown()
        self._store.close()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await asyncio.wrap_future(self._store.count_start())
        except ApiDatabaseError as exc:
            # A full disk must not keep trainers from fetching, which frees it.
            logger.error("event=database_failed error=%r", str(exc))
        self.service = TrajectoryService(self._store, self.options)
        cleaning = asyncio.create_task(self._clean_up())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        cleaning.cancel()
        self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _clean_up(self) -> None:
        while True:
            await asyncio.sleep(CLEAN_UP_INTERVAL_S)
            try:
                await self._state.forget_posts()
            except ApiDatabaseError as exc:
                logger.error("event=database_failed error=%r", str(exc))

    @property
    def _state(self) -> TrajectoryService:
        assert self.service is not None, "the server sends no request before it has started the application"
        return self.service

    async def _answer(self, request: Request) -> None:
        try:
            answer = await self._handle(request)
        except RequestRefused as exc:
            if exc.status_code != 503 and request.path.startswith("/scored_data"):
                self._state.counts.num_posts_refused += 1
                logger.warning("event=post_refused status=%d error=%r", exc.status_code, str(exc))
            answer = refusal_answer(exc)
        except ApiDatabaseError as exc:
            self._state.counts.num_requests_failed += 1
            logger.error("event=database_failed path=%s error=%r", request.path, str(exc))
            if request.has_begun_to_answer:
                raise
            answer = json_answer({"detail": str(exc)}, 503, [(b"retry-after", b"10")])
        except ClientGone:
            return
        if answer is not None:
            await answer.send(request)

    async def _handle(self, request: Request) -> Answer | None:
        if self.options.api_key is not None and not has_key(request, self.options.api_key):
            return json_answer({"detail": "This API asks for its key."}, 401, [(b"www-authenticate", b"Basic")])
        if request.is_from_another_site:
            return json_answer({"detail": "Requests of web pages are not answered."}, 403)
        path = request.path
        if path not in self._routes and path.endswith("/") and path.rstrip("/") in self._routes:
            return Answer(b"", 307, headers=[(b"location", path.rstrip("/").encode())])
        method, handler = self._routes.get(path, ("", None))
        if handler is None:
            return json_answer({"detail": "Not Found"}, 404)
        if request.method != method:
            return json_answer({"detail": "Method Not Allowed"}, 405, [(b"allow", method.encode())])
        return await handler(request)

    async def _root(self, request: Request) -> Answer:
        return json_answer({"message": "AtroposLib API"})

    async def _register(self, request: Request) -> Answer:
        return json_answer(await self._state.register(await self._read(request, Registration)))

    async def _register_environment(self, request: Request) -> Answer:
        return json_answer(await self._state.register_environment(await self._read(request, EnvironmentRegistration)))

    async def _disconnect_environment(self, request: Request) -> Answer:
        return json_answer(await self._state.disconnect_environment(await self._read(request, EnvironmentId)))

    async def _wandb_info(self, request: Request) -> Answer:
        return json_answer(self._state.wandb_info())

    async def _info(self, request: Request) -> Answer:
        return json_answer(self._state.info())

    async def _status(self, request: Request) -> Answer:
        return json_answer(self._state.status())

    async def _environment_status(self, request: Request) -> Answer:
        env_id = (await self._read(request, EnvironmentId)).env_id
        return json_answer(await self._state.environment_status(env_id))

    async def _reset_data(self, request: Request) -> Answer:
        await self._state.reset()
        return text_answer("Reset successful")

    async def _acknowledge(self, request: Request) -> Answer:
        return json_answer(await self._state.acknowledge(await self._read(request, Receipt)))

    async def _healthz(self, request: Request) -> Answer:
        failure = self._state.failure
        status = "ok" if failure is None else "failing"
        value = {"status": status, "pid": os.getpid(), "database": str(self.options.db), "error": failure}
        return json_answer(value, 200 if failure is None else 503)

    async def _metrics(self, request: Request) -> Answer:
        return Answer(render_metrics(self._state).encode(), media_type=b"text/plain; version=0.0.4; charset=utf-8")

    async def _latest_example(self, request: Request) -> Answer:
        text = await self._on(self._bodies, self._latest_text)
        return json_answer(NO_EXAMPLE) if text is None else Answer(text)

    def _latest_text(self) -> bytes | None:
        latest = self._state.latest
        stored = None if latest is None else self._state.read_body(latest)
        return None if latest is None or stored is None else b"".join(self._text_parts(latest, stored))

    async def _scored_data(self, request: Request) -> None:
        state, options = self._state, self.options
        is_list = request.path == "/scored_data_list"
        length = request.content_length(options.max_body_bytes)
        await state.wait_for_room(length)
        # A body that is sent in chunks does not say how long it is.
        reserved = length or options.max_body_bytes
        await self._reserve(reserved)
        try:
            body = await request.body(options.max_body_bytes)
            request.watch_client()
            groups, digest = await self._on(
                self._readers, read_post, body, request.is_gzipped, is_list, options.max_unpacked_bytes
            )
            del body
            answer, post = await state.post(groups, digest, is_list, lambda: request.has_client_gone)
        finally:
            await self._release(reserved)
        has_arrived = await request.is_client_there()
        await json_answer(answer).send(request)
        state.answered(post, has_arrived)

    async def _batch(self, request: Request) -> Answer | None:
        trainer, number = _trainer_of(request)
        await request.body(MAX_SMALL_BODY_BYTES)
        request.watch_client()
        if self._state.registration is None:
            return json_answer(UNREGISTERED)
        lease = await self._state.take_batch(trainer, number)
        if lease is None:
            return json_answer({"batch": None})
        if trainer is not None:
            await self._send_batch(request, lease)
            return None
        has_arrived = False
        try:
            has_arrived = await self._send_batch(request, lease)
        finally:
            if has_arrived:
                await self._state.arrived(lease)
            else:
                await self._state.not_arrived(lease)
        return None

    async def _send_batch(self, request: Request, lease: Lease) -> bool:
        """Send a batch; return whether the client was there to the end."""
        headers: Headers = [(b"content-type", b"application/json"), (b"vary", b"Accept-Encoding")]
        if request.accepts_gzip:
            headers.append((b"content-encoding", b"gzip"))
        if not request.accepts_gzip:
            parts = self._plain_parts(lease)
        elif lease.trainer is not None:
            parts = self._stored_parts(lease)
        else:
            parts = self._compressed_parts(lease)
        # A group that is gone is said before the answer begins.
        part = await self._on(self._bodies, next, parts, None)
        await request.begin_answer(200, headers)
        while part is not None:
            await request.send_part(part)
            if not await request.is_client_there():
                return False
            part = await self._on(self._bodies, next, parts, None)
        if not await request.is_client_there():
            return False
        await request.send_part(b"", is_last=True)
        return True

    # Generators of one thread, so that the event loop never holds more of a batch than one part.

    def _plain_parts(self, lease: Lease) -> Iterator[bytes]:
        for index, group in enumerate(lease.groups):
            yield b"," if index else b'{"batch":['
            yield from self._text_parts(group, self._stored(group))
        yield b"]}"

    def _compressed_parts(self, lease: Lease) -> Iterator[bytes]:
        compressor = zlib.compressobj(1, wbits=31)
        for part in self._plain_parts(lease):
            yield compressor.compress(part)
        yield compressor.flush()

    def _stored_parts(self, lease: Lease) -> Iterator[bytes]:
        """The batch as a gzip file of several members, the groups as they came. Our client reads such files; of others one
        cannot know.
        """
        for index, group in enumerate(lease.groups):
            stored = self._stored(group)
            body = stored.body if stored.is_gzipped else _member(stored.body)
            yield _member(b"," if index else b'{"batch":[') + body
        yield _member(b"]}")

    def _text_parts(self, group: QueuedGroup, stored: StoredBody) -> Iterator[bytes]:
        """The JSON of a group with all fields that `ScoredData` has."""
        parts = inflated_parts(stored.body, self.options.max_unpacked_bytes) if stored.is_gzipped else [stored.body]
        return completed_parts(parts, group.missing)

    def _stored(self, group: QueuedGroup) -> StoredBody:
        stored = self._state.read_body(group)
        if stored is None:
            raise ApiDatabaseError(
                f"Group {group.id} is not in the database any more.",
                "The API was reset while a batch with it was sent.",
                "Ask for another batch.",
            )
        return stored

    async def _read(self, request: Request, kind: type[T]) -> T:
        """Read the body of a small request as an object of this kind.

        Raises:
            RequestRefused: It is none.
        """
        body = await request.body(MAX_SMALL_BODY_BYTES)
        if request.is_gzipped:
            body = inflate(body, MAX_SMALL_BODY_BYTES)
        try:
            # Not strict: atroposlib's API reads "16" and 16.0 as 16.
            return msgspec.json.decode(body, type=kind, strict=False)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise RequestRefused(
                f"The body of {request.path} cannot be read: {exc}.",
                f"It is a JSON object with {', '.join(kind.__annotations__)}.",
                "Send what atroposlib 0.4.0 sends.",
            ) from exc

    async def _reserve(self, num_bytes: int) -> None:
        """Wait until the bodies in memory leave room for one more."""
        async with self._memory:
            await self._memory.wait_for(
                lambda: not self._num_bytes_in_memory or self._num_bytes_in_memory + num_bytes <= MAX_BYTES_IN_MEMORY
            )
            self._num_bytes_in_memory += num_bytes

    async def _release(self, num_bytes: int) -> None:
        async with self._memory:
            self._num_bytes_in_memory -= num_bytes
            self._memory.notify_all()

    async def _on(self, threads: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


def read_post(
    body: bytes, is_gzipped: bool, is_list: bool, max_unpacked_bytes: int
) -> tuple[list[ReceivedGroup], bytes]:
    """Unpack and check a post; return its groups and the digest of its text.

    Raises:
        RequestRefused: It is too large, damaged, or holds what no trainer can use.
    """
    text = inflate(body, max_unpacked_bytes) if is_gzipped else body
    with PARSING:
        groups = read_groups(text) if is_list else [read_group(text, body if is_gzipped else None)]
    return groups, digest_of(text)


def _member(text: bytes) -> bytes:
    return zlib.compress(text, 1, wbits=31)


def _trainer_of(request: Request) -> tuple[str | None, int | None]:
    """How a trainer names itself and the batch that it asks for; None, None if it does not."""
    trainer, number = request.query.get("trainer"), request.query.get("number")
    if trainer is None and number is None:
        return None, None
    if not trainer or len(trainer) > 200 or number is None or not number.isdecimal() or len(number) > 18:
        raise RequestRefused(
            f"`trainer` is {str(trainer)[:50]!r} and `number` is {str(number)[:50]!r}.",
            "A trainer that gives receipts names itself, and the batch by its own count.",
            "Give both, as in /batch?trainer=NAME&number=0, or neither.",
        )
    return trainer, int(number)
