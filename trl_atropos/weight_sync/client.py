"""What users make of a vLLM server: its control plane, and a whole publish as a context manager."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from .control import VLLMControl
from .publisher import WeightSync
from .session import weight_sync


class AtroposVLLMClient(VLLMControl):
    """Talks to one vLLM server that was started with dev mode and a weight transfer engine.

    Differs from [`trl.generation.vllm_client.VLLMClient`] in that

    1. every request has a total deadline, and is sent exactly once (see [`~weight_sync.http.ServerSession`]);
    2. it pauses and resumes the server, names the policy version, and reads it back;
    3. it initialises any weight transfer engine, not only NCCL on CUDA;
    4. it sends an API key;
    5. TRL's own ways to change weights (`init_communicator`, `weight_update`, `update_named_param`,
       `update_named_params`, `update_model_params`) raise: they do not pause the server, which dies of the first
       request that it schedules in between.

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

    def weight_sync(self, policy_version: int, **options: Any) -> AbstractContextManager[WeightSync]:
        """Publish one policy: pause, take what is pushed, move, verify, resume. See the class for an example.

        Args:
            policy_version (`int`):
                Number of the policy.
            **options:
                `transport`, `device` and `tokenizer`, which [`~weight_sync.session.weight_sync`] describes.
        """
        return weight_sync(self, policy_version, **options)
