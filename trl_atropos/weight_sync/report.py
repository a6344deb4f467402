"""What one publish did."""

from __future__ import annotations

from dataclasses import dataclass

from .probe import ProbeResult


PHASES = ("gather", "merge", "stage", "build", "pause", "transfer", "load", "finish", "resume", "verify")
"""In order of time; `load` is a part of `build`, or of `transfer`."""

PAUSED_PHASES = ("pause", "transfer", "finish", "resume")
"""Between the first and the last of them the server does not generate."""


@dataclass(frozen=True)
class PublishReport:
    """What one publish did. Times are in seconds.

    `policy_version` is what every server now reports, and `mode` says what was sent: `"full"`, `"merged"` (what
    training can have changed) or `"adapter"`. `num_bytes` travelled to one server. `total_s` is the wall time of the
    whole publish, and `phase_s` holds the time of each phase of `PHASES` on the slowest server.

    `probe` compares the trainer with the server that is farthest off; it is None if no logprobs were compared.
    `num_retries` counts the attempts after the first and `num_failures` the attempts that failed, both over all
    servers. `swallowed_fraction` is the share in [0, 1] of watched elements that moved and whose value in the server's
    dtype did not ([`~weight_sync.weights.staging.StageReport`]); it is None for adapters, and if none moved.
    """

    policy_version: int
    mode: str
    num_bytes: int
    total_s: float
    phase_s: dict[str, float]
    probe: ProbeResult | None
    num_retries: int = 0
    num_failures: int = 0
    swallowed_fraction: float | None = None

    @property
    def paused_s(self) -> float:
        """Seconds during which the server did not generate."""
        if self.mode == "adapter":
            return 0.0
        return sum(self.phase_s.get(phase, 0.0) for phase in PAUSED_PHASES)

    def metrics(self) -> dict[str, float]:
        """The report under the names of `report/metric_help.py`."""
        values = {
            "perf/weight_sync_s": self.total_s,
            "perf/weight_sync_gather_s": self.phase_s.get("gather", 0.0),
            "perf/weight_sync_merge_s": self.phase_s.get("merge", 0.0),
            "perf/weight_sync_stage_s": self.phase_s.get("stage", 0.0),
            "perf/weight_sync_build_s": self.phase_s.get("build", 0.0),
            "perf/weight_sync_pause_s": self.phase_s.get("pause", 0.0),
            "perf/weight_sync_transfer_s": self.phase_s.get("transfer", 0.0),
            "perf/weight_sync_load_s": self.phase_s.get("load", 0.0),
            "perf/weight_sync_finish_s": self.phase_s.get("finish", 0.0),
            "perf/weight_sync_resume_s": self.phase_s.get("resume", 0.0),
            "perf/weight_sync_verify_s": self.phase_s.get("verify", 0.0),
            "perf/weight_sync_paused_s": self.paused_s,
            "perf/weight_sync_bytes": float(self.num_bytes),
            "perf/weight_sync_mb_per_s": self.num_bytes / 1e6 / self.total_s,
            "perf/weight_sync_retries": float(self.num_retries),
            "perf/weight_sync_failures": float(self.num_failures),
        }
        if self.probe is not None:
            values["logprob_probe/mean_abs_diff"] = self.probe.mean_abs_diff
        if self.swallowed_fraction is not None:
            values["weight_sync/swallowed_fraction"] = self.swallowed_fraction
        return values
