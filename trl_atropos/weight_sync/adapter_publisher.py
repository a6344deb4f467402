"""Keeps servers on the newest LoRA adapter: nothing pauses, and a small fraction of the bytes travels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from ..errors import PreflightError
from .delivered import Delivered
from .failures import run_step
from .options import WeightSyncOptions
from .probe import ProbeReference
from .report import PublishReport
from .server_link import UNPUBLISHED, ServerLink
from .transports.adapter_files import AdapterTransfer, SavedAdapter, routed_adapter
from .weights.adapter import Adapter, check_adapter


class AdapterPublisher:
    """Publishes the adapter itself to one or several servers and proves it after every publish.

    The transports of the links are not used: the adapter travels through `directory`, which belongs to this run alone
    and which every server must see under the same path ([`~weight_sync.transports.adapter_files.AdapterTransfer`]).
    The options say what happens on a failure.
    """

    def __init__(self, links: Sequence[ServerLink], directory: Path, options: WeightSyncOptions | None = None):
        self.links = list(links)
        self.options = options or WeightSyncOptions()
        self._transfer = AdapterTransfer([link.client for link in self.links], directory)

    def check(self, model: nn.Module) -> None:
        """Refuse a policy or a server for which only merged weights will do.

        Raises:
            [`PreflightError`]: naming the obstacle.
        """
        needs = check_adapter(model)
        for link in self.links:
            link.client.check_adapters(needs, keep=self._transfer.keep)
            version = link.client.get_weight_version()
            if version != UNPUBLISHED and routed_adapter(link.client).name is None:
                raise PreflightError(
                    f"The {link.client.kind} server at {link.client.base_url} holds weights that were published as version {version}.",
                    "An adapter belongs on the checkpoint that the server was started with.",
                    "Restart the server, or publish merged weights (--weight_sync_mode merged).",
                )

    def deliver(
        self, adapter: Adapter, policy_version: int, reference: Callable[[], ProbeReference] | None
    ) -> PublishReport:
        """Bring an adapter onto every server under a version, and prove it.

        `reference` computes what the servers must answer; without it only the version is read back.

        Raises:
            [`WeightSyncError`]: naming the server and its state. It serves the previous adapter, or is paused with one that
                is not proven.
        """
        start = time.perf_counter()
        saved = self._transfer.save(adapter, policy_version)
        delivered = Delivered(reference)
        outcome = run_step(
            self.links, lambda link: self._deliver(link, saved, delivered), policy_version, self.options
        )
        return delivered.report(
            policy_version=policy_version,
            mode="adapter",
            total_s=time.perf_counter() - start + adapter.gather_s,
            phase_s={"gather": adapter.gather_s, "stage": saved.write_s},
            outcome=outcome,
        )

    def withdraw(self) -> None:
        """Route requests to the model itself again, because merged weights follow."""
        for link in self.links:
            link.client.route_adapter(None, link.version or 0)

    def _deliver(self, link: ServerLink, saved: SavedAdapter, delivered: Delivered) -> None:
        expected = delivered.expect() if link.needs_probe else None
        if link.version is None:
            link.client.wait_until_healthy(self.options.vllm_server_timeout)
        else:
            link.check_version()
        if link.options.vllm_enable_sleep_mode:
            link.wake_up()
        link.phase_s = self._transfer.load(link.client, saved)
        link.phase_s["transfer"] = link.phase_s["load"]
        if link.client.is_paused():
            # By an earlier publish that could not be proven, or by another trainer that ended in the middle of one.
            link.resume()
        probe = link.verify(saved.policy_version, expected)
        self._transfer.discard_old(link.client)
        delivered.add(link.phase_s, saved.num_bytes, probe)
