"""Control plane of a `trl vllm-serve` / `vllm serve` server: every route with a deadline, and clear errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PreflightError, VLLMServerError, WeightSyncError
from ..types import ServedCall
from .http import VLLM, Answer
from .inference_server import ServerDescription
from .server_client import ServerClient
from .transports.adapter_files import check_server


if TYPE_CHECKING:
    from .weights.adapter import AdapterNeeds


logger = logging.getLogger(__name__)


class VLLMControl(ServerClient):
    """The verbs of one vLLM server: health, pause, versions, the steps of a weight update, adapters, logprobs.

    It is an [`InferenceServer`]. [`~weight_sync.client.AtroposVLLMClient`], which users make, is TRL's client, too.
    Arguments and errors are the same.
    """

    kind = VLLM
    health_route = "/health"

    def _served_model(self) -> str:
        models = self.list_models()
        if not models:
            raise WeightSyncError(
                f"The vLLM server at {self.base_url} serves no model.",
                "Generation requests must name one.",
                "Restart it with `trl vllm-serve --model ...`.",
            )
        return models[0]

    def _get(self, url: str, **kwargs: Any) -> Answer:
        return Answer(self.session.get(url, **kwargs))

    def _post(self, url: str, **kwargs: Any) -> Answer:
        return Answer(self.session.post(url, **kwargs))

    # Server

    def get_server_info(self) -> dict[str, Any]:
        """Return the server's resolved `VllmConfig` as a JSON tree.

        Raises:
            [`PreflightError`]: if the server runs without dev mode.
        """
        return self._server_info().get_typed("vllm_config", dict)

    def get_server_environment(self) -> dict[str, Any]:
        """Return the server's `VLLM_*` settings by name, without those that hold keys.

        Raises:
            [`PreflightError`]: if the server runs without dev mode.
        """
        return self._server_info().get_typed("vllm_env", dict)

    def _server_info(self) -> Answer:
        try:
            return self._get(f"{self.base_url}/server_info", params={"config_format": "json"})
        except VLLMServerError as exc:
            if exc.status_code != 404:
                raise
            raise PreflightError(
                f"The vLLM server at {self.base_url} does not expose its development routes.",
                "Publishing a policy needs /pause, /update_weights and their kin.",
                "Start it with `trl vllm-serve`, or `VLLM_SERVER_DEV_MODE=1 vllm serve ...`.",
            ) from exc

    def describe(self) -> ServerDescription:
        """Return what the server says of itself. See `InferenceServer.describe`."""
        answer = self._server_info()
        info, environment = answer.get_typed("vllm_config", dict), answer.get("vllm_env", {})
        transfer, has_lora = info.get("weight_transfer_config"), info.get("lora_config") is not None
        try:
            served = info["model_config"]
            tokenizer = None if served.get("skip_tokenizer_init") else served.get("tokenizer") or served["model"]
            return ServerDescription(
                model=served["model"],
                tokenizer=tokenizer,
                tokenizer_revision=served.get("tokenizer_revision"),
                dtype=served["dtype"].removeprefix("torch."),
                backend=None if transfer is None else transfer["backend"],
                max_model_len=served["max_model_len"],
                logprobs_mode=served["logprobs_mode"],
                has_lora=has_lora,
                loads_adapters=has_lora and bool(environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")),
            )
        except (LookupError, AttributeError, TypeError) as exc:
            raise answer.unexpected(f"`vllm_config` of an engine ({exc!r})", info) from exc

    def knows_policy_versions(self) -> bool:
        """Whether our middleware, which remembers them, is there."""
        try:
            self.find_calls([])
        except VLLMServerError as exc:
            if exc.status_code != 404:
                raise
            return False
        return True

    def get_world_size(self) -> int:
        """Return the number of workers: tensor x pipeline x data parallel."""
        return self._get(f"{self.base_url}/get_world_size").get_typed("world_size", int)

    # Generation

    def pause(self, *, mode: str = "keep", clear_cache: bool = True) -> None:
        """Freeze generation. New requests wait for `resume`.

        Args:
            mode (`str`, *optional*, defaults to `"keep"`):
                Requests in flight: `"keep"` freezes them too, `"wait"` lets them end, `"abort"` cuts them off.
            clear_cache (`bool`, *optional*, defaults to `True`):
                Whether the keys and values of requests in flight are computed again after `resume`.
        """
        params = {"mode": mode, "clear_cache": str(clear_cache).lower()}
        self._post(f"{self.base_url}/pause", params=params)

    def resume(self) -> None:
        """Let frozen and waiting requests run."""
        self._post(f"{self.base_url}/resume")

    def is_paused(self) -> bool:
        """Whether generation is frozen."""
        return self._get(f"{self.base_url}/is_paused").get_typed("is_paused", bool)

    def reset_prefix_cache(self) -> bool:
        """Drop cached prefixes. Returns False, and drops nothing, while requests hold blocks of the cache."""
        return self._post(f"{self.base_url}/reset_prefix_cache").get_typed("success", bool)

    def sleep(self, level: int) -> None:
        """Give device memory back. Requests in flight are frozen and kept.

        Args:
            level (`int`):
                0 only pauses; 1 drops the KV cache and moves the weights to host memory; 2 drops both.
        """
        self._post(f"{self.base_url}/sleep", params={"level": level, "mode": "keep"})

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take device memory again. vLLM resumes generation by itself once everything is awake.

        Args:
            tags (`list[str]`, *optional*):
                What to wake: `"weights"`, `"kv_cache"`, `"scheduling"`. Everything if not given.
        """
        self._post(f"{self.base_url}/wake_up", params={"tags": tags or []})

    def is_sleeping(self) -> bool:
        """Whether device memory is given back. True for a paused server, too."""
        return self._get(f"{self.base_url}/is_sleeping").get_typed("is_sleeping", bool)

    # Weights

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the workers' weight transfer engine; `init_info` is the engine's own."""
        self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect the workers' engine from a trainer. Refused during a weight update."""
        self._post(f"{self.base_url}/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        """Begin a weight update. Until it is finished the model has no weights: pause first."""
        self._post(f"{self.base_url}/start_weight_update", json={})

    def begin_weight_update(self) -> None:
        """Begin a weight update. See `InferenceServer.begin_weight_update`."""
        try:
            self.start_weight_update()
        except VLLMServerError as exc:
            if "already active" not in exc.detail:
                raise
            logger.warning(
                f"The vLLM server at {self.base_url} has an unfinished weight update of another trainer; it is "
                "replaced by this one."
            )
            try:
                # Gives every layer its old tensors back. While the server is paused nobody sees the half of a policy.
                self.finish_weight_update(None)
            except VLLMServerError:
                # Our engines do not finish half a policy, but take another one within the same update.
                return
            self.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Have the workers receive and load tensors; returns when every worker has."""
        self._post(f"{self.base_url}/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish a weight update and name the weights; without a name they keep the old one."""
        self._post(f"{self.base_url}/finish_weight_update", json={"weight_version": weight_version})

    def get_weight_version(self) -> str:
        """Return the name of the weights that are served; `"default"` before the first publish."""
        return self._get(f"{self.base_url}/weight_info").get_typed("weight_version", str)

    def set_weight_version(self, version: str) -> None:
        """Name the weights that are served without changing them."""
        self._post(f"{self.base_url}/update_weight_version", json={"new_version": version})

    # LoRA adapters

    def check_adapters(self, needs: AdapterNeeds, *, keep: int = 2) -> None:
        """Refuse a server that cannot serve adapters of this trainer. See `InferenceServer.check_adapters`."""
        check_server(self, needs, keep=keep)

    def load_lora_adapter(self, name: str, path: str) -> None:
        """Load an adapter from a directory, as the server sees it, under a name that is not taken."""
        self._change_adapter("load", name, {"lora_name": name, "lora_path": path})

    def unload_lora_adapter(self, name: str) -> None:
        """Forget an adapter. Requests in flight that use it end with it."""
        self._change_adapter("unload", name, {"lora_name": name})

    def _change_adapter(self, verb: str, name: str, body: dict[str, str]) -> None:
        response = self.session.post(f"{self.base_url}/v1/{verb}_lora_adapter", json=body)
        # A line of text that repeats the name.
        if name not in response.text:
            raise WeightSyncError(
                f"/v1/{verb}_lora_adapter of {self.base_url} answered {response.text[:80]!r} for adapter {name!r}.",
                "That is not vLLM's answer, so it is not a vLLM server that answers.",
                "Correct --vllm_server_base_url, or look at the proxy in between.",
            )

    def route_adapter(self, name: str | None, policy_version: int) -> None:
        """Have our middleware answer requests for the model with an adapter.

        Args:
            name (`str`, *optional*):
                A loaded adapter; None routes to the model itself.
            policy_version (`int`):
                Number of the policy that the model makes with this adapter.
        """
        self._post(f"{self.base_url}/atropos/adapter", json={"lora_name": name, "policy_version": policy_version})

    def get_adapter_route(self) -> Mapping[str, Any]:
        """Return what our middleware says of its routing. See `InferenceServer.get_adapter_route`."""
        answer = self._get(f"{self.base_url}/atropos/adapter")
        answer.get_typed("num_in_flight", dict)
        return answer

    # Rollouts

    def find_calls(self, rollout_keys: Sequence[str]) -> list[ServedCall | None]:
        """Return under which policy version each completion was sampled, and how; None where the server does not know.

        Args:
            rollout_keys (`Sequence[str]`):
                One key for each completion, made by [`trl_atropos.wire.rollout_key.rollout_key`].
        """
        answer = self._post(f"{self.base_url}/atropos/policy_versions", json={"rollout_keys": list(rollout_keys)})
        versions = answer.get_typed("policy_versions", list)
        if len(versions) != len(rollout_keys) or not all(isinstance(version, int | None) for version in versions):
            raise answer.unexpected(f"`policy_versions` of {len(rollout_keys)} keys", versions)
        # A middleware of an earlier version remembers the versions alone.
        names = answer.get("sampling_parameters", [[]] * len(versions))
        if not isinstance(names, list) or len(names) != len(versions):
            raise answer.unexpected(f"`sampling_parameters` of {len(rollout_keys)} keys", names)
        return [
            None if version is None else ServedCall(version, tuple(of_call or ()))
            for version, of_call in zip(versions, names, strict=True)
        ]

    def get_prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score sequences under the served policy.

        Args:
            sequences (`Sequence[Sequence[int]]`):
                Token ids, each of length T >= 2.

        Returns:
            `list[list[float]]`: per sequence the logprobs, in nats at temperature 1, of tokens 1..T-1.
        """
        prompts = [list(sequence) for sequence in sequences]
        body = {"model": self.model, "prompt": prompts, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 1}
        answer = self._post(f"{self.base_url}/v1/completions", json=body)
        choices = answer.get_typed("choices", list)
        try:
            return [
                [
                    float(choice["prompt_logprobs"][t][str(token)]["logprob"])
                    for t, token in enumerate(prompt[1:], start=1)
                ]
                for prompt, choice in zip(prompts, choices, strict=True)
            ]
        except (LookupError, TypeError, ValueError) as exc:
            raise answer.unexpected(f"`prompt_logprobs` of {len(prompts)} sequences", choices) from exc

    def render_messages(self, messages: list[dict[str, str]]) -> list[int] | None:
        """Return the token ids that the server makes of a conversation; None if it has no chat template."""
        try:
            answer = self._post(f"{self.base_url}/tokenize", json={"model": self.model, "messages": messages})
        except VLLMServerError as exc:
            if exc.status_code != 400:
                raise
            return None
        return answer.get_typed("tokens", list)
