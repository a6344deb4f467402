"""Why a vLLM server gives environments no completions, or the trainer no way to publish: its traps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ..errors import VLLMServerError, WeightSyncError
from ..weight_sync.http import Answer, ServerSession
from .finding import Check


@dataclass(frozen=True)
class VLLMFacts:
    """What a look at a vLLM server showed.

    Args:
        url (`str`):
            Of the server.
        error (`str`, *optional*):
            Why there is nothing else to know.
        routes (`frozenset[str]`, *optional*):
            What its OpenAPI document lists.
        has_middleware (`bool`, *optional*, defaults to `False`):
            Whether [`~serving.generate_endpoint.GenerateEndpoint`] answers.
        weight_version (`str`, *optional*):
            Name of the weights that it serves; `"default"` before the first publish. None: it does not say.
        is_paused (`bool`, *optional*, defaults to `False`):
            Whether generation was frozen all the time.
        max_model_len (`int`, *optional*):
            Longest sequence that it generates, in tokens. None: it does not say.
        max_length (`int`, *optional*):
            Longest rollout that the trainer takes, in tokens. None: not known.
    """

    url: str
    error: str | None = None
    routes: frozenset[str] = frozenset()
    has_middleware: bool = False
    weight_version: str | None = None
    is_paused: bool = False
    max_model_len: int | None = None
    max_length: int | None = None


DEV_MODE_ROUTES = {
    "/pause",
    "/resume",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/weight_info",
}
_MIDDLEWARE = "--middleware trl_atropos.serving.generate_endpoint.GenerateEndpoint"


def _vllm_without_dev_mode(facts: VLLMFacts) -> str | None:
    missing = sorted(DEV_MODE_ROUTES - facts.routes)
    return f"The vLLM server at {facts.url} has no {', '.join(missing)}." if missing else None


def _vllm_without_generate(facts: VLLMFacts) -> str | None:
    if "/generate" in facts.routes or (facts.has_middleware and "/inference/v1/generate" in facts.routes):
        return None
    missing = "/inference/v1/generate" if facts.has_middleware else "/generate"
    return f"The vLLM server at {facts.url} has no {missing}."


def _vllm_without_policy_versions(facts: VLLMFacts) -> str | None:
    return None if facts.has_middleware else f"The vLLM server at {facts.url} has no /atropos/policy_versions."


def _vllm_paused(facts: VLLMFacts) -> str | None:
    return f"Generation is frozen on the vLLM server at {facts.url}." if facts.is_paused else None


def _vllm_exceeds_max_length(facts: VLLMFacts) -> str | None:
    if facts.max_length is None or facts.max_model_len is None or facts.max_model_len <= facts.max_length:
        return None
    return f"The server generates up to {facts.max_model_len} tokens, the trainer takes up to {facts.max_length}."


VLLM_CHECKS: tuple[Check[VLLMFacts], ...] = (
    Check(
        "vllm_unreachable",
        "error",
        lambda facts: facts.error,
        "Environments get no completions, and the trainer cannot publish.",
        "Start it with `trl vllm-serve`, correct --vllm-url, or put its key into VLLM_API_KEY.",
        hides_others=True,
    ),
    Check(
        "vllm_without_dev_mode",
        "error",
        _vllm_without_dev_mode,
        "Publishing a policy needs it.",
        "Start the server with `trl vllm-serve` (vLLM 0.32 or newer), or `VLLM_SERVER_DEV_MODE=1 vllm serve`.",
    ),
    Check(
        "vllm_without_generate",
        "error",
        _vllm_without_generate,
        "Environments with `server_type: vllm` ask it for token ids and logprobs, and get a 404 without it.",
        f"Start the server with `trl vllm-serve {_MIDDLEWARE}`, a plain `vllm serve` with `--enable-scale-out` too.",
    ),
    Check(
        "vllm_without_policy_versions",
        "warning",
        _vllm_without_policy_versions,
        "Nobody remembers which policy sampled a rollout, so staleness is only bounded.",
        f"Start the server with `{_MIDDLEWARE}`.",
    ),
    Check(
        "vllm_paused",
        "error",
        _vllm_paused,
        "A publish began and did not end; the environments' requests wait for it.",
        "If the trainer is gone, restart the server and train with `--resume_from_checkpoint`.",
    ),
    Check(
        "vllm_exceeds_max_length",
        "warning",
        _vllm_exceeds_max_length,
        "Environments drop a whole group if one rollout is longer, without telling the trainer.",
        "Raise `--max_length`, or start the server with a smaller `--max_model_len`.",
    ),
)


def inspect_vllm(session: ServerSession, *, watch_s: float = 0.0, max_length: int | None = None) -> VLLMFacts:
    """Look at a vLLM server without changing it: GET requests only.

    Args:
        session ([`~weight_sync.http.ServerSession`]):
            With the server.
        watch_s (`float`, *optional*, defaults to `0.0`):
            Seconds between the two looks at whether generation is frozen; a publish freezes it for a moment.
        max_length (`int`, *optional*):
            See [`VLLMFacts`].

    Returns:
        [`VLLMFacts`]: also if the server does not answer.
    """
    try:
        session.get(f"{session.base_url}/health")
        routes = frozenset(_get(session, "/openapi.json").get_typed("paths", dict))
        is_paused = "/is_paused" in routes and _get(session, "/is_paused").get_typed("is_paused", bool)
        if is_paused:
            time.sleep(watch_s)
            is_paused = _get(session, "/is_paused").get_typed("is_paused", bool)
        has_version = "/weight_info" in routes
        return VLLMFacts(
            session.base_url,
            routes=routes,
            has_middleware=_has_middleware(session),
            weight_version=_get(session, "/weight_info").get_typed("weight_version", str) if has_version else None,
            is_paused=is_paused,
            max_model_len=_max_model_len(_get(session, "/v1/models").get_typed("data", list)),
            max_length=max_length,
        )
    except WeightSyncError as exc:
        return VLLMFacts(session.base_url, error=exc.what)


def _get(session: ServerSession, path: str) -> Answer:
    return Answer(session.get(session.base_url + path))


def _has_middleware(session: ServerSession) -> bool:
    # Its other routes take POST only, and it stands before the routes that the OpenAPI document lists.
    try:
        session.get(f"{session.base_url}/atropos/adapter")
    except VLLMServerError as exc:
        if exc.status_code != 404:
            raise
        return False
    return True


def _max_model_len(models: list[Any]) -> int | None:
    lengths = [model.get("max_model_len") for model in models if isinstance(model, dict)]
    return max((length for length in lengths if isinstance(length, int)), default=None)
