"""SIGKILL of the trainer at any point, then a resume: no rollout is lost and none is trained twice."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from pathlib import Path

import pytest
from live_api import LiveRun, PublishTarget, long_messages
from resume_run import BATCH_SIZE, GROUP_SIZE, NUM_STEPS, Run, fingerprints, make_group, rollouts_of
from safetensors.torch import load_file


SEED = 20
NUM_KILLS = 20
NUM_GROUPS = NUM_STEPS * BATCH_SIZE // GROUP_SIZE
# A few batches more than are trained.
NUM_POSTED = NUM_GROUPS + 12
COMPARED_LOGS = ("step", "loss", "grad_norm", "learning_rate", "reward", "num_tokens", "num_rollouts_trained")


def write_groups(path: Path) -> Path:
    path.write_text("".join(json.dumps(make_group(number)) + "\n" for number in range(NUM_GROUPS)))
    return path


def logs(run: Run) -> list[dict[str, float]]:
    state = json.loads((run.output_dir / f"checkpoint-{NUM_STEPS}" / "trainer_state.json").read_text())
    return [{name: entry[name] for name in COMPARED_LOGS} for entry in state["log_history"] if "loss" in entry]


def assert_same_result(run: Run, straight: Run) -> None:
    """Trained the same rollouts, each once, to the same losses and to the same weights, every bit."""
    assert run.trained() == straight.trained() == rollouts_of(range(NUM_GROUPS))
    assert logs(run) == logs(straight)
    ours, expected = (
        load_file(each.output_dir / f"checkpoint-{NUM_STEPS}" / "model.safetensors") for each in (run, straight)
    )
    assert ours.keys() == expected.keys()
    assert [name for name in ours if not ours[name].equal(expected[name])] == []


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_groups(tmp_path_factory.mktemp("data") / "groups.jsonl")


@pytest.fixture(scope="module")
def straight(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, float]:
    """The run that nobody kills, and the seconds that its training takes."""
    run = Run(tmp_path_factory.mktemp("straight"), data_path=str(data_path))
    return run, run.finish(resume=False)


def test_the_straight_run_trains_every_rollout_once(straight: tuple[Run, float]) -> None:
    run, _ = straight
    assert run.steps() == list(range(1, NUM_STEPS + 1))
    assert run.trained() == rollouts_of(range(NUM_GROUPS))
    losses = [entry["loss"] for entry in logs(run)]
    assert len(set(losses)) == NUM_STEPS


def test_an_offline_run_that_is_killed_at_20_random_points_ends_as_if_it_had_not(
    data_path: Path, straight: tuple[Run, float], tmp_path: Path
) -> None:
    """As many runs as that takes: an attempt that ends before its time to die has finished its run."""
    expected, duration_s = straight
    generator = random.Random(SEED)
    num_kills = num_runs = num_steps_again = 0
    while num_kills < NUM_KILLS:
        run = Run(tmp_path / str(num_runs), data_path=str(data_path))
        while num_kills < NUM_KILLS and run.kill_after(generator.uniform(0.0, duration_s)):
            num_kills += 1
        if num_kills == NUM_KILLS:
            run.finish()
        print(f"seed {SEED}, run {num_runs}: {num_kills} kills so far, steps {run.steps()}")
        assert_same_result(run, expected)
        num_steps_again += len(run.steps()) - NUM_STEPS
        num_runs += 1
    # The kills hit runs that had trained something, or nothing was shown.
    assert num_steps_again > 0


@pytest.mark.parametrize("moment", [("weights", 1), ("weights", 2), ("state", 1), ("state", 3), ("state", 4)])
def test_a_checkpoint_that_a_kill_left_unfinished_is_not_resumed_from(
    data_path: Path, straight: tuple[Run, float], tmp_path: Path, moment: tuple[str, int]
) -> None:
    run = Run(tmp_path, data_path=str(data_path))
    assert run.join(run.start(moment=moment)) == -9
    # Checkpoints are saved every third step.
    killed_at = 3 * moment[1]
    assert run.steps() == list(range(1, killed_at + 1))
    assert (run.output_dir / f"checkpoint-{killed_at}" / "model.safetensors").exists()
    run.finish()
    assert run.steps()[killed_at] == killed_at - 3 + 1
    assert "is not complete" in run.log
    assert_same_result(run, straight[0])


def check_live(run: LiveRun, feeder: threading.Thread, num_fetches_killed: int) -> None:
    """Every posted rollout was trained once or is still in the API, but for a batch per kill in the middle of a fetch."""
    feeder.join()
    left = sum(map(fingerprints, run.api.drain()), Counter())
    trained = run.trained()
    assert max(trained.values()) == 1
    assert not trained & left
    lost = rollouts_of(range(NUM_POSTED)) - left - trained
    assert sum(lost.values()) <= num_fetches_killed * BATCH_SIZE
    # A batch that was half written makes a smaller step.
    assert 0 <= NUM_STEPS * BATCH_SIZE - sum(trained.values()) <= sum(lost.values())
    # All that reached the disk was trained, and nothing else.
    assert run.journaled() == trained
    marks = [json.loads(line) for line in (run.output_dir / "journal" / "marks.jsonl").read_text().splitlines()]
    last_marks = {mark["step"]: mark["batch"] for mark in marks if mark["event"] == "trained"}
    assert sorted(last_marks) == list(range(1, NUM_STEPS + 1))
    assert len(set(last_marks.values())) == NUM_STEPS


def test_a_live_run_that_is_killed_at_20_random_points_loses_nothing_that_it_fetched(
    publish_target: PublishTarget, tmp_path: Path
) -> None:
    generator = random.Random(SEED)
    with LiveRun(tmp_path / "straight", publish_target) as straight:
        feeder = straight.feed(range(NUM_POSTED))
        duration_s = straight.finish(resume=False)
        check_live(straight, feeder, num_fetches_killed=0)
    num_kills = num_runs = num_steps_again = 0
    while num_kills < NUM_KILLS:
        with LiveRun(tmp_path / str(num_runs), publish_target) as run:
            feeder = run.feed(range(NUM_POSTED))
            num_fetches_killed = 0
            while num_kills < NUM_KILLS and run.kill_after(generator.uniform(0.0, duration_s)):
                num_kills += 1
                num_fetches_killed += run.progress.is_fetching
            if num_kills == NUM_KILLS:
                run.finish()
            print(f"seed {SEED}, run {num_runs}: {num_kills} kills so far, steps {run.steps()}")
            check_live(run, feeder, num_fetches_killed)
            num_steps_again += len(run.steps()) - NUM_STEPS
            num_runs += 1
    assert num_steps_again > 0


# Moment, and how many batches were then on their way from the API to the disk.
MOMENTS = {
    "half of a batch in the journal": (("append", 5), 1),
    "a batch fetched and not used": (("fetched", 5), 0),
    "half a mark": (("mark", 7), 0),
    "in a checkpoint": (("state", 1), 0),
    "after a publish": (("published", 6), 0),
}


@pytest.mark.parametrize(("moment", "num_fetches_killed"), MOMENTS.values(), ids=MOMENTS.keys())
def test_a_live_run_goes_on_after_a_kill_at_each_kind_of_moment(
    publish_target: PublishTarget, tmp_path: Path, moment: tuple[str, int], num_fetches_killed: int
) -> None:
    with LiveRun(tmp_path, publish_target) as run:
        feeder = run.feed(range(NUM_POSTED))
        assert run.join(run.start(moment=moment)) == -9
        assert run.progress.is_fetching == bool(num_fetches_killed)
        run.finish()
        check_live(run, feeder, num_fetches_killed)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_live_run_that_sigterm_ends_goes_on_with_steps_of_another_size(
    publish_target: PublishTarget, tmp_path: Path, batch_size: int
) -> None:
    with LiveRun(tmp_path, publish_target, enable_jit_checkpoint=True, save_strategy="no") as run:
        feeder = run.feed(range(NUM_POSTED))
        # In the middle of the fifth step, of two micro-batches each; the next batch is fetched by then.
        assert run.join(run.start(moment=("sigterm", 9))) == 0, run.log
        assert run.steps() == [1, 2, 3, 4, 5]
        feeder.join()
        left = sum(map(fingerprints, run.api.drain()), Counter())
        # An API keeps the batch size of its first registration.
        run.api.kill()
        run.api.start()
        feeder = run.feed(range(NUM_POSTED, NUM_POSTED + 20))
        run.options |= {"per_device_train_batch_size": batch_size // 2, "max_steps": 8}
        run.finish()
        feeder.join()
        # The fifth step is not in the checkpoint, and is made again.
        assert run.steps()[5:] == [5, 6, 7, 8]
        left += sum(map(fingerprints, run.api.drain()), Counter())
        assert run.trained() == run.journaled()
        assert run.trained() + left == rollouts_of(range(NUM_POSTED + 20))


def test_a_full_disk_ends_the_run_before_the_batch_is_used_and_the_journal_can_be_resumed(
    publish_target: PublishTarget, tmp_path: Path
) -> None:
    limit = 2**20
    with LiveRun(tmp_path, publish_target, max_steps=3) as run:
        run.feed(range(2))
        process = run.start(max_file_bytes=limit)
        run.wait_for(lambda: run.steps() == [1])
        for number in (2, 3):
            run.api.post(make_group(number, messages=long_messages(limit)))
        assert run.join(process) == 1
        assert run.steps() == [1]
        assert run.error()["type"] == "JournalError"
        assert "File too large" in run.error()["what"]
        assert "--output_dir" in run.error()["fix"]
        assert run.journaled() == rollouts_of(range(2))

        for number in range(4, 8):
            run.api.post(make_group(number))
        run.finish()
        assert run.trained() == run.journaled() == rollouts_of([0, 1, 4, 5, 6, 7])
