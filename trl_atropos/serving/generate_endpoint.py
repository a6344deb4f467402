"""Atropos' `POST /generate` on a stock vLLM server, as ASGI middleware.

    trl vllm-serve --model M --middleware trl_atropos.serving.generate_endpoint.GenerateEndpoint

Environments with `server_type: vllm` send the request that vLLM's demo server once took and read exact token ids and
logprobs from its answer; stock vLLM has no such route. The middleware rewrites the request for vLLM's own token-in
token-out route, `/inference/v1/generate` (present with `--enable-scale-out`, which `trl vllm-serve` sets), calls it
inside the process, and rewrites the answer. Authentication, cancellation and limits stay those of the server, because
the inner call passes through all of the server's own middleware.

Routes:

- `POST /generate`: `{"prompt": {"prompt_token_ids": [int]} | str, <any field of vLLM's SamplingParams>}` gives
  `{"logprobs": [[[{"<token id>": logprob}], ...], ...], "finish_reasons": [str, ...]}`, one entry per completion, and
  `"prompt_logprobs": [null, {"<token id>": logprob, ...}, ...]` when the request asks for it.
- `POST /atropos/policy_versions`: `{"rollout_keys": [str]}` gives `{"policy_versions": [int | null]}`: under which
  policy the sequences were sampled that passed through `/generate` (see `rollout_key`).

Everything else reaches the server untouched.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from typing import Any

from ..rollout_key import rollout_key


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

NEUTRAL_SAMPLING_PARAMS: dict[str, Any] = {
    "n": 1,
    "max_tokens": 16,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Sent where the request is silent, so that the model's generation_config.json cannot bias the importance ratio."""

FINAL_ONLY = 2
"""vLLM's RequestOutputKind.FINAL_ONLY: with n > 1 the other kinds answer with partial completions."""

MAX_REMEMBERED_ROLLOUTS = 65536
"""Bound of the version table: about 10 MB, and far more rollouts than any queue between server and trainer holds."""


class GenerateEndpoint:
    """ASGI middleware that answers `/generate` and `/atropos/policy_versions`.

    Args:
        app (`ASGIApp`):
            The vLLM server.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.policy_versions: OrderedDict[str, int] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
            if path == "/generate":
                return await self._generate(scope, receive, send)
            if path == "/atropos/policy_versions":
                return await self._policy_versions(scope, receive, send)
        await self.app(scope, receive, send)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = _parse_object(await _read_body(receive))
            prompt = request.pop("prompt", None)
            token_ids = await self._prompt_token_ids(prompt, scope, receive)
        except _BadRequest as exc:
            return await _respond_raw(send, exc.status, exc.body)
        if request.pop("stream", False):
            return await _respond_raw(
                send, 400, _error("`stream` is not supported on /generate: send `stream: false`.")
            )
        unknown = sorted(set(request) - _sampling_params_fields())
        if unknown:
            return await _respond_raw(
                send, 400, _error(f"Not a sampling parameter of this vLLM: {', '.join(unknown)}.")
            )
        if request.get("logprobs") is None:
            request["logprobs"] = 0
        inner = {
            "token_ids": token_ids,
            "sampling_params": {**NEUTRAL_SAMPLING_PARAMS, **request, "output_kind": FINAL_ONLY},
            "stream": False,
        }
        status, body = await self._call(scope, receive, "POST", "/inference/v1/generate", inner)
        if status == 404:
            return await _respond_raw(
                send, 501, _error("The server has no /inference/v1/generate. Start it with --enable-scale-out.")
            )
        answer = json.loads(body) if status < 400 else None
        if answer is None:
            return await _respond_raw(send, status, body)
        if any(choice["finish_reason"] == "abort" for choice in answer["choices"]):
            # An aborted completion is cut at a random token. As an error the environment asks again; as an answer it
            # would be scored and trained.
            return await _respond_raw(send, 503, _error("The request was aborted by a weight update. Send it again."))
        self._remember_versions(token_ids, answer["choices"])
        await _respond(send, 200, _atropos_answer(answer))

    async def _prompt_token_ids(self, prompt: Any, scope: Scope, receive: Receive) -> list[int]:
        if isinstance(prompt, dict) and isinstance(prompt.get("prompt_token_ids"), list):
            return prompt["prompt_token_ids"]
        if not isinstance(prompt, str):
            raise _BadRequest(
                400,
                _error(
                    '`prompt` must be {"prompt_token_ids": [int, ...]} or a string, got ' + json.dumps(prompt)[:80]
                ),
            )
        status, body = await self._call(scope, receive, "POST", "/tokenize", {"prompt": prompt})
        if status >= 400:
            raise _BadRequest(status, body)
        return json.loads(body)["tokens"]

    def _remember_versions(self, prompt_ids: list[int], choices: list[dict]) -> None:
        for choice in choices:
            versions = [span["version"] for span in choice.get("weight_versions") or []]
            # A server that was never published to labels its weights "default": no version of ours.
            if not versions or not all(version.isdecimal() for version in versions):
                continue
            key = rollout_key([*prompt_ids, *choice["token_ids"]])
            self.policy_versions[key] = min(int(version) for version in versions)
            self.policy_versions.move_to_end(key)
        while len(self.policy_versions) > MAX_REMEMBERED_ROLLOUTS:
            self.policy_versions.popitem(last=False)

    async def _policy_versions(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            keys = _parse_object(await _read_body(receive)).get("rollout_keys")
        except _BadRequest as exc:
            return await _respond_raw(send, exc.status, exc.body)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            return await _respond_raw(send, 400, _error("`rollout_keys` must be a list of strings."))
        # The server's own answer to an authenticated route decides whether this caller may ask.
        status, body = await self._call(scope, receive, "GET", "/v1/models", None)
        if status >= 400:
            return await _respond_raw(send, status, body)
        await _respond(send, 200, {"policy_versions": [self.policy_versions.get(key) for key in keys]})

    async def _call(
        self, scope: Scope, receive: Receive, method: str, path: str, payload: dict | None
    ) -> tuple[int, bytes]:
        """Call the server inside the process, with the caller's headers, and return status and body."""
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
        sent = False
        status = 500
        chunks: list[bytes] = []

        async def inner_receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            # The caller's disconnect must reach the server, which then stops generating.
            return await receive()

        async def inner_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                chunks.append(message.get("body", b""))

        await self.app(inner_scope, inner_receive, inner_send)
        return status, b"".join(chunks)


class _BadRequest(ValueError):
    """A request that is answered with `status` and `body` instead of being passed on."""

    def __init__(self, status: int, body: bytes):
        super().__init__(status, body)
        self.status = status
        self.body = body


@lru_cache(maxsize=1)
def _sampling_params_fields() -> frozenset[str]:
    # The server's route drops unknown fields without a word; an environment with a misspelt one would sample otherwise
    # than it says.
    from vllm import SamplingParams

    return frozenset(name for name in SamplingParams.__struct_fields__ if not name.startswith("_"))


def _atropos_answer(answer: dict) -> dict:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    result: dict[str, Any] = {
        "logprobs": [
            [[{str(entry["token_id"]): entry["logprob"]}] for entry in choice["logprobs"]["content"]]
            for choice in choices
        ],
        "finish_reasons": [choice["finish_reason"] for choice in choices],
    }
    if answer.get("prompt_logprobs") is not None:
        result["prompt_logprobs"] = [
            None if position is None else {token: entry["logprob"] for token, entry in position.items()}
            for position in answer["prompt_logprobs"]
        ]
    return result


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except ValueError as exc:
        raise _BadRequest(400, _error(f"The request body is not JSON: {exc}")) from exc
    if not isinstance(request, dict):
        raise _BadRequest(400, _error(f"The request body must be a JSON object, got {type(request).__name__}."))
    return request


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "BadRequestError"}}).encode()


async def _read_body(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _BadRequest(400, _error("The client disconnected before the request body was complete."))
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _respond(send: Send, status: int, payload: dict) -> None:
    await _respond_raw(send, status, json.dumps(payload).encode())


async def _respond_raw(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
