"""Keeps the servers of a run on the newest policy: when, in which mode, under which version.

    push      PolicyWeights -> plan on rank 0 -> stage, collective if the policy is sharded
    deliver   rank 0: every server is given what is staged, or the adapter, and proves it; with
              `weight_sync_background` on a thread of its own, which the next publish waits for

Only rank 0 talks to servers. `on_main` calls a function there and gives every rank its value, or its error; in a single
process it is a plain call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from peft import PeftModel
from torch import nn

from ..errors import PreflightError, WeightSyncError
from .adapter_publisher import AdapterPublisher
from .background import BackgroundCall
from .base import WeightSource
from .options import WeightSyncOptions
from .probe import LogprobProbe, ProbeReference
from .report import PublishReport
from .server_group import ServerGroup
from .weights.adapter import take_adapter
from .weights.gathering import is_sharded
from .weights.named_tensors import NamedTensors
from .weights.source import PolicyWeights


logger = logging.getLogger(__name__)

T = TypeVar("T")

CLOSE_S = 10.0
"""How long a run that ends with an error waits for the publish in the background, in seconds."""

Policy = nn.Module | Iterable[tuple[str, torch.Tensor]]
"""The unwrapped model, or all of its tensors under the server's names."""


class OnMain(Protocol):
    """Calls a function on rank 0 and gives every rank its value or its error."""

    def __call__(self, function: Callable[[], T], /) -> T:
        """Call it on rank 0, and give every rank its value or its error."""
        ...


def call(function: Callable[[], T]) -> T:
    """`OnMain` of a single process."""
    return function()


class WeightSync:
    """Takes the policy inside `with ... weight_sync(version) as sync`.

    Attributes:
        report (`PublishReport`, *optional*):
            What the publish did; None until the `with` block has ended.
    """

    def __init__(self, publisher: PolicyPublisher, policy_version: int):
        self.report: PublishReport | None = None
        self._publisher = publisher
        self._policy_version = policy_version
        self._is_pushed = False

    def push(self, policy: Policy | WeightSource) -> None:
        """Stage a policy. A second push replaces the first. On several ranks: call it on each of them.

        Args:
            policy (`nn.Module`, `Iterable[tuple[str, torch.Tensor]]` or `WeightSource`):
                The unwrapped model, or all of its tensors under the server's names, or a source of your own. Only a model
                can be compared with what the server answers; for others, names, counts, bytes and version are checked.

        Raises:
            [`WeightSyncError`]: if a server cannot be connected.
            [`PreflightError`]: if the model cannot be published.
        """
        self._publisher.push(policy, self._policy_version)
        self._is_pushed = True

    def deliver(self) -> None:
        """Bring what was pushed onto the servers; the `with` block does it at its end."""
        if not self._is_pushed:
            raise WeightSyncError(
                f"Nothing was pushed as policy version {self._policy_version}.",
                "The server is paused and holds the previous policy.",
                "Call sync.push(model) inside the `with` block, or client.resume().",
            )
        self.report = self._publisher.deliver(self._policy_version)


class PolicyPublisher:
    """Publishes the policies of one trainer. There is one on every rank, and every method is collective.

    The servers, which serve in `dtype`, and the publisher of adapters for the modes `adapter` and `auto` are given on
    rank 0 only; the other ranks have None. `make_probe` gives the sequences that prove the publish of a model; without
    it, versions and checksums do. `on_main` is needed on several ranks. `make_source` makes of a model, and of the servers'
    dtype, what is sent.

    `policy_version` is the number of the policy that was published last, or is on its way in the background, and 0, the
    starting checkpoint, before the first publish.
    """

    def __init__(
        self,
        options: WeightSyncOptions,
        dtype: torch.dtype,
        servers: ServerGroup | None,
        adapters: AdapterPublisher | None = None,
        *,
        make_probe: Callable[[nn.Module], LogprobProbe] | None = None,
        on_main: OnMain = call,
        make_source: Callable[[nn.Module, torch.dtype], WeightSource] = PolicyWeights,
    ):
        self.policy_version = 0
        self._options = options
        self._dtype = dtype
        self._servers = servers
        self._adapters = adapters
        self._make_probe = make_probe
        self._on_main = on_main
        self._make_source = make_source
        # "full", "merged" or "adapter", found out at the first publish.
        self._mode: str | None = None
        self._reference: Callable[[], ProbeReference] | None = None
        self._last_end: float | None = None
        self._has_warned = False
        # Known on every rank, while the publish itself runs on rank 0.
        self._is_in_flight = False
        self._in_flight: BackgroundCall[PublishReport] | None = None

    # The trainer's publishes

    def publish_step(self, model: nn.Module, global_step: int) -> dict[str, float]:
        """Publish the current weights under the next version, in the mode of the run, and prove it.

        `model` is the unwrapped policy after `global_step` optimizer steps. With `weight_sync_background`, this ends when it
        is staged, and begins by waiting for the publish before, whose metrics it returns; the first publish of a run ends
        when it is proven.

        Returns metrics; none at the first publish of a run, which belongs to no step.
        """
        start = time.perf_counter()
        report = self._wait()
        version = self._next_version(global_step)
        if self._mode is None:
            report = self._publish_first(model, version)
        elif self._last_end is None or not self._options.weight_sync_background:
            report = self._on_main(self._prepare(model, version))
        else:
            self._begin(self._prepare(model, version, keeps_model=False))
        return self._account(report, version, time.perf_counter() - start)

    def finish(self) -> dict[str, float]:
        """Wait for the publish in the background, and return the metrics of what it did; none if there is none.

        How long the trainer is held here is not among them: nothing was to be trained in the meantime.
        """
        report = self._wait()
        if report is None:
            return {}
        self._last_end = time.perf_counter()
        return report.metrics()

    def begin_run(self, policy_version: int) -> None:
        """Let the next publish belong to no step: it brings the servers to where a run begins.

        `policy_version` is 0, or, for a run that goes on from a checkpoint, the version under which that was saved.
        """
        self.policy_version = policy_version
        self._last_end = None

    def sleep(self) -> None:
        """Have the servers give their device memory back until the next publish, if `vllm_enable_sleep_mode`."""
        if self._options.vllm_enable_sleep_mode:
            self._on_main(lambda: self._require_servers().sleep())

    # The publish in the background

    def _prepare(self, model: nn.Module, version: int, *, keeps_model: bool = True) -> Callable[[], PublishReport]:
        """Take what a publish in the mode of the run needs from the model, and return the function that delivers it, for
        rank 0.

        With `keeps_model` the weights of the model are still those of this version when the function is called.
        """
        if self._mode == "adapter":
            return self._prepare_adapter(model, version, keeps_model=keeps_model)
        self.push(model, version)
        reference, self._reference = self._reference, None
        if not keeps_model:
            reference = self._computed(reference)
        return lambda: self._require_servers().deliver(version, reference)

    def _prepare_adapter(
        self, model: nn.Module, version: int, *, keeps_model: bool = True
    ) -> Callable[[], PublishReport]:
        assert isinstance(model, PeftModel), "checked at the first publish"
        adapter = take_adapter(model, self._dtype)
        reference = None
        if self._make_probe is not None:
            reference = self._make_reference(model, self._make_probe(model), is_collective=is_sharded(model))
        if not keeps_model:
            reference = self._computed(reference)
        return lambda: self._require_adapters().deliver(adapter, version, reference)

    def _computed(self, reference: Callable[[], ProbeReference] | None) -> Callable[[], ProbeReference] | None:
        """The same answers, computed now; None where no server is going to be compared, and on the other ranks."""
        if reference is None or self._servers is None or not self._servers.needs_probe:
            return None
        expected = reference()
        return lambda: expected

    def _begin(self, deliver: Callable[[], PublishReport]) -> None:
        self._is_in_flight = True
        if self._servers is not None:
            self._in_flight = BackgroundCall(deliver, "publish")

    def _wait(self) -> PublishReport | None:
        """Wait for what is in flight, on every rank, and return its report; None if nothing is."""
        if not self._is_in_flight:
            return None
        in_flight, self._in_flight, self._is_in_flight = self._in_flight, None, False

        def result() -> PublishReport:
            assert in_flight is not None, "rank 0 has begun it"
            return in_flight.result()

        return self._on_main(result)

    # One publish of merged weights

    def publish(self, policy: Policy | WeightSource, version: int) -> PublishReport:
        """Publish a whole policy under a version, and prove it."""
        self.push(policy, version)
        return self.deliver(version)

    def push(self, policy: Policy | WeightSource, version: int) -> None:
        """Stage a policy while the servers serve the previous one: a model, pairs of name and tensor, or a `WeightSource`."""
        self._reference = None
        if isinstance(policy, nn.Module):
            source = self._make_source(policy, self._dtype)
            self._plan_and_stage(source, version)
            if self._make_probe is not None:
                # After the staging, which knows whether a server was restarted.
                probe = self._make_probe(policy)
                self._reference = self._make_reference(policy, probe, is_collective=source.is_collective)
        elif isinstance(policy, Iterable):
            self._plan_and_stage(NamedTensors(policy, self._dtype), version)
        else:
            self._plan_and_stage(policy, version)

    def deliver(self, version: int) -> PublishReport:
        """Bring what was pushed onto every server."""
        # Let go: it holds the model that was pushed.
        reference, self._reference = self._reference, None
        return self._on_main(lambda: self._require_servers().deliver(version, reference))

    @contextmanager
    def weight_sync(
        self, policy_version: int, record: Callable[[dict[str, float]], None] | None = None
    ) -> Iterator[WeightSync]:
        """Pause the servers, let the caller push, deliver. Whole weights follow from then on, also if adapters were
        published.

        `record` is called at the end with the metrics that `publish_step` would return.
        """
        self.finish()
        if self._mode == "adapter":
            self._on_main(lambda: self._require_adapters().withdraw())
            self._mode = "merged"
        start = time.perf_counter()
        sync = WeightSync(self, policy_version)
        self._on_main(lambda: self._require_servers().pause(policy_version))
        try:
            yield sync
        except BaseException:
            logger.error(
                "The `with weight_sync` block ended with an error. The server is paused and holds the previous policy; "
                "client.resume() lets it go on with that."
            )
            raise
        sync.deliver()
        assert sync.report is not None
        metrics = self._account(sync.report, policy_version, time.perf_counter() - start)
        if record is not None:
            record(metrics)

    def _plan_and_stage(self, source: WeightSource, version: int) -> None:
        manifest = source.manifest()

        def plan() -> list[int]:
            planned = {spec.name for spec in self._require_servers().plan(manifest, version)}
            return [index for index, spec in enumerate(manifest) if spec.name in planned]

        specs = [manifest[index] for index in self._on_main(plan)]
        failures: list[BaseException] = []
        if self._servers is not None:
            try:
                self._servers.stage(source, specs)
            except BaseException as exc:
                # Raised below, on every rank.
                failures.append(exc)
        elif source.is_collective:
            for _ in source.tensors(specs):
                pass

        def check() -> None:
            if failures:
                raise failures[0]

        self._on_main(check)

    def _make_reference(
        self, model: nn.Module, probe: LogprobProbe, *, is_collective: bool
    ) -> Callable[[], ProbeReference] | None:
        """Return the function that computes the answers that servers must give. For a sharded model that is a
        collective, which is done here if it is needed.
        """
        dtype = self._dtype
        if not is_collective:
            return lambda: probe.reference(model, dtype)
        if not self._on_main(lambda: self._require_servers().needs_probe):
            return None
        # Every rank takes part in the forward pass, so it cannot wait for the server.
        reference = probe.reference(model, dtype, is_collective=True)
        return lambda: reference

    # Modes

    def _publish_first(self, model: nn.Module, version: int) -> PublishReport:
        """Publish in the mode that the options ask for, or in each that is possible to find out which is cheaper."""
        requested = self._options.weight_sync_mode
        if requested in ("adapter", "auto"):
            obstacle = self._on_main(lambda: self._adapter_obstacle(model))
            if obstacle is None and requested == "adapter":
                self._mode = "adapter"
                return self._publish_adapter(model, version)
            if obstacle is None:
                return self._publish_cheapest(model, version)
            if requested == "adapter":
                raise obstacle
            if isinstance(model, PeftModel):
                logger.info(f"weight_sync_mode auto: merged weights are published. {obstacle.what} {obstacle.why}")
        self._mode = "full" if requested == "full" else "merged"
        return self.publish(model, version)

    def _adapter_obstacle(self, model: nn.Module) -> PreflightError | None:
        try:
            self._require_adapters().check(model)
        except PreflightError as exc:
            return exc
        return None

    def _publish_adapter(self, model: nn.Module, version: int) -> PublishReport:
        return self._on_main(self._prepare_adapter(model, version))

    def _publish_cheapest(self, model: nn.Module, version: int) -> PublishReport:
        """Publish in the cheaper mode. Staging merged weights is a lower bound of what publishing them costs; an
        adapter that takes less is cheaper.
        """
        self.push(model, version)
        # The first one warms the server up.
        self._publish_adapter(model, version)
        report = self._publish_adapter(model, version)
        # Of rank 0: the report is the same on every rank.
        adapter_s = report.total_s - report.phase_s["verify"]
        stage_s = self._on_main(lambda: self._require_servers().stage_s)
        self._mode = "adapter" if adapter_s <= stage_s else "merged"
        logger.info(
            f"weight_sync_mode auto: {self._mode}. Publishing the adapter takes {adapter_s:.3f} s, staging the merged weights "
            f"alone {stage_s:.3f} s."
        )
        if self._mode == "adapter":
            self._reference = None
            self._on_main(lambda: self._require_servers().release())
            return report
        self._on_main(lambda: self._require_adapters().withdraw())
        return self.deliver(version)

    def close(self) -> None:
        """Release the transports. The servers keep the policy that they have; the next publish connects again.

        One that is in flight, which happens in a run that ends with an error only, is left to itself if it does not end in
        time.
        """
        in_flight, self._in_flight, self._is_in_flight = self._in_flight, None, False
        if in_flight is not None:
            self._give_up(in_flight)
        if self._servers is not None:
            self._servers.close()

    def _give_up(self, in_flight: BackgroundCall[PublishReport]) -> None:
        try:
            error = in_flight.error_within(CLOSE_S)
        except TimeoutError:
            error = WeightSyncError(
                f"The publish of policy version {self.policy_version} has not ended after {CLOSE_S:.0f} s.",
                "The run ends with another error, and the server may stay paused.",
                "Go on with --resume_from_checkpoint: it publishes to the server again.",
            )
        if error is not None:
            logger.error(str(error))

    # Versions and the report

    def _next_version(self, global_step: int) -> int:
        if self._last_end is None and global_step % self._options.weight_sync_steps == 0:
            # 0 at the start; after a resume, the policy that the servers held when the checkpoint was saved.
            return self.policy_version
        return self.policy_version + 1

    def _account(self, report: PublishReport | None, version: int, blocked_s: float) -> dict[str, float]:
        """Take note of a publish of this version that held the trainer for `blocked_s` seconds.

        `report` is that of the publish that has ended: this one, or with `weight_sync_background` the one before, None if
        there was none. Returns the metrics, or nothing at the first publish of a run, which belongs to no step.
        """
        self.policy_version = version
        now = time.perf_counter()
        last_end, self._last_end = self._last_end, now
        if last_end is None:
            assert report is not None, "the first publish ends when it is proven"
            difference = (
                "" if report.probe is None else f", mean |logprob difference| {report.probe.mean_abs_diff:.4f}"
            )
            logger.info(
                f"Published policy version {report.policy_version} ({report.mode}) in {report.total_s:.2f} s: "
                f"{report.num_bytes / 1e6:.0f} MB{difference}"
            )
            return {}
        fraction = blocked_s / (now - last_end)
        self._warn_if_large(fraction, blocked_s, report)
        metrics = {} if report is None else report.metrics()
        return {**metrics, "perf/weight_sync_blocked_s": blocked_s, "perf/weight_sync_fraction": fraction}

    def _warn_if_large(self, fraction: float, blocked_s: float, report: PublishReport | None) -> None:
        if fraction <= self._options.weight_sync_warn_fraction or self._has_warned or report is None:
            return
        self._has_warned = True
        slowest = sorted(report.phase_s.items(), key=lambda item: -item[1])[:3]
        logger.warning(
            f"Publishing takes {fraction:.0%} of the time of a step ({blocked_s:.2f} s; the phases: "
            + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in slowest)
            + f"). {self._how_to_shorten()}, or with LoRA publish the adapter (--weight_sync_mode adapter); or set "
            "--weight_sync_warn_fraction. Said once."
        )

    def _how_to_shorten(self) -> str:
        if self._options.vllm_enable_sleep_mode:
            # The server sleeps while the trainer works: it is published to after every step, and not beside one.
            return "Train on more rollouts a step (--per_device_train_batch_size, --gradient_accumulation_steps)"
        return "Publish beside the training (--weight_sync_background true; not over NCCL), less often (--weight_sync_steps)"

    def _require_servers(self) -> ServerGroup:
        assert self._servers is not None, "only rank 0 has servers"
        return self._servers

    def _require_adapters(self) -> AdapterPublisher:
        assert self._adapters is not None, "only rank 0 of a trainer publishes adapters"
        return self._adapters
