"""When whoever waits is told again for what."""

from __future__ import annotations

import pytest

from trl_atropos import progress
from trl_atropos.progress import REMINDER_INTERVAL_S, Reminder


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which a test changes."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_it_is_due_once_an_interval(clock):
    reminder = Reminder()
    due = []
    for second in range(1, 36):
        clock[0] = 100.0 + second
        if reminder.is_due():
            due.append(second)
    assert due == [10, 20, 30]
    assert REMINDER_INTERVAL_S == 10.0


def test_what_was_missed_is_not_made_up_for(clock):
    reminder = Reminder()
    clock[0] += 95.0
    assert reminder.elapsed_s == 95.0
    assert reminder.is_due()
    assert not reminder.is_due()
    clock[0] += 9.9
    assert not reminder.is_due()
    clock[0] += 0.1
    assert reminder.is_due()
