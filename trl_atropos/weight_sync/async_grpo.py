"""Our transports for TRL's `AsyncGRPOTrainer`: it moves weights over NCCL only, these also work without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..errors import WeightSyncError
from .base import PolicyLayout, TensorSpec, WeightTransport
from .inference_server import InferenceServer
from .server_link import ServerLink
from .weights.staging import StagedPolicy


class AsyncGRPOWeightTransfer:
    """`WeightTransferProtocol` of [`trl.experimental.async_grpo.AsyncGRPOTrainer`] on top of any `WeightTransport`.

    The trainer pauses the server, streams its parameters, resumes it, and counts the policy up; so does this class,
    and the server reports the same number as `weight_version`. What the trainer streams is staged whole before the
    first byte moves: its iterator gathers over ranks, and must be taken to its end whatever happens to the server.

    After a failure the server stays paused, and `resume` refuses to let it answer from half a policy.

    Args:
        client ([`AtroposVLLMClient`]):
            The server.
        transport (`WeightTransport`):
            Moves the weights to the server.
        specs (`Sequence[TensorSpec]`):
            What the trainer streams, in its order and in the server's dtype.
        policy_version (`int`, *optional*, defaults to `0`):
            The trainer's `model_version` at the start of training: more than 0 after a resume.

    Attributes:
        policy_version (`int`):
            Number of the policy that the server holds.

    Example:

    ```python
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    client = AtroposVLLMClient("http://127.0.0.1:8000")
    specs = PolicyWeights(model, torch.bfloat16).manifest()
    transfer = AsyncGRPOWeightTransfer(client, SharedMemoryTransport(), specs)
    trainer = AsyncGRPOTrainer(model="...", weight_transfer=transfer, ...)
    ```
    """

    def __init__(
        self,
        client: InferenceServer,
        transport: WeightTransport,
        specs: Sequence[TensorSpec],
        policy_version: int = 0,
    ):
        self.policy_version = policy_version
        self._layout = PolicyLayout(specs)
        self._staged = StagedPolicy(self._layout)
        self._link = ServerLink(client, transport, specs[0].dtype)
        self._sent_version: int | None = None

    def init_weight_transfer(self) -> None:
        """Connect the transport to every worker.

        Raises:
            [`WeightSyncError`]: if a worker cannot be connected.
        """
        with self._link.naming_the_state(self.policy_version + 1):
            self._link.open(self._layout)

    def pause(self) -> None:
        """Freeze the server. Requests in flight are kept.

        Raises:
            [`WeightSyncError`]: if the server cannot be paused.
        """
        self._link.phase_s = {}
        with self._link.naming_the_state(self.policy_version + 1):
            self._link.pause()

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Stage what the iterator yields, move it, and name it.

        Args:
            iterator (`Iterator[tuple[str, torch.Tensor]]`):
                All tensors of `specs`, in any dtype and on any device. It is always taken to its end.

        Raises:
            [`WeightSyncError`]: if it yields something else, or the server does not take it.
        """
        version = self.policy_version + 1
        try:
            self._staged.stage(
                _Stream(self._layout.specs, iterator), self._layout.specs, [self._link.require_memory()]
            )
        except ValueError as exc:
            raise WeightSyncError(
                f"Policy version {version} cannot be sent to {self._link.client.base_url}: {exc}",
                "The specs were made from another model than the trainer's; the server is paused and holds the previous "
                "policy.",
                "Make them from the model that is trained, with PolicyWeights(model, dtype).manifest().",
            ) from exc
        self._sent_version = None
        with self._link.naming_the_state(version):
            self._link.prepare(self._layout.specs)
            self._link.transfer(self._layout.specs)
            self._link.finish(version)
        self._sent_version = version

    def resume(self) -> None:
        """Let the server answer, and read the version back.

        Raises:
            [`WeightSyncError`]: if the server holds half a policy, or another one than was sent.
        """
        if self._link.state == "transferring" or (self._link.state == "finishing" and self._sent_version is None):
            raise WeightSyncError(
                f"The vLLM server at {self._link.client.base_url} is not resumed: the last update of its weights failed.",
                "The server is paused and holds no complete policy.",
                "Send the weights again, or restart the server.",
            )
        with self._link.naming_the_state(self.policy_version + 1):
            self._link.resume()
            if self._sent_version is not None:
                self._link.verify(self._sent_version, None)
                self.policy_version = self._sent_version

    def destroy(self) -> None:
        """Release the transport. The server keeps its policy."""
        self._link.close()


class _Stream:
    """`WeightSource` of an iterator that another trainer owns."""

    is_collective = True

    def __init__(self, specs: Sequence[TensorSpec], iterator: Iterator[tuple[str, torch.Tensor]]):
        self._specs = specs
        self._iterator = iterator

    def manifest(self) -> Sequence[TensorSpec]:
        return self._specs

    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        return self._iterator
