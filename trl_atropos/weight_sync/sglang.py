"""Control plane of an `sglang.launch_server`, and a whole publish as a context manager."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import PreflightError, VLLMServerError, WeightSyncError
from ..types import ServedCall
from .http import SGLANG, SGLANG_ROUTES, Answer
from .inference_server import ServerDescription
from .server_client import ServerClient
from .transports.backends import SGLANG_GLOO_BACKEND, SGLANG_NCCL_BACKEND


if TYPE_CHECKING:
    from .weights.adapter import AdapterNeeds


logger = logging.getLogger(__name__)

FLOOR = "0.5.22"
"""The first version whose weight updates have a beginning and an end."""

DTYPES = {"half": "float16", "float16": "float16", "bfloat16": "bfloat16", "float": "float32", "float32": "float32"}
"""SGLang's names of dtypes, and torch's."""


class AtroposSGLangClient(ServerClient):
    """Talks to one SGLang server (0.5.22 or newer). It is an [`InferenceServer`].

    What SGLang does otherwise than vLLM, and where it is met:

    1. `/health` generates a token, which a paused server does not: `wait_until_healthy` asks `/model_info`.
    2. Tensors of unknown names, and a part of a policy, are answered with 200: there are no checksums, so the publisher
       compares logprobs after every publish.
    3. To flush the cache while requests lie in it is refused after the weights have changed. `pause` puts requests in
       flight back into the queue (`retract`), and their keys and values are computed again; with `clear_cache=False`
       they stay where they are (`in_place`) and no bucket flushes.
    4. `/update_weight_version` aborts all requests unless it is told not to.
    5. The weights have their new name after `/end_weight_update`, in a request of its own.

    Not available: LoRA adapters (`weight_sync_mode adapter`; merged weights are published), sleep mode, and a memory of
    which policy sampled a rollout: `trl-atropos env` and gateways send what SGLang answered.

    Args:
        base_url (`str`):
            Root of the server, for example `"http://127.0.0.1:30000"`.
        connection_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server to answer.
        request_timeout (`float`, *optional*, defaults to `300.0`):
            Deadline in seconds of every single request.
        api_key (`str`, *optional*):
            Sent as `Authorization: Bearer`; the admin key, if the server has one.

    Raises:
        [`PreflightError`]: if the URL or the key cannot be sent.
        [`WeightSyncTimeout`]: if the server does not answer in time.

    Example:

    ```python
    client = AtroposSGLangClient("http://127.0.0.1:30000")
    with client.weight_sync(policy_version=1) as sync:  # pauses the server
        sync.push(model)
    client.get_weight_version()  # '1', verified, and the server is resumed
    ```
    """

    kind = SGLANG
    # A paused server answers it, too.
    health_route = "/model_info"
    # Whether the cache is flushed with the last bucket: as the last pause wanted it.
    _flushes = True

    def _served_model(self) -> str:
        return self._get("/model_info").get_typed("served_model_name", str)

    def _get(self, path: str) -> Answer:
        return Answer(self._server_session.get(self.base_url + path), kind=SGLANG)

    def _post(self, path: str, **body: Any) -> Answer:
        return Answer(self._server_session.post(self.base_url + path, json=body), kind=SGLANG)

    def _command(self, path: str, **body: Any) -> None:
        """Send a control request whose answer must say that it succeeded."""
        answer = self._post(path, **body)
        if answer.get("success") is not True:
            raise answer.unexpected("`success`: true", dict(answer))

    # Server

    def describe(self) -> ServerDescription:
        """Return what the server says of itself. See `InferenceServer.describe`."""
        info, model = self._get("/server_info"), self._get("/model_info")
        version = str(info.get("version"))
        missing = sorted(SGLANG_ROUTES - set(self._get("/openapi.json").get_typed("paths", dict)))
        if missing:
            raise PreflightError(
                f"The SGLang server at {self.base_url} (version {version}) has no {', '.join(missing)}.",
                "Weights that are replaced without a beginning and an end may be left half processed.",
                f"Install SGLang {FLOOR} or newer.",
            )
        self._refuse_replicas(info)
        context_length = info.get("context_length")
        max_model_len = self._max_model_len() if context_length is None else int(context_length)
        path = model.get_typed("model_path", str)
        return ServerDescription(
            model=path,
            tokenizer=None if info.get("skip_tokenizer_init") else str(model.get("tokenizer_path") or path),
            tokenizer_revision=info.get("revision"),
            dtype=self._dtype(info, path),
            backend=SGLANG_NCCL_BACKEND if info.get("device") == "cuda" else SGLANG_GLOO_BACKEND,
            max_model_len=max_model_len,
            # SGLang divides the logits by the temperature before it takes logprobs.
            logprobs_mode="processed_logprobs",
            has_lora=bool(info.get("enable_lora")),
            loads_adapters=False,
        )

    def _refuse_replicas(self, info: Answer) -> None:
        for name in ("dp_size", "pp_size"):
            size = info.get(name, 1)
            if size != 1:
                raise PreflightError(
                    f"The SGLang server at {self.base_url} runs with {name} {size}.",
                    "Its weight updates reach one replica, and one stage of a pipeline.",
                    f"Start it with --{name.replace('_', '-')} 1 and --tp-size for several GPUs; name several servers in "
                    "--vllm_server_base_url instead of replicas.",
                )
        if info.get("quantization") is not None:
            raise PreflightError(
                f"The SGLang server at {self.base_url} quantises its weights ({info['quantization']}).",
                "Whether a publish survives that was never tried.",
                "Start it without --quantization.",
            )

    def _max_model_len(self) -> int:
        models = self._get("/v1/models").get_typed("data", list)
        return int(models[0]["max_model_len"])

    def _dtype(self, info: Answer, path: str) -> str:
        given = info.get_typed("dtype", str)
        if given in DTYPES:
            return DTYPES[given]
        # `auto` is not resolved in any answer of the server: this is what SGLang makes of the checkpoint's config.
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as exc:
            raise PreflightError(
                f"The SGLang server at {self.base_url} serves in dtype {given!r}, and the config of {path} cannot be read "
                f"here ({type(exc).__name__}).",
                "What is published must be in the server's dtype.",
                "Start the server with --dtype bfloat16, or the one that is meant.",
            ) from exc
        dtype = str(config.dtype or "float32").removeprefix("torch.")
        if dtype == "float32":
            return "bfloat16" if config.model_type.startswith("gemma") else "float16"
        return dtype

    def knows_policy_versions(self) -> bool:
        """False: the server says its versions in every answer, which `trl-atropos env` sends on, and remembers none."""
        return False

    def get_world_size(self) -> int:
        """Return the number of workers: those of tensor parallelism."""
        return self._get("/server_info").get_typed("tp_size", int)

    # Generation

    def pause(self, *, clear_cache: bool = True) -> None:
        """Freeze generation. See `InferenceServer.pause`."""
        self._post("/pause_generation", mode="retract" if clear_cache else "in_place")
        self._flushes = clear_cache

    def resume(self) -> None:
        """Let frozen and waiting requests run."""
        self._post("/continue_generation")

    def is_paused(self) -> bool:
        """Not available: only what publishes adapters asks, and SGLang does not say."""
        raise PreflightError(
            f"The SGLang server at {self.base_url} was asked whether it is paused.",
            "SGLang does not say.",
            "Send a pause or a resume, whichever is meant: both may come twice.",
        )

    def sleep(self, level: int) -> None:
        """Not available."""
        self._refuse_sleep()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Not available."""
        self._refuse_sleep()

    def _refuse_sleep(self) -> NoReturn:
        raise PreflightError(
            f"vllm_enable_sleep_mode is on, and the server at {self.base_url} is SGLang.",
            "Its memory is given back and taken in another way, which trl_atropos does not use.",
            "Leave --vllm_enable_sleep_mode off and give server and trainer a GPU each.",
        )

    # Weights

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the workers join a process group: `master_address`, `master_port`, `rank_offset`, `world_size`,
        `group_name` and `backend`.
        """
        self._command("/init_weights_update_group", **init_info)

    def shutdown_weight_transfer_engine(self) -> None:
        """Leave the process group of the trainer that the workers met last, if there is one."""
        from .transports.sglang_group import GROUP_NAME

        try:
            self._command("/destroy_weights_update_group", group_name=GROUP_NAME)
        except VLLMServerError as exc:
            if "does not exist" not in exc.detail:
                raise

    def begin_weight_update(self) -> None:
        """Begin a weight update. See `InferenceServer.begin_weight_update`."""
        try:
            self._command("/begin_weight_update")
        except VLLMServerError as exc:
            if "already open" not in exc.detail:
                raise
            logger.warning(
                f"The SGLang server at {self.base_url} has an unfinished weight update of another trainer; it is "
                "replaced by this one."
            )
            # While the server is paused nobody sees the half of a policy.
            self._command("/end_weight_update")
            self._command("/begin_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Have the workers receive one bucket: `names`, `dtypes`, `shapes`, `group_name`, and `is_last`, with which the
        cache is flushed.
        """
        is_last = update_info["is_last"]
        named = {name: value for name, value in update_info.items() if name != "is_last"}
        self._command("/update_weights_from_distributed", **named, flush_cache=is_last and self._flushes)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the weights in place and name them. See `InferenceServer.finish_weight_update`."""
        self._command("/end_weight_update")
        if weight_version is not None:
            self.set_weight_version(weight_version)

    def get_weight_version(self) -> str:
        """Return the name of the weights that are served; `"default"` before the first publish."""
        return self._get("/model_info").get_typed("weight_version", str)

    def set_weight_version(self, version: str) -> None:
        """Name the weights that are served. Requests in flight go on."""
        self._command("/update_weight_version", new_version=version, abort_all_requests=False)

    # LoRA adapters

    def _refuse_adapters(self) -> NoReturn:
        raise PreflightError(
            f"The server at {self.base_url} is SGLang, which does not serve adapters of this trainer.",
            "Environments name the model, and nothing in SGLang answers them with the newest adapter.",
            "Set --weight_sync_mode merged, which publishes the same policy with LoRA merged in.",
        )

    def check_adapters(self, needs: AdapterNeeds, *, keep: int = 2) -> None:
        """Not available."""
        self._refuse_adapters()

    def load_lora_adapter(self, name: str, path: str) -> None:
        """Not available."""
        self._refuse_adapters()

    def unload_lora_adapter(self, name: str) -> None:
        """Not available."""
        self._refuse_adapters()

    def route_adapter(self, name: str | None, policy_version: int) -> None:
        """Not available."""
        self._refuse_adapters()

    def get_adapter_route(self) -> Mapping[str, Any]:
        """Not available."""
        self._refuse_adapters()

    # Rollouts

    def find_calls(self, rollout_keys: Sequence[str]) -> list[ServedCall | None]:
        """None for every call: the server says its version in every answer, but remembers none."""
        return [None] * len(rollout_keys)

    def get_prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score sequences under the served policy. See `InferenceServer.get_prompt_logprobs`."""
        prompts = [list(sequence) for sequence in sequences]
        response = self._server_session.post(
            f"{self.base_url}/generate",
            json={
                "input_ids": prompts,
                # Logprobs are taken at this temperature.
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        answers = response.json()
        try:
            rows = [
                # Of each token: logprob, id, text. The first one has no logprob.
                [
                    (float(logprob), int(token))
                    for logprob, token, *_ in answer["meta_info"]["input_token_logprobs"][1:]
                ]
                for answer in answers
            ]
            if [[token for _, token in row] for row in rows] != [prompt[1:] for prompt in prompts]:
                raise ValueError("other tokens were scored than those that were sent")
        except (LookupError, TypeError, ValueError) as exc:
            raise WeightSyncError(
                f"/generate of {self.base_url} answered {response.text[:200]!r} instead of `input_token_logprobs` of "
                f"{len(prompts)} sequences ({exc}).",
                "What answers is not an SGLang server, or one of a version that trl_atropos does not know.",
                f"Correct --vllm_server_base_url, or install SGLang {FLOOR} or newer.",
            ) from exc
        return [[logprob for logprob, _ in row] for row in rows]

    def render_messages(self, messages: list[dict[str, str]]) -> list[int] | None:
        """Return the token ids that the server makes of a conversation; None if it has no chat template."""
        try:
            return self._post("/tokenize", model=self.model, messages=messages).get_typed("tokens", list)
        except VLLMServerError as exc:
            if exc.status_code != 400:
                raise
            return None
