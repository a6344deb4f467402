"""What travels between ranks as Python objects has a group of its own: its patience, and its end with any of them."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from launcher import run_ranks

from trl_atropos.distributed import control_group, largest_over_ranks, run_on_main_process
from trl_atropos.errors import TrlAtroposError
from trl_atropos.loss.metrics import MetricAccumulator, mean_of


DDP_TIMEOUT = timedelta(seconds=2)


@pytest.fixture
def rendezvous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return f"file://{tmp_path / 'rendezvous'}"


def join(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=DDP_TIMEOUT)


def wait_for_rank_0(rank: int, rendezvous: str) -> None:
    join(rank, rendezvous)

    def slow() -> str:
        time.sleep(2 * DDP_TIMEOUT.total_seconds())
        return "a batch"

    assert run_on_main_process(slow) == "a batch"
    if rank == 1:
        time.sleep(2 * DDP_TIMEOUT.total_seconds())
    assert largest_over_ranks(float(rank)) == 1.0
    metrics = MetricAccumulator()
    metrics.update({"reward": mean_of(float(rank))})
    assert metrics.reduce(distributed=True) == {"reward": 0.5}
    dist.destroy_process_group()


def test_a_rank_waits_for_another_for_longer_than_the_default_group_would(rendezvous: str) -> None:
    run_ranks(wait_for_rank_0, (rendezvous,), num_ranks=2)


def lose_rank_0(rank: int, rendezvous: str) -> None:
    join(rank, rendezvous)
    control_group()
    if rank == 0:
        # As abrupt as SIGKILL, but no failure of the test.
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"[Cc]onnection (closed|reset)"):
        largest_over_ranks(0.0)
    assert time.monotonic() - start < 10


def test_the_wait_ends_with_the_rank_that_is_waited_for(rendezvous: str) -> None:
    run_ranks(lose_rank_0, (rendezvous,), num_ranks=2)


def fail_on_rank_0(rank: int, rendezvous: str) -> None:
    join(rank, rendezvous)

    def fail() -> None:
        raise TrlAtroposError("No batch came.", "The API is down.", "Start it.")

    with pytest.raises(TrlAtroposError, match="No batch came"):
        run_on_main_process(fail)
    dist.destroy_process_group()
    # Another default group, as a notebook makes one: the old control group is gone with the old one.
    join(rank, rendezvous + "_2")
    assert largest_over_ranks(float(rank)) == 1.0
    dist.destroy_process_group()


def test_every_rank_learns_the_error_and_a_new_default_group_has_a_new_one(rendezvous: str) -> None:
    run_ranks(fail_on_rank_0, (rendezvous,), num_ranks=2)
