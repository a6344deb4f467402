"""Several gloo ranks on a live API: rank 0 fetches and deals, every rollout is trained by one rank, and errors end all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkedProcess
from live_api import LiveRun, PublishTarget, long_messages
from resume_run import make_group, read_records, rollouts_of

from trl_atropos.cli.launch.processes import free_port


NUM_STEPS = 3
BATCH_SIZE = 8
NUM_GROUPS = NUM_STEPS * BATCH_SIZE // 2
# Four of the longest rollouts: 5 + 4 tokens each.
MAX_TOKENS = 36
# After the first rank has ended, the others are told and end, too.
ENDS_WITHIN_S = 10.0


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def run(world_size: int, publish_target: PublishTarget, tmp_path: Path) -> Iterator[LiveRun]:
    options = {
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH_SIZE // world_size,
        "gradient_accumulation_steps": 1,
        "max_tokens_per_micro_batch": MAX_TOKENS,
        "save_strategy": "no",
    }
    with LiveRun(tmp_path, publish_target, **options) as run:
        yield run


def start_ranks(
    run: LiveRun, world_size: int, *, resume: bool = False, max_file_bytes: int | None = None
) -> list[ForkedProcess]:
    """Start every rank; `max_file_bytes` holds for rank 0."""
    options: dict[str, Any] = {"resume": resume, "world_size": world_size, "port": free_port()}
    return [
        run.start(rank=0, max_file_bytes=max_file_bytes, **options),
        *(run.start(rank=rank, **options) for rank in range(1, world_size)),
    ]


def test_every_rollout_is_trained_by_one_rank_and_only_rank_0_knows_the_servers(
    run: LiveRun, world_size: int, publish_target: PublishTarget
) -> None:
    run.feed(range(NUM_GROUPS))
    for process in start_ranks(run, world_size):
        assert run.join(process) == 0, run.log

    records = [read_records(run.directory / f"records{rank}.jsonl") for rank in range(world_size)]
    steps = [[record for record in of_rank if "step" in record] for of_rank in records]
    assert [len(of_rank) for of_rank in steps] == [NUM_STEPS] * world_size
    trained = Counter(rollout for of_rank in steps for step in of_rank for rollout in step["rollouts"])
    assert trained == rollouts_of(range(NUM_GROUPS)) == run.journaled()
    for of_ranks in zip(*steps, strict=True):
        assert sum(len(step["rollouts"]) for step in of_ranks) == BATCH_SIZE
        assert len({len(step["micro_batches"]) for step in of_ranks}) == 1
        lengths = [micro_batch for step in of_ranks for micro_batch in step["micro_batches"] if micro_batch]
        # Padded rows: each costs as much as the longest.
        assert all(len(micro_batch) * max(micro_batch) <= MAX_TOKENS for micro_batch in lengths)

    connections = [
        set((run.directory / f"connections{rank}.txt").read_text().splitlines()) for rank in range(world_size)
    ]
    assert {run.api.url, publish_target.base_url} <= connections[0]
    assert all(not {run.api.url, publish_target.base_url} & others for others in connections[1:])


def test_ranks_that_are_killed_go_on_together_with_every_rollout_once(run: LiveRun, world_size: int) -> None:
    run.options |= {"save_strategy": "steps", "save_steps": 1}
    run.feed(range(NUM_GROUPS))
    processes = start_ranks(run, world_size)
    run.wait_for(lambda: 2 in run.steps())
    for process in processes:
        process.kill()
    for process in start_ranks(run, world_size, resume=True):
        assert run.join(process) == 0, run.log
    assert run.steps()[-1] == NUM_STEPS
    assert run.trained() == rollouts_of(range(NUM_GROUPS)) == run.journaled()


def assert_all_end_with(run: LiveRun, processes: list[ForkedProcess], error_type: str, what: str) -> None:
    run.join(processes[0])
    start = time.monotonic()
    assert [run.join(process) for process in processes] == [1] * len(processes), run.log
    assert time.monotonic() - start < ENDS_WITHIN_S
    errors = [run.error(rank) for rank in range(len(processes))]
    assert all(error == errors[0] for error in errors)
    assert errors[0]["type"] == error_type
    assert what in errors[0]["what"]


def test_a_full_disk_of_rank_0_ends_all_ranks_with_its_message(run: LiveRun, world_size: int) -> None:
    limit = 2**20
    processes = start_ranks(run, world_size, max_file_bytes=limit)
    run.api.wait_for_registration(timeout_s=60)
    for number in range(BATCH_SIZE // 2):
        run.api.post(make_group(number, messages=long_messages(limit)))
    assert_all_end_with(run, processes, "JournalError", "File too large")
    assert run.steps() == []


def test_a_batch_of_bad_groups_ends_all_ranks_with_the_message_of_the_first(run: LiveRun, world_size: int) -> None:
    run.options["max_dropped_fraction"] = 0.0
    processes = start_ranks(run, world_size)
    run.api.wait_for_registration(timeout_s=60)
    for number in range(BATCH_SIZE // 2):
        run.api.post(make_group(number, masks=[[0, 1], [0, 1]]))
    assert_all_end_with(run, processes, "AtroposProtocolError", "`masks` has 2 entries")
    assert run.steps() == []
