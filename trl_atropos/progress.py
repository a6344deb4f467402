"""When to say again that something goes on."""

from __future__ import annotations

import time


REMINDER_INTERVAL_S = 10.0
"""How often whoever waits is told for what, in seconds."""


class Reminder:
    """Is due `REMINDER_INTERVAL_S` seconds after it was made, and again after it was asked and was."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self._next = self.start + REMINDER_INTERVAL_S

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.start

    def is_due(self) -> bool:
        """Whether it is time to say something; then not again for an interval."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + REMINDER_INTERVAL_S
        return True
