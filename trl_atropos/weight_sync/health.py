"""Waiting for an inference server."""

from __future__ import annotations

import logging
import time

from ..errors import VLLMServerError, VLLMServerUnreachable, WeightSyncTimeout
from .http import KINDS, ServerSession


logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0
HEALTH_INTERVAL_S = 0.5
PROGRESS_INTERVAL_S = 10.0


def wait_for_answer(session: ServerSession, route: str, timeout_s: float, *, takes_refusals: bool = False) -> None:
    """Wait until a route answers 200, and log every ten seconds what it answers instead.

    `route` is one that a healthy server answers at any time, and `timeout_s` the longest wait in seconds; at least one
    request is sent. With `takes_refusals`, an answer with an error is one, too.

    Raises:
        [`VLLMServerError`]: if it answers with an error, with `takes_refusals`.
        [`WeightSyncTimeout`]: if it does not in time.
    """
    start = reported = time.monotonic()
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
        if now - reported >= PROGRESS_INTERVAL_S:
            reported = now
            logger.info(f"Waiting for {where}: {now - start:.0f} s ({state})")
        time.sleep(min(HEALTH_INTERVAL_S, max(start + timeout_s - now, 0.0)))
