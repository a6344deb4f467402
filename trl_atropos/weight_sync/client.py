"""What users make of a vLLM server: its control plane, and TRL's client where TRL is installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from ..errors import WeightSyncError
from .control import VLLMControl
from .health import HEALTH_INTERVAL_S


@contextmanager
def _without_version_warnings() -> Iterator[None]:
    """Within the context, TRL does not warn of a vLLM version that it has not met, which it does five times; our check
    at the start of a run says what is supported.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
        yield


try:
    with _without_version_warnings():
        from trl.generation.vllm_client import VLLMClient
except ModuleNotFoundError as exc:
    if exc.name != "trl":
        raise
    # A publish needs nothing of it.
    VLLMClient = object


class AtroposVLLMClient(VLLMControl, VLLMClient):  # type: ignore[misc]  # TRL has no types
    """Talks to one vLLM server that was started with dev mode and a weight transfer engine.

    Differs from [`trl.generation.vllm_client.VLLMClient`] in that

    1. every request has a total deadline, and is sent exactly once (see [`~weight_sync.http.ServerSession`]);
    2. it pauses and resumes the server, names the policy version, and reads it back;
    3. it initialises any weight transfer engine, not only NCCL on CUDA;
    4. it sends an API key;
    5. TRL's own ways to change weights (`init_communicator`, `weight_update`, `update_named_param`,
       `update_named_params`, `update_model_params`) raise: they do not pause the server, which dies of the first
       request that it schedules in between.

    Where TRL is not installed it is the same, without TRL's `generate` and `chat`.

    Every method raises [`WeightSyncTimeout`] at the deadline, [`VLLMServerUnreachable`] if the connection fails,
    [`VLLMServerError`] if the server answers with an error, and [`WeightSyncError`] if the answer is not what its route
    promises.

    Args:
        base_url (`str`):
            Root of the server, for example `"http://127.0.0.1:8000"`.
        connection_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the server to become healthy.
        request_timeout (`float`, *optional*, defaults to `300.0`):
            Deadline in seconds of every single request.
        api_key (`str`, *optional*):
            Sent as `Authorization: Bearer`.

    Raises:
        [`PreflightError`]: if the URL or the key cannot be sent.
        [`WeightSyncTimeout`]: if the server is not healthy in time.

    Example:

    ```python
    client = AtroposVLLMClient("http://127.0.0.1:8000")
    client.get_weight_version()  # 'default': the server's own checkpoint
    with client.weight_sync(policy_version=1) as sync:  # pauses the server
        sync.push(model)
    client.get_weight_version()  # '1', verified, and the server is resumed
    ```
    """

    # TRL's own attributes, for its `generate`, `chat` and `close_communicator`.
    communicator = None

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = HEALTH_INTERVAL_S) -> None:
        """Wait until the server is healthy, in the place of TRL's method of this name."""
        self.wait_until_healthy(total_timeout)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Stands in for TRL's ways to change weights, which are not for this client, and says why."""
        raise WeightSyncError(
            "TRL's init_communicator, weight_update, update_named_param(s) and update_model_params are not available.",
            "They change a server that is not paused, which ends its engine at the next request, wait for NCCL without a "
            "deadline, and finish an update that failed.",
            "Use `with client.weight_sync(policy_version) as sync: sync.push(model)`.",
        )

    init_communicator = weight_update = _refuse
    update_named_param = update_named_params = update_model_params = _refuse
