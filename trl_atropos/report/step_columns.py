"""The columns of every table of optimizer steps: in the trainer's log, on its panel, after a launch. Loads nothing."""

from __future__ import annotations


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward", "8.3f"),
    ("std", "reward_std", "7.3f"),
    ("loss", "loss", "9.4f"),
    ("stale", "staleness/mean", "7.2f"),
    ("wait s", "perf/batch_wait_s", "8.2f"),
    ("publish s", "perf/weight_sync_s", "10.2f"),
    ("step s", "step_time", "8.2f"),
)
"""Title, name in the log, and format of each; the number of the step stands before them."""


def cell(value: float | None, spec: str) -> str:
    """Return a number in the format of its column, `?` in its width where there is none."""
    return "?".rjust(int(spec.split(".")[0])) if value is None else format(value, spec)
