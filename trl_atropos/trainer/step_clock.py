"""Wall time of optimizer steps, and memory of the process."""

from __future__ import annotations

import resource
import time

from ..loss.metrics import Metric, maximum_of, mean_of


class StepClock:
    """Measures the steps between two logs. The first publish belongs to no step: it starts the clock."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def start(self, step: int) -> None:
        """Begin to measure at this step."""
        self._last = (time.perf_counter(), step)

    def read(self, step: int) -> dict[str, Metric]:
        """Return `step_time` since the last call, if any step was made, and the peak memory of this process."""
        metrics: dict[str, Metric] = {}
        if self._last is not None and step > self._last[1]:
            metrics["step_time"] = mean_of((time.perf_counter() - self._last[0]) / (step - self._last[1]))
        self.start(step)
        # Linux reports kibibytes.
        peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {**metrics, "memory/peak_rss_bytes": maximum_of(float(peak_rss_bytes))}
