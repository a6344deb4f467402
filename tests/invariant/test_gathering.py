"""A policy that real gloo ranks hold in pieces is published whole, module by module, and trains on as if nothing happened.

What runs in the processes is launched_gather.py. Accelerate does not choose FSDP on a CPU, so torch's `fully_shard` is
called there, for every decoder layer and for the model, as accelerate does it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from launched_gather import POLICIES
from launcher import run_launcher


SCRIPT = Path(__file__).with_name("launched_gather.py")
# Several times what a launch takes on two busy cores.
LAUNCH_TIMEOUT_S = 300

LAUNCHES = [(parallelism, num_ranks) for parallelism in ("fsdp2", "zero3") for num_ranks in (2, 4)]
Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory) -> Callable[[str, int], Results]:
    """Every case on every rank, by the first test that asks for a launch."""
    launched: dict[tuple[str, int], Results] = {}

    def results(parallelism: str, num_ranks: int) -> Results:
        if (parallelism, num_ranks) not in launched:
            output = tmp_path_factory.mktemp(f"{parallelism}_{num_ranks}")
            launched[parallelism, num_ranks] = launch(parallelism, num_ranks, output)
        return launched[parallelism, num_ranks]

    return results


def launch(parallelism: str, num_ranks: int, output: Path) -> Results:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    exit_status, log = run_launcher(
        [*torchrun, fork_server.PROGRAM, SCRIPT, output, parallelism, *POLICIES],
        timeout_s=LAUNCH_TIMEOUT_S,
        environment={"DS_ACCELERATOR": "cpu"},
    )
    assert exit_status == 0, log
    return [torch.load(output / f"rank{rank}.pt") for rank in range(num_ranks)]


@pytest.fixture(params=LAUNCHES, ids=lambda launch: f"{launch[0]}-{launch[1]}")
def ranks(request, results_of) -> Results:
    return results_of(*request.param)


@pytest.mark.parametrize("case", POLICIES)
class TestSharded:
    def test_every_rank_holds_a_piece_and_knows_that_publishing_is_collective(self, ranks, case):
        for result in ranks:
            # Pieces may be padded, or the last one smaller: 67 rows over 2 ranks are 34 and 33.
            assert result[case]["held_fraction"] == pytest.approx(1 / len(ranks), rel=0.05)
            assert result[case]["is_collective"]

    def test_the_manifest_is_that_of_the_whole_model(self, ranks, case):
        assert all(result[case]["same_manifest"] for result in ranks)

    def test_the_bytes_are_those_of_the_whole_model(self, ranks, case):
        assert all(result[case]["bytes_are_equal"] for result in ranks)

    def test_the_adapter_is_that_of_the_whole_model(self, ranks, case):
        assert all(result[case]["adapter_is_equal"] is (True if case == "adapter" else None) for result in ranks)

    def test_no_more_than_one_module_is_whole_at_a_time(self, ranks, case):
        for result in ranks:
            largest = result[case]["largest_module_bytes"]
            # Nothing gathered at all would pass, too, and be no publish.
            assert 0.5 * largest <= result[case]["peak_gathered_bytes"] <= 1.05 * largest
            # What is merged is one tensor more.
            assert result[case]["peak_bytes"] <= 2.05 * largest

    def test_afterwards_every_rank_holds_the_same_pieces_in_the_same_objects(self, ranks, case):
        # After a whole publish and after three that broke in the middle.
        assert all(result[case]["pieces_are_the_same"] for result in ranks)

    def test_training_goes_on_as_without_a_publish(self, ranks, case):
        for result in ranks:
            assert result[case]["losses"] == result[case]["undisturbed_losses"]
            assert result[case]["losses"][2] < result[case]["losses"][0]
            assert result[case]["bytes_after_training_are_equal"]
            assert result[case]["bytes_moved_by_training"]

    def test_a_consumer_that_fails_on_rank_0_fails_there_and_leaves_nobody_waiting(self, ranks, case):
        first, *others = (result[case]["errors"]["consumer"] for result in ranks)
        assert first.startswith("ValueError: The weight source yields 'model.layers.0.")
        assert others == [None] * len(others)

    def test_time_spent_in_gathering_is_reported(self, ranks, case):
        assert all(result[case]["gather_s"] > 0 for result in ranks)


def test_a_merge_that_fails_on_rank_0_fails_there_and_leaves_nobody_waiting(ranks):
    assert [result["dora"]["errors"]["merge"] for result in ranks] == ["KeyError: 'default'"] + [None] * (
        len(ranks) - 1
    )
