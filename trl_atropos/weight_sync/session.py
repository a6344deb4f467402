"""A publish of one process or of several ranks, and `weight_sync`, the same as a context manager.

Only rank 0 talks to servers. `on_main` calls a function there and gives every rank its value, or its error; in a single
process it is a plain call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from ..errors import WeightSyncError
from .base import TensorSpec, WeightSource
from .failures import FailurePolicy
from .probe import LogprobProbe, ProbeReference
from .publisher import PolicyPublisher, PublishOptions
from .report import PublishReport
from .server_link import ServerLink
from .transports.choose import make_transport
from .weights.gathering import is_sharded
from .weights.source import PolicyWeights


if TYPE_CHECKING:
    from .client import AtroposVLLMClient


logger = logging.getLogger(__name__)

T = TypeVar("T")


class OnMain(Protocol):
    """Calls a function on rank 0 and gives every rank its value or its error."""

    def __call__(self, function: Callable[[], T], /) -> T:
        """Call it on rank 0, and give every rank its value or its error."""
        ...


def call(function: Callable[[], T]) -> T:
    """`OnMain` of a single process."""
    return function()


class NamedTensors:
    """`WeightSource` of pairs of name and tensor.

    Args:
        pairs (`Iterable[tuple[str, torch.Tensor]]`):
            A complete policy under the server's names.
        dtype (`torch.dtype`):
            The server's.
    """

    is_collective = False

    def __init__(self, pairs: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype):
        self._tensors = dict(pairs)
        self._specs = tuple(
            TensorSpec(name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        )

    def manifest(self) -> Sequence[TensorSpec]:
        """What was given, in its order."""
        return self._specs

    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what was given."""
        for spec in specs:
            yield spec.name, self._tensors[spec.name]


class WeightSync:
    """Takes the policy inside `with ... weight_sync(version) as sync`.

    Args:
        publisher (`PolicyPublisher`, *optional*):
            On rank 0; None on the others.
        policy_version (`int`):
            Number of the policy.
        dtype (`torch.dtype`):
            The servers'.
        make_probe (`Callable[[nn.Module], LogprobProbe]`, *optional*):
            Gives the sequences that prove the publish of a model.
        on_main (`OnMain`, *optional*):
            For several ranks.

    Attributes:
        report (`PublishReport`, *optional*):
            What the publish did; None until the `with` block has ended.
    """

    def __init__(
        self,
        publisher: PolicyPublisher | None,
        policy_version: int,
        dtype: torch.dtype,
        make_probe: Callable[[nn.Module], LogprobProbe] | None = None,
        on_main: OnMain = call,
    ):
        self.report: PublishReport | None = None
        self._publisher = publisher
        self._policy_version = policy_version
        self._dtype = dtype
        self._make_probe = make_probe
        self._on_main = on_main
        self._is_pushed = False
        self._reference: Callable[[], ProbeReference] | None = None

    def push(self, policy: nn.Module | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Stage a policy. A second push replaces the first. On several ranks: call it on each of them.

        Args:
            policy (`nn.Module` or `Iterable[tuple[str, torch.Tensor]]`):
                The unwrapped model, or all of its tensors under the server's names. Only a model can be compared with
                what the server answers; for tensors, names, counts, bytes and version are checked.

        Raises:
            [`WeightSyncError`]: if a server cannot be connected.
            [`PreflightError`]: if the model cannot be published.
        """
        self._reference = None
        if isinstance(policy, nn.Module):
            self.push_source(PolicyWeights(policy, self._dtype))
            if self._make_probe is not None:
                # After the staging, which knows whether a server was restarted.
                needs_probe = self._on_main(self._needs_probe)
                self._reference = make_reference(policy, self._make_probe(policy), self._dtype, needs_probe)
        else:
            self.push_source(NamedTensors(policy, self._dtype))

    def push_source(self, source: WeightSource) -> None:
        """Stage a policy from a `WeightSource` of your own. See `push`."""
        _plan_and_stage(self._publisher, source, self._policy_version, self._on_main)
        self._is_pushed = True

    def _needs_probe(self) -> bool:
        assert self._publisher is not None
        return self._publisher.needs_probe

    def pause(self) -> None:
        """Freeze the servers; the `with` statement does it at its start."""

        def pause() -> None:
            assert self._publisher is not None
            self._publisher.pause(self._policy_version)

        self._on_main(pause)

    def deliver(self) -> PublishReport:
        """Bring what was pushed onto the servers; the `with` block does it at its end."""
        if not self._is_pushed:
            raise WeightSyncError(
                f"Nothing was pushed as policy version {self._policy_version}.",
                "The server is paused and holds the previous policy.",
                "Call sync.push(model) inside the `with` block, or client.resume().",
            )

        def deliver() -> PublishReport:
            assert self._publisher is not None
            return self._publisher.deliver(self._policy_version, self._reference)

        self.report = self._on_main(deliver)
        return self.report


def make_reference(
    model: nn.Module, probe: LogprobProbe, dtype: torch.dtype, needs_probe: bool
) -> Callable[[], ProbeReference] | None:
    """What computes the answers that servers must give; for a sharded model, a collective that is done here if needed."""
    if is_sharded(model):
        if not needs_probe:
            return None
        # Every rank takes part in the forward pass, so it cannot wait for the server.
        reference = probe.reference(model, dtype, is_collective=True)
        return lambda: reference
    return lambda: probe.reference(model, dtype)


@contextmanager
def paused(sync: WeightSync) -> Iterator[WeightSync]:
    """Pause the servers, let the caller push, deliver."""
    sync.pause()
    try:
        yield sync
    except BaseException:
        logger.error(
            "The `with weight_sync` block ended with an error. The server is paused and holds the previous policy; "
            "client.resume() lets it go on with that."
        )
        raise
    sync.deliver()


@contextmanager
def weight_sync(client: AtroposVLLMClient, policy_version: int, **options: Any) -> Iterator[WeightSync]:
    """Publish to one server without a trainer.

    The server is paused on entry. At the end of the block it holds what was pushed under `policy_version`, proven and
    resumed; or an error is raised with the server still paused.

    Args:
        client (`AtroposVLLMClient`):
            The server.
        policy_version (`int`):
            Number of the policy, reported by the server as `weight_version`.
        transport (`WeightTransport`, *optional*):
            Chosen from what the server reports if not given.
        device (`torch.device`, *optional*):
            Where the model lies; a CPU if not given.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            For the text of the logprob probe; without it, fixed token ids are scored.

    Raises:
        [`WeightSyncError`]: naming the state of the server.

    Example:

    ```python
    client = AtroposVLLMClient("http://127.0.0.1:8000")
    with client.weight_sync(policy_version=1) as sync:
        sync.push(model)
    sync.report.probe.mean_abs_diff  # trainer against server, in nats
    ```
    """
    transport, device, tokenizer = (options.pop(name, None) for name in ("transport", "device", "tokenizer"))
    if options:
        raise TypeError(f"weight_sync() has no option {sorted(options)}.")
    info = client.get_server_info()
    dtype = getattr(torch, info["model_config"]["dtype"].removeprefix("torch."))
    if transport is None:
        backend = (info["weight_transfer_config"] or {}).get("backend")
        transport = make_transport(backend, client, torch.device(device or "cpu"), timeout_s=client.request_timeout)
    publisher = PolicyPublisher(
        [ServerLink(client, transport, dtype)], PublishOptions(failure_policy=FailurePolicy("abort"))
    )
    sync = WeightSync(publisher, policy_version, dtype, lambda model: LogprobProbe(tokenizer, vocab_size_of(model)))
    try:
        with paused(sync):
            yield sync
    finally:
        publisher.close()


def vocab_size_of(model: nn.Module) -> int:
    """Rows of the model's embedding."""
    config: Any = model.config
    return config.get_text_config().vocab_size


def _plan_and_stage(
    publisher: PolicyPublisher | None, source: WeightSource, policy_version: int, on_main: OnMain
) -> None:
    manifest = source.manifest()

    def plan() -> list[int]:
        assert publisher is not None
        planned = {spec.name for spec in publisher.plan(manifest, policy_version)}
        return [index for index, spec in enumerate(manifest) if spec.name in planned]

    specs = [manifest[index] for index in on_main(plan)]
    failures: list[BaseException] = []
    if publisher is not None:
        try:
            publisher.stage(source, specs)
        except BaseException as exc:
            # Raised below, on every rank.
            failures.append(exc)
    elif source.is_collective:
        for _ in source.tensors(specs):
            pass

    def check() -> None:
        if failures:
            raise failures[0]

    on_main(check)
