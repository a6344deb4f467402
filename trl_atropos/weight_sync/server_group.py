"""Brings staged policies onto all servers of a run.

    plan      connect to servers that are new or were restarted; which tensors
    stage     gather, merge, cast, copy          every server serves version v
    deliver   per server: build and pause, or pause and transfer; finish, resume, verify (`server_link.py`)

Only `stage` is collective, if the policy is sharded over ranks (`publisher.py`). What was staged stays staged, so that a server
that fails in `deliver` can be given everything again without the other ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .base import PolicyLayout, TensorSpec, WeightSource
from .delivered import Delivered
from .failures import Outcome, run_step
from .options import WeightSyncOptions
from .probe import ProbeReference
from .report import PublishReport
from .server_link import ServerLink
from .weights.staging import StagedPolicy, StageReport


class ServerGroup:
    """One or several servers, and what each step of a publish does to all of them. Exists on rank 0 only.

    The options say what is sent, and what happens on a failure. `check_server` is called before a server is connected,
    and raises `PreflightError` if it is not the one that is wanted.
    """

    def __init__(
        self,
        links: Sequence[ServerLink],
        options: WeightSyncOptions | None = None,
        check_server: Callable[[ServerLink], None] | None = None,
    ):
        self.links = list(links)
        self.options = options or WeightSyncOptions()
        self.check_server = check_server
        self._staged: StagedPolicy | None = None
        self._specs: tuple[TensorSpec, ...] = ()
        self._phase_s: dict[str, float] = {}
        self._swallowed_fraction: float | None = None
        self._num_publishes = 0
        self._connecting = Outcome()
        self._start = 0.0

    def plan(self, manifest: Sequence[TensorSpec], policy_version: int) -> tuple[TensorSpec, ...]:
        """Connect to the servers that need it and return what is to be staged.

        That is everything in the manifest, which lists all tensors of the policy, at the first time; afterwards it is
        what training can have changed, unless the options want everything sent again.
        """
        self._start = time.perf_counter()
        is_new = self._staged is None or self._staged.layout.specs != tuple(manifest)
        if is_new:
            self._staged = StagedPolicy(PolicyLayout(manifest))
            for link in self.links:
                link.forget()
        self._connecting = run_step(self.links, self._connect, policy_version, self.options)
        trained = tuple(spec for spec in manifest if spec.is_trained)
        interval = self.options.weight_sync_full_interval
        is_due = interval is not None and self._num_publishes % interval == 0
        self._num_publishes += 1
        sends_everything = is_new or is_due or self.options.weight_sync_mode == "full" or not trained
        self._specs = tuple(manifest) if sends_everything else trained
        return self._specs

    def pause(self, policy_version: int) -> None:
        """Freeze every server. The next `deliver` does not pause them again."""

        def pause(link: ServerLink) -> None:
            link.phase_s = {}
            link.pause()

        self._start = time.perf_counter()
        run_step(self.links, pause, policy_version, self.options)

    def stage(self, source: WeightSource, specs: Sequence[TensorSpec]) -> None:
        """Gather, merge, cast and copy. The servers keep serving."""
        assert self._staged is not None, "plan() comes first"
        report = self._staged.stage(source, specs, [link.require_memory() for link in self.links])
        self._swallowed_fraction = report.swallowed_fraction
        self._phase_s = _stage_phases(source, report)

    def deliver(self, policy_version: int, reference: Callable[[], ProbeReference] | None) -> PublishReport:
        """Bring what is staged onto every server under a version, and prove it.

        `reference` computes what the servers must answer; it is called at most once, before they are paused.
        """
        delivered = Delivered(reference)
        outcome = run_step(
            self.links, lambda link: self._deliver(link, policy_version, delivered), policy_version, self.options
        )
        assert self._staged is not None
        return delivered.report(
            policy_version=policy_version,
            mode="full" if len(self._specs) == len(self._staged.layout.specs) else "merged",
            total_s=time.perf_counter() - self._start,
            phase_s=self._phase_s,
            outcome=outcome + self._connecting,
            swallowed_fraction=self._swallowed_fraction,
        )

    @property
    def needs_probe(self) -> bool:
        """Whether logprobs will be compared on any server at the next publish."""
        return any(link.needs_probe for link in self.links)

    @property
    def stage_s(self) -> float:
        """Seconds that the last `stage` took: less than any publish of these weights."""
        return sum(self._phase_s.values())

    def sleep(self) -> None:
        """Have every server give its device memory back until the next publish."""
        for link in self.links:
            link.sleep()

    def release(self) -> None:
        """Release the transports and the staged policy; the next publish begins anew."""
        self._staged = None
        for link in self.links:
            link.forget()

    def close(self) -> None:
        """Release the transports. The servers keep the policy that they have."""
        for link in self.links:
            link.close()

    def _connect(self, link: ServerLink) -> None:
        assert self._staged is not None
        if link.is_open:
            link.check_version()
        if not link.is_open:
            link.client.wait_until_healthy(self.options.vllm_server_timeout)
            if self.check_server is not None:
                self.check_server(link)
            link.open(self._staged.layout)

    def _deliver(self, link: ServerLink, version: int, delivered: Delivered) -> None:
        assert self._staged is not None
        if not link.is_open:
            self._connect(link)
        # Before the pause: beside the loading, the two would share the memory bandwidth of a CPU.
        expected = delivered.expect() if link.needs_probe else None
        # A server that holds nothing of this trainer is given what was staged before, too.
        specs = self._staged.layout.specs if link.version is None else self._specs
        link.prepare(specs)
        if not link.is_paused:
            link.phase_s = {}
        built = link.build(specs) if link.builds_beside else None
        if not link.is_paused:
            link.pause()
        transferred = built or link.transfer(specs)
        link.finish(version)
        link.resume()
        probe = link.verify(version, expected)
        delivered.add(link.phase_s, transferred.num_bytes, probe)


def _stage_phases(source: WeightSource, report: StageReport) -> dict[str, float]:
    gather_s = getattr(source, "gather_s", 0.0)
    merge_s = getattr(source, "merge_s", 0.0)
    # What is left of the source's time is the walk over the model.
    return {"gather": gather_s, "merge": merge_s, "stage": report.copy_s + report.source_s - gather_s - merge_s}
