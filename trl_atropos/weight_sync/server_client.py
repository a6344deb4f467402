"""What the clients of all kinds of inference servers have in common: the connection, and a whole publish."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .health import wait_for_answer
from .http import Answer, ServerSession
from .publisher import WeightSync
from .session import weight_sync


if TYPE_CHECKING:
    import requests

    from .inference_server import InferenceServer


class ServerClient:
    """The part of an [`InferenceServer`] that is the same for every kind of server.

    A derived class names its kind and the route that a healthy server answers, also while it is paused. The arguments are
    those of [`AtroposVLLMClient`].
    """

    kind: str
    """Which software it is, a key of [`~weight_sync.http.KINDS`]."""
    health_route: str
    """The route that `wait_until_healthy` asks."""

    def __init__(
        self,
        base_url: str,
        *,
        connection_timeout: float = 240.0,
        request_timeout: float = 300.0,
        api_key: str | None = None,
    ):
        # Environments are given the same address with the prefix of the OpenAI routes; the control routes have none.
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._server_session = ServerSession(self.base_url, request_timeout, api_key, kind=self.kind)
        # Under the type that the protocol has.
        self.session: requests.Session = self._server_session
        self.wait_until_healthy(connection_timeout)
        self.model = self._served_model()

    @property
    def request_timeout(self) -> float:
        """Deadline in seconds of every single request."""
        return self._server_session.timeout_s

    @request_timeout.setter
    def request_timeout(self, timeout_s: float) -> None:
        self._server_session.timeout_s = timeout_s

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Wait until the server answers 200, also while it is paused, and log every ten seconds what it answers instead.

        Args:
            timeout_s (`float`):
                Longest wait in seconds. At least one request is sent.

        Raises:
            [`WeightSyncTimeout`]: if the server is not healthy in time.
        """
        wait_for_answer(self._server_session, self.health_route, timeout_s)

    def list_models(self) -> list[str]:
        """Return the names that requests can ask for: the model's, and those of its LoRA adapters."""
        answer = Answer(self._server_session.get(f"{self.base_url}/v1/models"), kind=self.kind)
        models = answer.get_typed("data", list)
        if not all(isinstance(model, dict) and isinstance(model.get("id"), str) for model in models):
            raise answer.unexpected("models with an `id`", models)
        return [model["id"] for model in models]

    def weight_sync(self: InferenceServer, policy_version: int, **options: Any) -> AbstractContextManager[WeightSync]:
        """Publish one policy: pause, take what is pushed, move, verify, resume. See the class for an example.

        Args:
            policy_version (`int`):
                Number of the policy.
            **options:
                `transport`, `device` and `tokenizer`, which [`~weight_sync.session.weight_sync`] describes.
        """
        return weight_sync(self, policy_version, **options)

    def _served_model(self) -> str:
        raise NotImplementedError
