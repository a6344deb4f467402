"""Runs on `trl-atropos api`: whoever is killed, every acknowledged group is trained once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from live_api import DurableApiProcess, LiveRun, PublishTarget
from resume_run import BATCH_SIZE, GROUP_SIZE, NUM_STEPS, fingerprints, rollouts_of


SEED = 7
NUM_KILLS = 8
NUM_POSTED = NUM_STEPS * BATCH_SIZE // GROUP_SIZE + 6
# Moments of `RecordingTrainer`.
MOMENTS = {
    "half of a batch in the journal": ("append", 5),
    "a batch written and not acknowledged": ("fetched", 5),
    "after a publish": ("published", 6),
}


def check_nothing_is_lost(run: LiveRun) -> None:
    """Every posted rollout was trained once, or waits in the API; and each step was a whole one."""
    left = sum(map(fingerprints, run.api.drain()), Counter())
    trained = run.trained()
    assert trained + left == rollouts_of(range(NUM_POSTED))
    assert max(trained.values()) == 1
    assert sum(trained.values()) == NUM_STEPS * BATCH_SIZE
    assert run.journaled() == trained


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_trainer_that_is_killed_around_a_fetch_loses_no_rollout(
    publish_target: PublishTarget, tmp_path: Path, moment: tuple[str, int]
) -> None:
    with LiveRun(tmp_path, publish_target, DurableApiProcess) as run:
        feeder = run.feed(range(NUM_POSTED))
        assert run.join(run.start(moment=moment)) == -signal.SIGKILL
        run.finish()
        feeder.join()
        check_nothing_is_lost(run)


def test_a_run_whose_trainer_and_api_are_killed_at_random_points_loses_no_rollout(
    publish_target: PublishTarget, tmp_path: Path
) -> None:
    generator = random.Random(SEED)
    with LiveRun(tmp_path, publish_target, DurableApiProcess, api_timeout_s=60.0) as run:
        feeder = run.feed(range(NUM_POSTED))
        process = run.start()
        run.wait_for(lambda: run.progress.began > 0.0)
        feeder.join()
        for kill in range(NUM_KILLS):
            with suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0.0, 0.5))
            if kill % 2:
                os.kill(run.api.server_pid(), signal.SIGKILL)
            elif process.poll() is None:
                process.kill()
                assert run.join(process) in (0, -signal.SIGKILL)
                process = run.start()
                run.wait_for(lambda: run.progress.began > 0.0)
        assert run.join(process) == 0, run.log
        check_nothing_is_lost(run)


def test_an_api_that_is_killed_keeps_what_it_held(publish_target: PublishTarget, tmp_path: Path) -> None:
    with LiveRun(tmp_path, publish_target, DurableApiProcess, max_steps=4, api_timeout_s=60.0) as run:
        # A batch is two groups: the trainer waits for the other half of the third one.
        feeder = run.feed(range(5))
        process = run.start(resume=False)
        feeder.join()
        run.wait_for(lambda: run.steps() == [1, 2])
        run.api.kill()
        run.wait_for(lambda: "for the API (--api_timeout_s)" in run.log)
        run.api.start()
        run.feed(range(5, 8)).join()
        assert run.join(process) == 0, run.log
        assert "it keeps what it holds" in run.log
        assert "Registration, queue and environments are as before." in run.log
        assert "was restarted" not in run.log
        assert run.trained() == run.journaled() == rollouts_of(range(8))
        assert run.api.get("/status") == {"current_step": 4, "queue_size": 0}
