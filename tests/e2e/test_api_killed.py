"""SIGKILL of the Atropos API in the middle of a run: the trainer says so, waits, and goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_api import LiveRun, PublishTarget
from resume_run import make_group, rollouts_of


# Two groups of two rollouts are a batch.
FIRST, HELD, REST = range(6), range(6, 7), range(7, 13)
SAYS_WITHIN_S = 10.0
WAITS = "for the API (--api_timeout_s)"


@pytest.fixture
def run(publish_target: PublishTarget, tmp_path: Path) -> Iterator[LiveRun]:
    with LiveRun(tmp_path, publish_target, max_steps=6, api_timeout_s=60.0) as run:
        yield run


def train_three_steps_and_kill_the_api(run: LiveRun):
    """The trainer then waits for a fourth batch, of which the API holds one group."""
    feeder = run.feed([*FIRST, *HELD])
    process = run.start(resume=False)
    feeder.join()
    run.wait_for(lambda: run.steps() == [1, 2, 3])
    run.api.kill()
    return process


def test_a_restarted_api_is_registered_with_again_and_only_what_it_held_is_lost(run: LiveRun) -> None:
    process = train_three_steps_and_kill_the_api(run)
    run.wait_for(lambda: WAITS in run.log, SAYS_WITHIN_S)
    assert "reached nobody" in run.log

    run.api.start()
    run.feed(REST)
    assert run.join(process) == 0, run.log
    assert run.api.get("/info") == {"batch_size": 4, "max_token_len": 33}
    # Registered with starting_step 3; three batches were formed since.
    assert run.api.get("/status")["current_step"] == 6
    assert "was restarted and this trainer is registered again" in run.log
    assert "start them again" in run.log
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert run.trained() == run.journaled() == rollouts_of([*FIRST, *REST])


def test_an_api_that_does_not_come_back_ends_the_run_after_api_timeout_s(
    publish_target: PublishTarget, tmp_path: Path
) -> None:
    with LiveRun(tmp_path, publish_target, max_steps=6, api_timeout_s=3.0) as run:
        process = train_three_steps_and_kill_the_api(run)
        start = time.monotonic()
        assert run.join(process) == 1
        # The poll that notices it, then 3 s.
        assert time.monotonic() - start < SAYS_WITHIN_S + 3.0 + 2.0
        assert run.error()["type"] == "AtroposConnectionError"
        assert run.error()["what"] == f"The Atropos API at {run.api.url} did not answer within 3 s."
        assert "run-api" in run.error()["fix"]
        # What was fetched is trained, and a resume goes on from there.
        assert run.trained() == run.journaled() == rollouts_of(FIRST)
        run.api.start()
        run.feed(REST)
        run.finish()
        assert run.trained() == rollouts_of([*FIRST, *REST])


def test_an_api_that_got_data_before_the_trainer_was_back_is_emptied_and_said_so(run: LiveRun) -> None:
    """A group that is posted before a trainer registers makes the API take no registration."""
    process = train_three_steps_and_kill_the_api(run)
    run.wait_for(lambda: WAITS in run.log, SAYS_WITHIN_S)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    run.api.start()
    run.api.post(make_group(13))
    os.kill(process.pid, signal.SIGCONT)

    run.feed(REST)
    assert run.join(process) == 0, run.log
    assert "posted data before the trainer registered" in run.log
    assert "/reset_data" in run.log
    assert run.trained() == run.journaled() == rollouts_of([*FIRST, *REST])
