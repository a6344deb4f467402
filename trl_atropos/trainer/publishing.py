"""When the trainer publishes, under which version, and what it reports of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import nn

from ..distributed import run_on_main_process
from ..errors import PreflightError
from ..weight_sync.adapter_publisher import AdapterPublisher
from ..weight_sync.probe import LogprobProbe
from ..weight_sync.publisher import PolicyPublisher
from ..weight_sync.report import PublishReport
from ..weight_sync.session import WeightSync, make_reference, paused
from ..weight_sync.weights.adapter import take_adapter
from .atropos_config import AtroposConfig


if TYPE_CHECKING:
    from .servers import Connections


logger = logging.getLogger(__name__)


class TrainerPublishing:
    """The publishes of one run. Every method is collective: call it on every rank.

    Args:
        args ([`AtroposConfig`]):
            Options of the run.
        connections ([`~trainer.servers.Connections`], *optional*):
            On rank 0; None on the others.
        probe ([`~weight_sync.probe.LogprobProbe`]):
            Proves each publish.
        dtype (`torch.dtype`):
            The servers'.

    Attributes:
        policy_version (`int`):
            Of the last publish.
    """

    def __init__(self, args: AtroposConfig, connections: Connections | None, probe: LogprobProbe, dtype: torch.dtype):
        self.args = args
        self.policy_version = 0
        self._publisher: PolicyPublisher | None = None
        self._adapter_publisher: AdapterPublisher | None = None
        if connections is not None:
            self._publisher = connections.publisher
            self._adapter_publisher = connections.adapter_publisher
        self._mode: str | None = None
        self._probe = probe
        self._dtype = dtype
        self._last_end: float | None = None
        self._has_warned = False

    def publish(self, model: nn.Module, global_step: int) -> dict[str, float]:
        """Publish the current weights, and prove it.

        Args:
            model (`nn.Module`):
                The unwrapped policy.
            global_step (`int`):
                Optimizer steps done so far.

        Returns:
            `dict[str, float]`: metrics; empty at the first publish of a run, which belongs to no step.
        """
        version = self._next_version(global_step)
        if self._mode == "adapter":
            return self._account(self._publish_adapter(model, version))
        if self._mode is None:
            return self._account(self._publish_first(model, version))
        return self._account(self._publish_weights(model, version))

    @contextmanager
    def weight_sync(self, policy_version: int, record: Callable[[dict[str, float]], None]) -> Iterator[WeightSync]:
        """See [`AtroposTrainer.weight_sync`]. Whole weights follow from then on, also if adapters were published so far.

        Args:
            policy_version (`int`):
                Of the weights.
            record (`Callable[[dict[str, float]], None]`):
                Takes the metrics, as `publish` returns them.
        """
        if self._mode == "adapter":
            self._withdraw_adapter()
            self._mode = "merged"
        with paused(self._new_sync(policy_version)) as sync:
            yield sync
        assert sync.report is not None
        record(self._account(sync.report))

    def sleep(self) -> None:
        """Have the servers give their device memory back until the next publish, if `vllm_enable_sleep_mode`."""
        publisher = self._publisher
        if self.args.vllm_enable_sleep_mode:
            run_on_main_process(lambda: None if publisher is None else publisher.sleep())

    def _publish_weights(self, model: nn.Module, version: int) -> PublishReport:
        sync = self._new_sync(version)
        sync.push(model)
        return sync.deliver()

    def _publish_adapter(self, model: nn.Module, version: int) -> PublishReport:
        assert isinstance(model, PeftModel)
        adapter = take_adapter(model, self._dtype)
        needs_probe = run_on_main_process(lambda: self._require_publisher().needs_probe)
        reference = make_reference(model, self._probe, self._dtype, needs_probe)

        def deliver() -> PublishReport:
            assert self._adapter_publisher is not None
            return self._adapter_publisher.deliver(adapter, version, reference)

        return run_on_main_process(deliver)

    def _publish_first(self, model: nn.Module, version: int) -> PublishReport:
        """Publish in the mode that the options ask for, or in each that is possible to find out which is cheaper."""
        requested = self.args.weight_sync_mode
        if requested in ("adapter", "auto"):
            obstacle = run_on_main_process(lambda: self._adapter_obstacle(model))
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
        return self._publish_weights(model, version)

    def _adapter_obstacle(self, model: nn.Module) -> PreflightError | None:
        assert self._adapter_publisher is not None
        try:
            self._adapter_publisher.check(model)
        except PreflightError as exc:
            return exc
        return None

    def _publish_cheapest(self, model: nn.Module, version: int) -> PublishReport:
        """Staging merged weights is a lower bound of what publishing them costs; an adapter that takes less is cheaper."""
        sync = self._new_sync(version)
        sync.push(model)
        # The first one warms the server up.
        self._publish_adapter(model, version)
        report = self._publish_adapter(model, version)
        # Of rank 0: the report is the same on every rank.
        adapter_s = report.total_s - report.phase_s["verify"]
        stage_s = run_on_main_process(lambda: self._require_publisher().stage_s)
        self._mode = "adapter" if adapter_s <= stage_s else "merged"
        logger.info(
            f"weight_sync_mode auto: {self._mode}. Publishing the adapter takes {adapter_s:.3f} s, staging the merged weights "
            f"alone {stage_s:.3f} s."
        )
        if self._mode == "adapter":
            run_on_main_process(lambda: self._require_publisher().release())
            return report
        self._withdraw_adapter()
        return sync.deliver()

    def _withdraw_adapter(self) -> None:
        def withdraw() -> None:
            assert self._adapter_publisher is not None
            self._adapter_publisher.withdraw()

        run_on_main_process(withdraw)

    def _require_publisher(self) -> PolicyPublisher:
        assert self._publisher is not None, "only rank 0 has one"
        return self._publisher

    def _new_sync(self, policy_version: int) -> WeightSync:
        return WeightSync(
            self._publisher, policy_version, self._dtype, lambda model: self._probe, on_main=run_on_main_process
        )

    def resume(self, policy_version: int) -> None:
        """Go on from the version that a checkpoint was saved under."""
        self.policy_version = policy_version

    def _next_version(self, global_step: int) -> int:
        if self._last_end is None and global_step % self.args.weight_sync_steps == 0:
            # 0 at the start; after a resume, the policy that the servers held when the checkpoint was saved.
            return self.policy_version
        return self.policy_version + 1

    def _account(self, report: PublishReport) -> dict[str, float]:
        self.policy_version = report.policy_version
        now = time.perf_counter()
        last_end, self._last_end = self._last_end, now
        if last_end is None:
            difference = (
                "" if report.probe is None else f", mean |logprob difference| {report.probe.mean_abs_diff:.4f}"
            )
            logger.info(
                f"Published policy version {report.policy_version} ({report.mode}) in {report.total_s:.2f} s: "
                f"{report.num_bytes / 1e6:.0f} MB{difference}"
            )
            return {}
        fraction = report.total_s / (now - last_end)
        self._warn_if_large(fraction, report)
        return {**report.metrics(), "perf/weight_sync_fraction": fraction}

    def _warn_if_large(self, fraction: float, report: PublishReport) -> None:
        if fraction <= self.args.weight_sync_warn_fraction or self._has_warned:
            return
        self._has_warned = True
        slowest = sorted(report.phase_s.items(), key=lambda item: -item[1])[:3]
        logger.warning(
            f"Publishing takes {fraction:.0%} of the time of a step ({report.total_s:.2f} s, of which "
            + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in slowest)
            + "). Publish less often (--weight_sync_steps), train with LoRA and publish the adapter "
            "(--weight_sync_mode adapter), or set --weight_sync_warn_fraction. Said once."
        )
