"""Signs of life: once at the start, then in intervals, and none afterwards."""

from __future__ import annotations

import time

import pytest

from trl_atropos.cli import progress


def test_it_says_what_is_done_and_that_it_still_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    with progress.shown("Unpacking"):
        deadline = time.monotonic() + 60
        said = ""
        while said.count("\n") < 3 and time.monotonic() < deadline:
            said += capsys.readouterr().err
    assert said.startswith("Unpacking\nUnpacking (0 s)\n")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_an_error_ends_it(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_S", 0.01)
    with pytest.raises(ValueError), progress.shown("Unpacking"):
        raise ValueError
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
