"""The routes of whoever runs agents in another language: open a session, reward it, end it; and the counts."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..api.http import (
    Answer,
    ClientGone,
    Message,
    Receive,
    Request,
    Send,
    has_key,
    json_answer,
    text_answer,
)
from ..api.refusals import RequestRefused
from ..errors import EpisodeError
from .app import NOT_FOUND, refusal
from .counts import render_metrics
from .gateway import Gateway, GatewaySession, check_finished, finished
from .groups import FinishedSession, GroupMaker
from .posting import GroupPoster
from .sessions import Session


logger = logging.getLogger(__name__)

MAX_CONTROL_BYTES = 64 * 2**10
CONTROL_PATH = re.compile(r"/session/([\w-]+)/(reward|finish|discard)")


@dataclass
class TaskGroup:
    """The sessions of one task. A session that is given up leaves its place to another one.

    `open` are those that run, `finished` those that have ended with a reward; `last_used_at` is the monotonic time of the last
    change, in seconds.
    """

    open: list[Session] = field(default_factory=list)
    finished: list[FinishedSession] = field(default_factory=list)
    last_used_at: float = field(default_factory=time.monotonic)

    @property
    def num_taken(self) -> int:
        """Places that are not free. Sessions that idled for too long are open no more."""
        self.open = [session for session in self.open if session.is_open]
        return len(self.open) + len(self.finished)


class ControlApp:
    """An ASGI application: the control routes with their key, and what agents reach.

    - `POST /session {"group": str}` gives `{"session_id": str, "base_url": str, "anthropic_base_url": str}`. The sessions of
      a group attempt the same task; `group_size` of them, finished, are posted.
    - `POST /session/ID/reward {"reward": float, "turn": int | str}` sets the reward of the session, or with `turn` that of one
      turn, by its index or the id of its answer; a later one takes its place.
    - `POST /session/ID/finish {"reward": float}` ends the session; the reward can have been set before.
    - `POST /session/ID/discard` gives it up.
    - `GET /status`, `GET /metrics`; `GET /healthz` without the key.

    Args:
        gateway ([`Gateway`]):
            Where sessions are.
        poster ([`GroupPoster`]):
            Takes the groups.
        maker ([`GroupMaker`]):
            Makes them.
        key (`str`):
            The key of the control routes. Agents do not have it, so that they cannot reward themselves.
    """

    def __init__(self, gateway: Gateway, poster: GroupPoster, maker: GroupMaker, key: str):
        self.gateway = gateway
        self.poster = poster
        self.maker = maker
        self.key = key
        self._groups: dict[str, TaskGroup] = {}
        self._group_names: dict[str, str] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive, send)
        handler = self._handler_of(request)
        try:
            if handler is None:
                await self.gateway.app.answer(request)
            else:
                await (await self._controlled(request, handler)).send(request)
        except ClientGone:
            return
        finally:
            await request.close()

    def _handler_of(self, request: Request) -> Callable[[Request], Awaitable[Answer]] | None:
        routes = {
            ("POST", "/session"): self._begin,
            ("GET", "/status"): self._status,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/healthz"): self._healthz,
        }
        if request.method == "POST" and CONTROL_PATH.fullmatch(request.path):
            return self._change
        return routes.get((request.method, request.path))

    async def _controlled(self, request: Request, handler: Callable[[Request], Awaitable[Answer]]) -> Answer:
        if request.is_from_another_site:
            return json_answer(NOT_FOUND, 404)
        if handler != self._healthz and not has_key(request, self.key):
            return json_answer({"detail": "This route asks for the gateway's key."}, 401)
        try:
            return await handler(request)
        except RequestRefused as exc:
            return refusal(exc)
        except EpisodeError as exc:
            return refusal(RequestRefused(exc.what, exc.why, exc.fix))

    async def _begin(self, request: Request) -> Answer:
        name = (await _read(request)).get("group")
        if not isinstance(name, str) or not name:
            raise RequestRefused(
                f"`group` is {name!r}.",
                "Rewards are compared among the sessions of one task, which share the name of a group.",
                'Send {"group": "NAME"}, the same for all sessions of a task.',
                field="group",
            )
        self._forget_idle()
        group = self._groups.setdefault(name, TaskGroup())
        if group.num_taken >= self.maker.group_size:
            raise RequestRefused(
                f"The group {name!r} has its {self.maker.group_size} sessions.",
                "A group has no more sessions than --group_size.",
                "Name another group for another task, or discard a session that failed.",
                status_code=409,
                field="group",
            )
        session = self.gateway.sessions.begin()
        group.open.append(session)
        group.last_used_at = time.monotonic()
        self._group_names = {**self._names_of_open(), session.id: name}
        # As the caller reaches the gateway, which may listen on all addresses or stand behind a tunnel.
        host = request.header("host")
        shown = GatewaySession(session, f"http://{host}" if host else self.gateway.address)
        urls = {"base_url": shown.base_url, "anthropic_base_url": shown.anthropic_base_url}
        return json_answer({"session_id": session.id, **urls}, 201)

    def _forget_idle(self) -> None:
        """Give up groups that nobody goes on with: their sessions are in memory."""
        before = time.monotonic() - self.gateway.options.idle_s
        for name, group in list(self._groups.items()):
            if group.num_taken == len(group.finished) and group.last_used_at < before:
                logger.warning("event=group_idle name=%r num_finished=%d", name, len(group.finished))
                self.gateway.counts.num_groups_lost += 1
                del self._groups[name]

    def _names_of_open(self) -> dict[str, str]:
        return {key: name for key, name in self._group_names.items() if self.gateway.sessions.find(key) is not None}

    async def _change(self, request: Request) -> Answer:
        """Reward, finish or discard a session."""
        found = CONTROL_PATH.fullmatch(request.path)
        assert found is not None, "the route was chosen by this pattern"
        session = self.gateway.sessions.find(found[1])
        values = await _read(request)
        if session is None:
            raise RequestRefused(
                f"There is no open session {found[1]!r}.",
                "It was finished, discarded, or given up after --idle_s seconds without a request; or it never was.",
                "Give rewards before the session is finished.",
                status_code=404,
            )
        turn = values.get("turn")
        if values.get("reward") is not None or turn is not None:
            session.give_reward(values.get("reward"), turn)
        if found[2] == "reward":
            return json_answer({"reward": session.reward if turn is None else values["reward"]})
        if found[2] == "discard":
            self.gateway.counts.num_sessions_discarded += 1
            self.gateway.sessions.end(session)
            return json_answer({"status": "discarded"})
        return json_answer(await self._finish(session))

    async def _finish(self, session: Session) -> dict[str, Any]:
        check_finished(session)
        self.gateway.sessions.end(session)
        name = self._group_names.pop(session.id)
        group = self._groups[name]
        group.finished.append(finished(session))
        group.last_used_at = time.monotonic()
        is_whole = len(group.finished) == self.maker.group_size
        if is_whole:
            del self._groups[name]
            for made in self.maker.add(group.finished):
                await self.poster.put(made)
        return {"status": "finished", "num_finished": len(group.finished), "is_group_whole": is_whole}

    async def _status(self, _request: Request) -> Answer:
        return json_answer(self._values())

    async def _metrics(self, _request: Request) -> Answer:
        return text_answer(render_metrics(self._values()))

    async def _healthz(self, _request: Request) -> Answer:
        return json_answer({"status": "ok"})

    def _values(self) -> dict[str, Any]:
        return {
            **self.gateway.status(),
            "num_open_groups": len(self._groups),
            "num_waiting_groups": self.poster.num_waiting_groups,
            "num_waiting_rollouts": self.maker.num_waiting_rollouts,
        }


async def _read(request: Request) -> dict[str, Any]:
    body = await request.body(MAX_CONTROL_BYTES)
    try:
        return msgspec.json.decode(body or b"{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise RequestRefused(
            f"The body of {request.path} cannot be read: {exc}.",
            "It is a JSON object.",
            "Send what docs/agents.md shows.",
        ) from exc
