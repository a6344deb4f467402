"""What publisher, probe, links and checks ask of an inference server, whichever kind it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol


if TYPE_CHECKING:
    import requests

    from ..types import ServedCall
    from .weights.adapter import AdapterNeeds


@dataclass(frozen=True)
class ServerDescription:
    """What a server says of itself.

    Args:
        model (`str`):
            Path or Hub id of the checkpoint that it was started with.
        tokenizer (`str`, *optional*):
            Path or Hub id of its tokenizer; None if it has none.
        tokenizer_revision (`str`, *optional*):
            Revision of that on the Hub; None for the newest.
        dtype (`str`):
            What it serves in, by torch's name: `"bfloat16"`.
        backend (`str`, *optional*):
            How it receives weights, a name of [`~weight_sync.transports.backends.BACKENDS`]; None if it cannot.
        max_model_len (`int`):
            The longest sequence that it generates, in tokens.
        logprobs_mode (`str`):
            `"processed_logprobs"` if its logprobs are those of the distribution that it samples from, after
            temperature.
        has_lora (`bool`):
            Whether it can run LoRA adapters.
        loads_adapters (`bool`):
            Whether it loads adapters of this trainer while it runs.
    """

    model: str
    tokenizer: str | None
    tokenizer_revision: str | None
    dtype: str
    backend: str | None
    max_model_len: int
    logprobs_mode: str
    has_lora: bool
    loads_adapters: bool


class InferenceServer(Protocol):
    """The verbs of one inference server. [`AtroposVLLMClient`] and [`AtroposSGLangClient`] are two.

    Each has the same meaning everywhere; what a kind of server calls it, in which order it wants its requests and what
    it forgets to refuse is the client's business alone. A verb that a kind of server does not have raises
    [`PreflightError`] with what to do instead.

    Every verb is one request or a few, each sent once and with a deadline. It raises [`WeightSyncTimeout`] at the
    deadline, [`VLLMServerUnreachable`] if the connection fails, [`VLLMServerError`] if the server answers with an
    error, and [`WeightSyncError`] if the answer is not what its route promises.
    """

    kind: str
    """Which software it is, for messages: `"vLLM"` or `"SGLang"`."""
    base_url: str
    """Root URL, without a slash at the end."""
    model: str
    """The name that requests ask for."""
    session: requests.Session
    """Sends further requests to the server, each once and with a deadline."""
    request_timeout: float
    """Deadline in seconds of every single request."""

    # Server

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Wait until the server answers, at most `timeout_s` seconds, also while it is paused."""
        ...

    def describe(self) -> ServerDescription:
        """Return what the server says of itself.

        Raises:
            [`PreflightError`]: if it was started so, or is of a version, that a policy cannot be published to.
        """
        ...

    def knows_policy_versions(self) -> bool:
        """Whether `find_calls` can tell under which policy a rollout was sampled."""
        ...

    def get_world_size(self) -> int:
        """Return the number of workers that receive weights."""
        ...

    def list_models(self) -> list[str]:
        """Return the names that requests can ask for: the model's, and those of its LoRA adapters."""
        ...

    # Generation

    def pause(self, *, clear_cache: bool = True) -> None:
        """Freeze generation: requests in flight and new ones wait for `resume`. Pausing twice is pausing once.

        Args:
            clear_cache (`bool`, *optional*, defaults to `True`):
                Whether the keys and values of requests in flight are computed again after `resume`, under the weights
                that are there then.
        """
        ...

    def resume(self) -> None:
        """Let frozen and waiting requests run."""
        ...

    def is_paused(self) -> bool:
        """Whether generation is frozen."""
        ...

    def sleep(self, level: int) -> None:
        """Give device memory back. `level` 1 keeps the weights in host memory, 2 drops them."""
        ...

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take device memory again: what `tags` name (`"weights"`, `"kv_cache"`), everything without them."""
        ...

    # Weights

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the workers meet the trainer; `init_info` is between the transport and this kind of server."""
        ...

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect the workers from the trainer that they met last."""
        ...

    def begin_weight_update(self) -> None:
        """Begin a weight update; one that another trainer left unfinished is replaced. Pause first."""
        ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Have the workers receive and load tensors; returns when every worker has."""
        ...

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the weights in place and name them; without a name they keep the old one."""
        ...

    def get_weight_version(self) -> str:
        """Return the name of the weights that are served; `"default"` before the first publish."""
        ...

    def set_weight_version(self, version: str) -> None:
        """Name the weights that are served without changing them. Requests in flight go on."""
        ...

    # LoRA adapters

    def check_adapters(self, needs: AdapterNeeds, *, keep: int = 2) -> None:
        """Refuse a server that cannot serve adapters of this trainer, of which `keep` serve at a time.

        Raises:
            [`PreflightError`]: naming the option of the server.
        """
        ...

    def load_lora_adapter(self, name: str, path: str) -> None:
        """Load an adapter from a directory, as the server sees it, under a name that is not taken."""
        ...

    def unload_lora_adapter(self, name: str) -> None:
        """Forget an adapter. Requests in flight that use it end with it."""
        ...

    def route_adapter(self, name: str | None, policy_version: int) -> None:
        """Answer requests for the model with an adapter that was loaded; None: with the model itself."""
        ...

    def get_adapter_route(self) -> Mapping[str, Any]:
        """Return `lora_name`, `policy_version` and `num_in_flight` of what answers for the model."""
        ...

    # Rollouts

    def find_calls(self, rollout_keys: Sequence[str]) -> list[ServedCall | None]:
        """Return what the server remembers of the calls that sampled these completions; None for an unknown one."""
        ...

    def get_prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score sequences of token ids, each of length T >= 2, under the served policy.

        Returns:
            `list[list[float]]`: per sequence the logprobs, in nats at temperature 1, of tokens 1..T-1.
        """
        ...

    def render_messages(self, messages: list[dict[str, str]]) -> list[int] | None:
        """Return the token ids that the server makes of a conversation; None if it has no chat template."""
        ...
