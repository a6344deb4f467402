"""What all servers of one publish took, while they take it side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from .failures import Outcome
from .probe import ProbeReference, ProbeResult
from .report import PublishReport


class Delivered:
    """The slowest phases, the most bytes and all probes of the servers of one publish.

    `reference` computes what the servers must answer; it is None where no model is at hand to compare with.
    """

    def __init__(self, reference: Callable[[], ProbeReference] | None) -> None:
        self._reference = reference
        self._expected: ProbeReference | None = None
        self.phase_s: dict[str, float] = {}
        self.num_bytes = 0
        self.probes: list[ProbeResult] = []
        self.reference_s = 0.0
        self._lock = threading.Lock()

    def expect(self) -> ProbeReference | None:
        """What the servers must answer, computed for the first one that asks; the time counts as verification."""
        with self._lock:
            if self._expected is None and self._reference is not None:
                start = time.perf_counter()
                self._expected = self._reference()
                self.reference_s = time.perf_counter() - start
            return self._expected

    def add(self, phase_s: dict[str, float], num_bytes: int, probe: ProbeResult | None) -> None:
        """Take the seconds of each phase, the bytes and the probe of one server."""
        with self._lock:
            for name, value in phase_s.items():
                self.phase_s[name] = max(self.phase_s.get(name, 0.0), value)
            self.num_bytes = max(self.num_bytes, num_bytes)
            if probe is not None:
                self.probes.append(probe)

    def report(
        self,
        *,
        policy_version: int,
        mode: str,
        total_s: float,
        phase_s: dict[str, float],
        outcome: Outcome,
        **more: Any,
    ) -> PublishReport:
        """Make the report of the whole publish; `phase_s` holds the seconds of the phases before the servers'."""
        phase_s = {**phase_s, **self.phase_s}
        phase_s["verify"] = phase_s.get("verify", 0.0) + self.reference_s
        return PublishReport(
            policy_version=policy_version,
            mode=mode,
            num_bytes=self.num_bytes,
            total_s=total_s,
            phase_s=phase_s,
            probe=max(self.probes, key=lambda probe: probe.mean_abs_diff, default=None),
            num_retries=outcome.num_retries,
            num_failures=outcome.num_failures,
            **more,
        )
