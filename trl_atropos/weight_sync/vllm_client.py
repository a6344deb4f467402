"""Control plane of a `trl vllm-serve` / `vllm serve` server: TRL's client with deadlines, versions and clear errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from trl.generation.vllm_client import VLLMClient
from urllib3.exceptions import ReadTimeoutError

from ..errors import PreflightError, WeightSyncError, WeightSyncTimeout


logger = logging.getLogger(__name__)

HEALTH_TIMEOUT_S = 5.0
PROGRESS_INTERVAL_S = 10.0


class AtroposVLLMClient(VLLMClient):
    """Talks to one vLLM server that was started with dev mode and a weight transfer engine.

    Differs from [`trl.generation.vllm_client.VLLMClient`] in that

    1. every request has a deadline, counted from the last byte that arrived;
    2. nothing is retried: the control requests are not idempotent, a repeated `/update_weights` waits forever for
       bytes that were already taken;
    3. it pauses and resumes the server, names the policy version, and reads it back;
    4. it initialises any weight transfer engine, not only NCCL on CUDA;
    5. it sends an API key.

    Args:
        base_url (`str`):
            Root of the server, for example `"http://127.0.0.1:8000"`.
        connection_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server to become healthy.
        request_timeout (`float`, *optional*, defaults to `300.0`):
            Deadline in seconds of every single request.
        group_port (`int`, *optional*, defaults to `51216`):
            TCP port of the rendezvous for NCCL.
        api_key (`str`, *optional*):
            Sent as `Authorization: Bearer`.

    Raises:
        [`WeightSyncTimeout`]: if the server is not healthy in time.

    Example:

    ```python
    client = AtroposVLLMClient("http://127.0.0.1:8000")
    client.get_weight_version()  # '12'
    ```
    """

    def __init__(
        self,
        base_url: str,
        *,
        connection_timeout: float = 240.0,
        request_timeout: float = 300.0,
        group_port: int = 51216,
        api_key: str | None = None,
    ):
        self.request_timeout = request_timeout
        self.api_key = api_key
        super().__init__(base_url=base_url.rstrip("/"), group_port=group_port, connection_timeout=connection_timeout)

    # TRL's methods reach the server through the four methods below and inherit their deadlines and errors.

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Wait until `/health` answers 200. See the class for the error."""
        # requests picks the adapter with the longest matching prefix: this one, without retries, wins over TRL's.
        self.session.mount(self.base_url, HTTPAdapter(max_retries=0, pool_maxsize=64))
        # A kept connection that the server closes (it does so after 5 s of idling, and after every 500) fails the next
        # request, and without retries that would fail a publish.
        self.session.headers["Connection"] = "close"
        if self.api_key:
            self.session.headers["Authorization"] = f"Bearer {self.api_key}"
        start = time.monotonic()
        reported = start
        while True:
            try:
                response = self.session.get(f"{self.base_url}/health", timeout=HEALTH_TIMEOUT_S)
                state = f"/health answers {response.status_code}"
                if response.status_code == 200:
                    return
            except requests.exceptions.RequestException as exc:
                state = f"{type(exc).__name__}"
            now = time.monotonic()
            if now - start >= total_timeout:
                raise WeightSyncTimeout(
                    f"The vLLM server at {self.base_url} is not healthy after {total_timeout:.0f} s ({state}).",
                    "The trainer publishes every policy to it and cannot start without it.",
                    "Start it with `trl vllm-serve --model ...`, correct --vllm_server_base_url, or raise "
                    "--vllm_server_timeout.",
                )
            if now - reported >= PROGRESS_INTERVAL_S:
                reported = now
                logger.info(f"Waiting for the vLLM server at {self.base_url}: {now - start:.0f} s ({state})")
            time.sleep(min(retry_interval, 0.5))

    def _request(self, method: str, url: str, **kwargs: Any) -> requests.Response:
        kwargs.setdefault("timeout", self.request_timeout)
        route = url.removeprefix(self.base_url)
        try:
            response = self.session.request(method, url, **kwargs)
        except requests.exceptions.RequestException as exc:
            if _is_timeout(exc):
                raise WeightSyncTimeout(
                    f"{method} {route} of the vLLM server at {self.base_url} did not answer within "
                    f"{kwargs['timeout']} s.",
                    "The engine is stuck, or the machine is overloaded; whether the request took effect is unknown.",
                    "Look at the server's log, restart the server, then train with --resume_from_checkpoint; or raise "
                    "--weight_sync_timeout.",
                ) from exc
            raise WeightSyncError(
                f"{method} {route} of the vLLM server at {self.base_url} failed: {exc}.",
                "The server died or closed the connection.",
                "Look at the server's log, restart the server, then train with --resume_from_checkpoint.",
            ) from exc
        return response

    def _get(self, url: str, **kwargs: Any) -> dict:
        return self._checked_json(self._request("GET", url, **kwargs))

    def _post(self, url: str, **kwargs: Any) -> dict:
        return self._checked_json(self._request("POST", url, **kwargs))

    def _checked_json(self, response: requests.Response) -> dict:
        if response.status_code >= 400:
            raise _http_error(self.base_url, response)
        try:
            return response.json()
        except requests.exceptions.JSONDecodeError as exc:
            raise WeightSyncError(
                f"{_route(response)} of {self.base_url} answered {response.status_code} with {response.text[:80]!r}.",
                "That is not JSON, so it is not a vLLM server that answers.",
                "Correct --vllm_server_base_url, or look at the proxy in between.",
            ) from exc

    def get_server_info(self) -> dict:
        """Return the server's resolved `VllmConfig` as a JSON tree.

        Raises:
            [`PreflightError`]: if the server runs without dev mode.
        """
        response = self._request("GET", f"{self.base_url}/server_info", params={"config_format": "json"})
        if response.status_code == 404:
            raise PreflightError(
                f"The vLLM server at {self.base_url} does not expose its development routes.",
                "Publishing a policy needs /pause, /update_weights and their kin.",
                "Start it with `trl vllm-serve`, or `VLLM_SERVER_DEV_MODE=1 vllm serve ...`.",
            )
        return self._checked_json(response)["vllm_config"]

    def pause(self) -> None:
        """Freeze generation. Requests in flight are kept and go on after `resume`; new ones wait."""
        self._post(f"{self.base_url}/pause", params={"mode": "keep"})

    def resume(self) -> None:
        """Let frozen and waiting requests run."""
        self._post(f"{self.base_url}/resume")

    def is_paused(self) -> bool:
        """Whether generation is frozen."""
        return self._get(f"{self.base_url}/is_paused")["is_paused"]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the workers' weight transfer engine; `init_info` is the engine's own."""
        self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin a weight update. Until it is finished the model has no weights: pause first."""
        self._start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Have the workers receive and load tensors; returns when every worker has."""
        self._post(f"{self.base_url}/update_weights", json={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish a weight update and name the weights."""
        self._post(f"{self.base_url}/finish_weight_update", json={"weight_version": weight_version})

    def get_weight_version(self) -> str:
        """Return the name of the weights that are served; `"default"` before the first publish."""
        return self._get(f"{self.base_url}/weight_info")["weight_version"]

    @contextmanager
    def weight_update(self, weight_version: str | None = None) -> Iterator[None]:
        """Group `update_named_params` calls into one update that is finished only if all of them succeeded.

        TRL's version finishes in `finally`, which serves half a policy after an error.
        """
        self.start_weight_update()
        self._updating_weights = True
        try:
            yield
        finally:
            self._updating_weights = False
        self.finish_weight_update(weight_version)

    def get_policy_versions(self, rollout_keys: Sequence[str]) -> list[int | None]:
        """Return under which policy version each sequence was sampled; None where the server does not know.

        Args:
            rollout_keys (`Sequence[str]`):
                From [`trl_atropos.rollout_key.rollout_key`].
        """
        answer = self._post(f"{self.base_url}/atropos/policy_versions", json={"rollout_keys": list(rollout_keys)})
        return answer["policy_versions"]

    def get_prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score sequences under the served policy.

        Args:
            sequences (`Sequence[Sequence[int]]`):
                Token ids, each of length T >= 2.

        Returns:
            `list[list[float]]`: per sequence the logprobs, in nats at temperature 1, of tokens 1..T-1.
        """
        scored = self.get_sequence_logprobs(
            [list(sequence) for sequence in sequences], prompt_lengths=[1] * len(sequences), top_logprobs=1
        )
        return [[position[0] for position in sequence] for sequence in scored["actual_logprobs"]]


def _is_timeout(exc: requests.exceptions.RequestException) -> bool:
    # requests reports a stall after the headers of an answer as a ConnectionError around urllib3's timeout.
    cause = exc.args[0] if exc.args else None
    return isinstance(exc, requests.exceptions.Timeout) or isinstance(cause, ReadTimeoutError)


def _route(response: requests.Response) -> str:
    return f"{response.request.method} {response.request.path_url}"


def _http_error(base_url: str, response: requests.Response) -> WeightSyncError:
    detail = " ".join(response.text.split())[:500]
    if response.status_code == 401:
        fix = "Set --vllm_api_key, or VLLM_API_KEY in the environment, to the key the server was started with."
    elif response.status_code == 404:
        fix = "Start the server with `trl vllm-serve` (vLLM 0.32 or newer), or VLLM_SERVER_DEV_MODE=1."
    else:
        fix = "Look at the server's log; if it stays in this state, restart the server."
    return WeightSyncError(
        f"{_route(response)} of the vLLM server at {base_url} answered {response.status_code}: {detail}.",
        "The server refused the request or failed while handling it.",
        fix,
    )
