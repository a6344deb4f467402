"""Waiting for an inference server, and finding out which kind it is: the server is asked, nobody configures it."""

from __future__ import annotations

import logging
import time

from ..errors import PreflightError, VLLMServerError, VLLMServerUnreachable, WeightSyncTimeout
from ..progress import Reminder
from .http import KINDS, Answer, ServerSession


logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0
HEALTH_INTERVAL_S = 0.5

KNOWN_BY = {name: kind.known_by for name, kind in KINDS.items() if kind.known_by}
STARTING = (502, 503, 504)
"""What a proxy answers for a server that is not up yet, and a server that still loads."""


def wait_for_answer(session: ServerSession, route: str, timeout_s: float, *, takes_refusals: bool = False) -> None:
    """Wait until a route answers 200, and log every ten seconds what it answers instead.

    `route` is one that a healthy server answers at any time, and `timeout_s` the longest wait in seconds; at least one
    request is sent. With `takes_refusals`, an answer with an error is one, too.

    Raises:
        [`VLLMServerError`]: if it answers with an error, with `takes_refusals`.
        [`WeightSyncTimeout`]: if it does not in time.
    """
    reminder = Reminder()
    start = reminder.start
    while True:
        remaining = start + timeout_s - time.monotonic()
        try:
            session.get(f"{session.base_url}{route}", timeout=min(HEALTH_TIMEOUT_S, max(remaining, 1.0)))
            return
        except VLLMServerError as exc:
            if takes_refusals:
                raise
            state = f"{route} answers {exc.status_code}"
        except VLLMServerUnreachable:
            state = "no connection"
        except WeightSyncTimeout:
            state = f"{route} does not answer"
        now = time.monotonic()
        where = f"the {session.kind} server at {session.base_url}"
        if now - start >= timeout_s:
            raise WeightSyncTimeout(
                f"T{where[1:]} is not healthy after {timeout_s:.0f} s ({state}).",
                "The trainer publishes every policy to it and cannot go on without it.",
                f"Start it with `{KINDS[session.kind].command}`, correct --vllm_server_base_url, or raise "
                "--vllm_server_timeout.",
            )
        if reminder.is_due():
            logger.info(f"Waiting for {where}: {now - start:.0f} s ({state})")
        time.sleep(min(HEALTH_INTERVAL_S, max(start + timeout_s - now, 0.0)))


def find_kind(session: ServerSession, timeout_s: float) -> str:
    """Ask a server which kind it is, a key of `KNOWN_BY`, and tell its session; at most `timeout_s` seconds are waited.

    Raises:
        [`PreflightError`]: if it is of none.
        [`WeightSyncTimeout`]: if it does not answer in time.
    """
    start = time.monotonic()
    while True:
        answers: dict[str, int] = {}
        for kind, route in KNOWN_BY.items():
            remaining = max(start + timeout_s - time.monotonic(), 0.0)
            status = _status_of(session, route, remaining)
            if status == 200:
                session.kind = kind
                return kind
            answers[route] = status
        if not any(status in STARTING for status in answers.values()) or time.monotonic() - start >= timeout_s:
            break
        time.sleep(HEALTH_INTERVAL_S)
    said = ", ".join(f"{route} with {status}" for route, status in answers.items())
    raise PreflightError(
        f"What answers at {session.base_url} is neither a vLLM nor an SGLang server: it answers {said}.",
        "Policies can be published to these two.",
        "Correct --vllm_server_base_url: it names the server (`trl vllm-serve`, `python -m sglang.launch_server`) and not "
        "the Atropos API or a proxy that hides these routes.",
    )


def _status_of(session: ServerSession, route: str, timeout_s: float) -> int:
    """The status of a route, of a server that answers within a time at all."""
    try:
        wait_for_answer(session, route, timeout_s, takes_refusals=True)
    except VLLMServerError as exc:
        if exc.status_code in (401, 403):
            raise
        return exc.status_code
    return 200


def read_weight_version(session: ServerSession) -> str:
    """The name of the weights that a server of any kind serves; `"default"` before the first publish.

    Raises:
        [`PreflightError`], [`WeightSyncError`]: as [`find_kind`] and a request do.
    """
    route = KINDS[find_kind(session, timeout_s=0.0)].weight_version
    return Answer(session.get(session.base_url + route), kind=session.kind).get_typed("weight_version", str)
