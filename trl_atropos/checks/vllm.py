"""Why an inference server gives environments no completions, or the trainer no way to publish: its traps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import PreflightError, VLLMServerError, WeightSyncError
from ..weight_sync.health import find_kind
from ..weight_sync.http import KINDS, SGLANG, VLLM, Answer, ServerSession
from ..weight_sync.transports.backends import MIDDLEWARE
from .finding import NOT_ASKED, Check, Unread, known


NO_LENGTH = Unread("The server does not say how long its sequences may be.")


class ServerLook(Protocol):
    """What both the doctor and a preflight see of an inference server: the facts of the traps that they share.

    The lengths are those of the longest sequence that the server generates and of the longest rollout that the trainer
    takes, in tokens.
    """

    @property
    def url(self) -> str:
        """Of the server."""

    @property
    def kind(self) -> str:
        """Which software it is."""

    @property
    def knows_policy_versions(self) -> bool | Unread:
        """Whether it remembers which policy sampled a rollout."""

    @property
    def max_model_len(self) -> int | Unread:
        """Of the server."""

    @property
    def max_length(self) -> int | Unread:
        """Of the trainer."""


@dataclass(frozen=True)
class InferenceServerFacts:
    """What a look at an inference server of some `kind` showed; `error` says why there is nothing else to know.

    `routes` are those of its OpenAPI document, and `has_middleware` is whether
    `serving.generate_endpoint.GenerateEndpoint` answers. `weight_version` names the weights that it serves:
    `"default"` before the first publish, None if it does not say. `is_paused` is whether generation was frozen all the
    time, which SGLang does not say. `max_model_len` is the longest sequence that it generates, and `max_length` the
    longest rollout that the trainer takes, both in tokens.
    """

    url: str
    error: str | None = None
    routes: frozenset[str] = frozenset()
    has_middleware: bool = False
    kind: str = VLLM
    weight_version: str | None = None
    is_paused: bool = False
    max_model_len: int | Unread = NO_LENGTH
    max_length: int | Unread = NOT_ASKED

    @property
    def knows_policy_versions(self) -> bool:
        """Whether the server remembers which policy sampled a rollout: its middleware does."""
        return self.has_middleware


def _vllm_without_dev_mode(facts: InferenceServerFacts) -> str | None:
    missing = sorted(KINDS[facts.kind].publish - facts.routes)
    return f"The {facts.kind} server at {facts.url} has no {', '.join(missing)}." if missing else None


def _vllm_without_generate(facts: InferenceServerFacts) -> str | None:
    if "/generate" in facts.routes or (facts.has_middleware and "/inference/v1/generate" in facts.routes):
        return None
    missing = "/inference/v1/generate" if facts.has_middleware else "/generate"
    return f"The {facts.kind} server at {facts.url} has no {missing}."


def _vllm_without_policy_versions(facts: ServerLook) -> str | None:
    # SGLang keeps nothing, but answers it, and what environments send on shows in their groups alone.
    if facts.kind == SGLANG or known(facts.knows_policy_versions):
        return None
    return (
        f"The {facts.kind} server at {facts.url} does not say which policy sampled a rollout: "
        "it has no /atropos/policy_versions."
    )


def _vllm_paused(facts: InferenceServerFacts) -> str | None:
    return f"Generation is frozen on the {facts.kind} server at {facts.url}." if facts.is_paused else None


def _vllm_exceeds_max_length(facts: ServerLook) -> str | None:
    if known(facts.max_model_len) <= known(facts.max_length):
        return None
    return f"The server generates up to {facts.max_model_len} tokens, the trainer takes up to {facts.max_length}."


WITHOUT_POLICY_VERSIONS: Check[ServerLook] = Check(
    "vllm_without_policy_versions",
    "warning",
    _vllm_without_policy_versions,
    "Staleness is unknown: old rollouts can neither be dropped nor counted.",
    f"Start it with `--middleware {MIDDLEWARE}`.",
    needs=("knows_policy_versions",),
    describe=lambda facts: (
        "SGLang answers which policy sampled each token; an environment under `trl-atropos env` sends it (shim policy_version)."
        if facts.kind == SGLANG
        else "The server remembers which policy sampled a rollout."
    ),
)
EXCEEDS_MAX_LENGTH: Check[ServerLook] = Check(
    "vllm_exceeds_max_length",
    "warning",
    _vllm_exceeds_max_length,
    "Environments drop a whole group if one rollout is longer, without telling the trainer.",
    "Raise `--max_length`, or start the server with a smaller `--max_model_len` (SGLang: `--context-length`).",
    needs=("max_length", "max_model_len"),
    describe=lambda facts: (
        f"max_model_len {facts.max_model_len} of the server, max_length {facts.max_length} (tokens)."
    ),
)

VLLM_CHECKS: tuple[Check[InferenceServerFacts], ...] = (
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
        "Start vLLM (0.32 or newer) with `trl vllm-serve`, or `VLLM_SERVER_DEV_MODE=1 vllm serve`; install SGLang 0.5.22 or "
        "newer.",
    ),
    Check(
        "vllm_without_generate",
        "error",
        _vllm_without_generate,
        "Environments with `server_type: vllm` ask it for token ids and logprobs, and get a 404 without it.",
        f"Start the server with `trl vllm-serve --middleware {MIDDLEWARE}`, a plain `vllm serve` with `--enable-scale-out` too.",
    ),
    WITHOUT_POLICY_VERSIONS,
    Check(
        "vllm_paused",
        "error",
        _vllm_paused,
        "A publish began and did not end; the environments' requests wait for it.",
        "If the trainer is gone, restart the server and train with `--resume_from_checkpoint`.",
    ),
    EXCEEDS_MAX_LENGTH,
)


def inspect_inference_server(
    session: ServerSession, *, watch_s: float = 0.0, max_length: int | None = None
) -> InferenceServerFacts:
    """Look at an inference server without changing it: GET requests only. One that does not answer has facts, too.

    The session is told which kind it talks to. `watch_s` are the seconds between the two looks at whether generation is
    frozen; a publish freezes it for a moment. `max_length` is the longest rollout that the trainer takes, in tokens; None
    if that is not known.
    """
    length = NOT_ASKED if max_length is None else max_length
    try:
        kind = find_kind(session, timeout_s=0.0)
        routes = frozenset(_get(session, "/openapi.json").get_typed("paths", dict))
        if kind == SGLANG:
            return InferenceServerFacts(
                session.base_url,
                routes=routes,
                kind=SGLANG,
                # Its `/health` would generate a token, which waits while a publish freezes generation.
                weight_version=_get(session, "/model_info").get_typed("weight_version", str),
                max_model_len=_max_model_len(_get(session, "/v1/models").get_typed("data", list)),
                max_length=length,
            )
        session.get(f"{session.base_url}/health")
        is_paused = "/is_paused" in routes and _get(session, "/is_paused").get_typed("is_paused", bool)
        if is_paused:
            time.sleep(watch_s)
            is_paused = _get(session, "/is_paused").get_typed("is_paused", bool)
        has_version = "/weight_info" in routes
        return InferenceServerFacts(
            session.base_url,
            routes=routes,
            has_middleware=_has_middleware(session),
            weight_version=_get(session, "/weight_info").get_typed("weight_version", str) if has_version else None,
            is_paused=is_paused,
            max_model_len=_max_model_len(_get(session, "/v1/models").get_typed("data", list)),
            max_length=length,
        )
    except (PreflightError, WeightSyncError) as exc:
        return InferenceServerFacts(session.base_url, error=exc.what)


def _get(session: ServerSession, path: str) -> Answer:
    return Answer(session.get(session.base_url + path), kind=session.kind)


def _has_middleware(session: ServerSession) -> bool:
    # Its other routes take POST only, and it stands before the routes that the OpenAPI document lists.
    try:
        session.get(f"{session.base_url}/atropos/adapter")
    except VLLMServerError as exc:
        if exc.status_code != 404:
            raise
        return False
    return True


def _max_model_len(models: list[Any]) -> int | Unread:
    lengths = [model.get("max_model_len") for model in models if isinstance(model, dict)]
    return max((length for length in lengths if isinstance(length, int)), default=NO_LENGTH)
