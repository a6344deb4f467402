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
- `POST /atropos/policy_versions`: `{"rollout_keys": [str]}` gives `{"policy_versions": [int | null],
  "sampling_parameters": [[str] | null]}`: under which policy the completions were sampled that passed through
  `/generate` (see `rollout_key`), each of `n` under its own key, and with which parameters, if these made another
  distribution of the policy's. Every API server process has its own table: with `--api-server-count` above 1, the default of data parallel
  servers, most versions stay unknown.
- `POST /atropos/adapter`: `{"lora_name": str | null, "policy_version": int}`: from now on that loaded adapter, or the
  model itself, answers the requests for the model, on `/generate`, `/v1/completions`, `/v1/chat/completions` and
  `/inference/v1/generate`, whose answers then say which in the header `x-atropos-policy-version`. It and
  `GET /atropos/adapter` give both and `{"num_in_flight": {"<lora_name>": int}}`.

Everything else reaches the server untouched.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from ..types import ServedCall
from ..wire.rollout_key import RememberedCalls, oldest_version
from .adapter_routes import ROUTED_PATHS, AdapterRoutes
from .asgi import (
    ASGIApp,
    BadRequest,
    Receive,
    Scope,
    Send,
    call,
    error,
    parse_object,
    read_body,
    respond,
    respond_raw,
    route_of,
)


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

CHANGES_IF_SET = ("min_tokens", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs")
"""Further parameters that leave tokens out or make them likelier, unless they are empty or 0."""

FINAL_ONLY = 2
"""vLLM's RequestOutputKind.FINAL_ONLY: with n > 1 the other kinds answer with partial completions."""

UNKNOWN_ROUTE = {"detail": "Not Found"}
"""FastAPI's answer. A model that is not loaded is a 404, too, with a message."""


class GenerateEndpoint:
    """ASGI middleware that answers `/generate`, `/atropos/policy_versions` and `/atropos/adapter`, and gives the requests
    for the model to the adapter that was published last.

    Args:
        app (`ASGIApp`):
            The vLLM server.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.adapter = AdapterRoutes(app)
        self.calls: RememberedCalls[ServedCall] = RememberedCalls()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the routes of Atropos, and pass all others on."""
        request = (scope["method"], route_of(scope)) if scope["type"] == "http" else ("", "")
        if request == ("POST", "/generate"):
            await self._generate(scope, receive, send)
        elif request == ("POST", "/atropos/policy_versions"):
            await self._policy_versions(scope, receive, send)
        elif request == ("POST", "/atropos/adapter"):
            await self.adapter.post(scope, receive, send)
        elif request == ("GET", "/atropos/adapter"):
            await self.adapter.get(scope, receive, send)
        elif request[0] == "POST" and request[1] in ROUTED_PATHS and self.adapter.lora_name is not None:
            await self.adapter.forward(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = parse_object(await read_body(receive))
            prompt = request.pop("prompt", None)
            token_ids = await self._prompt_token_ids(prompt, scope, receive)
            model = request.pop("model", None)
            is_policy = await self.adapter.is_served_model(model, scope, receive)
        except BadRequest as exc:
            return await respond_raw(send, exc.status, exc.body)
        if request.pop("stream", False):
            return await respond_raw(send, 400, error("`stream` is not supported on /generate: send `stream: false`."))
        unknown = sorted(set(request) - _sampling_params_fields())
        if unknown:
            return await respond_raw(send, 400, error(f"Not a sampling parameter of this vLLM: {', '.join(unknown)}."))
        if request.get("logprobs") is None:
            request["logprobs"] = 0
        sampling_params = {**NEUTRAL_SAMPLING_PARAMS, **request, "output_kind": FINAL_ONLY}
        inner = {"token_ids": token_ids, "sampling_params": sampling_params, "stream": False}
        adapter_version = None
        if self.adapter.answers_for(model):
            model, adapter_version = self.adapter.lora_name, self.adapter.policy_version
        if model:
            inner["model"] = model
        with self.adapter.in_flight(model):
            status, body = await call(self.app, scope, receive, "POST", "/inference/v1/generate", inner)
        if status == 404 and json.loads(body) == UNKNOWN_ROUTE:
            return await respond_raw(
                send, 501, error("The server has no /inference/v1/generate. Start it with --enable-scale-out.")
            )
        answer = json.loads(body) if status < 400 else None
        if answer is None:
            return await respond_raw(send, status, body)
        if any(choice["finish_reason"] == "abort" for choice in answer["choices"]):
            # An aborted completion is cut at a random token. As an error the environment asks again; as an answer it
            # would be scored and trained.
            return await respond_raw(send, 503, error("The request was aborted by a weight update. Send it again."))
        if is_policy:
            changes = distribution_changes(sampling_params)
            self._remember(token_ids, answer["choices"], adapter_version, changes)
        await respond(send, 200, _atropos_answer(answer))

    async def _prompt_token_ids(self, prompt: Any, scope: Scope, receive: Receive) -> list[int]:
        if isinstance(prompt, dict) and isinstance(prompt.get("prompt_token_ids"), list):
            return prompt["prompt_token_ids"]
        if not isinstance(prompt, str):
            raise BadRequest(
                400,
                error('`prompt` must be {"prompt_token_ids": [int, ...]} or a string, got ' + json.dumps(prompt)[:80]),
            )
        status, body = await call(self.app, scope, receive, "POST", "/tokenize", {"prompt": prompt})
        if status >= 400:
            raise BadRequest(status, body)
        return json.loads(body)["tokens"]

    def _remember(
        self, prompt_ids: list[int], choices: list[dict], adapter_version: int | None, changes: tuple[str, ...]
    ) -> None:
        for choice in choices:
            # Under an adapter the label is that of the newest one, not of the one that the request began with.
            version = oldest_version(choice.get("weight_versions")) if adapter_version is None else adapter_version
            if version is not None:
                self.calls.note(prompt_ids, choice["token_ids"], ServedCall(version, changes))

    async def _policy_versions(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            keys = parse_object(await read_body(receive)).get("rollout_keys")
        except BadRequest as exc:
            return await respond_raw(send, exc.status, exc.body)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            return await respond_raw(send, 400, error("`rollout_keys` must be a list of strings."))
        # The server's own answer to an authenticated route decides whether this caller may ask.
        status, body = await call(self.app, scope, receive, "GET", "/v1/models", None)
        if status >= 400:
            return await respond_raw(send, status, body)
        calls = [self.calls.find(key) for key in keys]
        answer = {
            "policy_versions": [None if found is None else found.policy_version for found in calls],
            "sampling_parameters": [None if found is None else found.sampling_parameters for found in calls],
        }
        await respond(send, 200, answer)


def distribution_changes(sampling_params: dict[str, Any]) -> tuple[str, ...]:
    """Names of the parameters, sorted, with which a request samples another distribution than the policy's at its temperature.

    A token that they leave out cannot be sampled, and the others are likelier than the policy says: the logprobs of such a
    completion are those of the changed distribution.
    """
    changed = {
        name
        for name, neutral in NEUTRAL_SAMPLING_PARAMS.items()
        if name not in ("n", "max_tokens", "temperature") and sampling_params.get(name) not in (None, neutral)
    }
    changed |= {name for name in CHANGES_IF_SET if sampling_params.get(name)}
    if sampling_params.get("top_k") == -1:
        # Another way to say all.
        changed.discard("top_k")
    return tuple(sorted(changed))


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
