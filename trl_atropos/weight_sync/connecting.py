"""The client of an inference server, of the kind that it says it is."""

from __future__ import annotations

import time

from .client import AtroposVLLMClient
from .health import HEALTH_INTERVAL_S, find_kind
from .http import SGLANG, UNKNOWN, VLLM, ServerSession
from .inference_server import InferenceServer
from .sglang import AtroposSGLangClient


CLIENTS: dict[str, type[AtroposVLLMClient] | type[AtroposSGLangClient]] = {
    VLLM: AtroposVLLMClient,
    SGLANG: AtroposSGLangClient,
}


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
