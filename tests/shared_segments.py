"""Segments of the shared-memory transport that outlive their trainer."""

from __future__ import annotations

import os
import time


def segments() -> set[str]:
    """The names in `/dev/shm` now."""
    return {name for name in os.listdir("/dev/shm") if name.startswith("trl_atropos-")}


def left_since(before: set[str], timeout_s: float = 10.0) -> set[str]:
    """The names that came after `before` and stay.

    The suite's other processes make segments too. Their names live for milliseconds, so what goes within `timeout_s`
    was not left.
    """
    left = segments() - before
    deadline = time.monotonic() + timeout_s
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left &= segments()
    return left
