"""Which kind of server stands behind a URL: the server is asked, nobody configures it."""

from __future__ import annotations

import time

from ..errors import PreflightError, VLLMServerError
from .client import AtroposVLLMClient
from .health import HEALTH_INTERVAL_S, wait_for_answer
from .http import SGLANG, UNKNOWN, VLLM, ServerSession
from .inference_server import InferenceServer
from .sglang import AtroposSGLangClient


CLIENTS: dict[str, type[AtroposVLLMClient] | type[AtroposSGLangClient]] = {
    VLLM: AtroposVLLMClient,
    SGLANG: AtroposSGLangClient,
}

ROUTES = {SGLANG: "/model_info", VLLM: "/version"}
"""A route of each kind that the others do not have, and that answers also while generation is paused."""

STARTING = (502, 503, 504)
"""What a proxy answers for a server that is not up yet, and a server that still loads."""


def connect_server(
    base_url: str,
    *,
    connection_timeout: float = 240.0,
    request_timeout: float = 300.0,
    api_key: str | None = None,
) -> InferenceServer:
    """Make the client of an inference server, of the kind that it says it is.

    Args:
        base_url (`str`):
            Root of the server, for example `"http://127.0.0.1:8000"`.
        connection_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server to be healthy.
        request_timeout (`float`, *optional*, defaults to `300.0`):
            Deadline in seconds of every single request.
        api_key (`str`, *optional*):
            Sent as `Authorization: Bearer`.

    Returns:
        [`InferenceServer`]: an [`AtroposVLLMClient`] or an [`AtroposSGLangClient`].

    Raises:
        [`PreflightError`]: if the URL or the key cannot be sent, or what answers is neither vLLM nor SGLang.
        [`WeightSyncTimeout`]: if the server is not healthy in time.
    """
    start = time.monotonic()
    root = base_url.rstrip("/").removesuffix("/v1")
    with ServerSession(root, request_timeout, api_key, kind=UNKNOWN) as session:
        kind = find_kind(session, connection_timeout)
    remaining = max(connection_timeout - (time.monotonic() - start), HEALTH_INTERVAL_S)
    return CLIENTS[kind](root, connection_timeout=remaining, request_timeout=request_timeout, api_key=api_key)


def find_kind(session: ServerSession, timeout_s: float) -> str:
    """Ask a server which kind it is, a key of `CLIENTS`; it is waited for at most `timeout_s` seconds.

    Raises:
        [`PreflightError`]: if it is of none.
        [`WeightSyncTimeout`]: if it does not answer in time.
    """
    start = time.monotonic()
    while True:
        answers: dict[str, int] = {}
        for kind, route in ROUTES.items():
            remaining = max(start + timeout_s - time.monotonic(), 0.0)
            status = _status_of(session, route, remaining)
            if status == 200:
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
