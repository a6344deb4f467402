"""Advantage statistics and metrics of two real gloo processes equal those of one process with all the data."""

from __future__ import annotations

import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import run_ranks

from trl_atropos.loss.advantages import advantage_statistics, normalize_advantages
from trl_atropos.loss.metrics import MetricAccumulator, maximum_of, mean_of, minimum_of, total


WORLD_SIZE = 2
NUM_CANCELLATION_TOKENS = 200_000

MicroBatches = list[tuple[torch.Tensor, torch.Tensor]]


def micro_batches(case: str, rank: int) -> MicroBatches:
    """(advantages, loss_mask) of each micro-batch of a rank. Pure, so that one process can have the data of all."""
    generator = torch.Generator().manual_seed(100 + rank)
    if case == "ragged":
        shapes = [[(2, 7), (1, 3)], [(4, 5)]][rank]
    elif case == "one_rank_has_no_micro_batch":
        shapes = [[(3, 4)], []][rank]
    elif case == "one_rank_trains_nothing":
        shapes = [[(3, 4)], [(2, 2)]][rank]
    else:
        shapes = [(1, NUM_CANCELLATION_TOKENS // WORLD_SIZE)]
    batches = []
    for shape in shapes:
        if case == "small_spread_on_large_mean":
            advantages = torch.tensor([5 - 1e-3, 5 + 1e-3]).repeat(shape[1] // 2).view(shape)
            loss_mask = torch.ones(shape, dtype=torch.bool)
        else:
            advantages = 3 * rank + torch.randn(shape, generator=generator)
            loss_mask = torch.rand(shape, generator=generator) < 0.7
            if case == "one_rank_trains_nothing" and rank == 1:
                loss_mask.zero_()
            advantages[~loss_mask] = math.nan
        batches.append((advantages, loss_mask))
    return batches


CASES = ["ragged", "one_rank_has_no_micro_batch", "one_rank_trains_nothing", "small_spread_on_large_mean"]


def metric_updates(rank: int) -> list[dict[str, Any]]:
    """The updates of a rank: shared names, names that only one rank has, other orders, and one without data."""
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(5 + 3 * rank, generator=generator)
    if rank == 0:
        return [
            {"entropy": mean_of(values[:2]), "reward": mean_of(values), "only_rank_0": total(values)},
            {"entropy": mean_of(values[2:]), "longest": maximum_of(values), "shortest": minimum_of(values)},
        ]
    return [
        {"longest": maximum_of(values), "only_rank_1": mean_of(values), "num_tokens": total(7)},
        {"shortest": minimum_of(values), "entropy": mean_of(values), "reward": mean_of(torch.zeros(0))},
        {"nowhere": mean_of(torch.zeros(0))},
    ]


def message_of(exception_type: type[Exception], function, *args) -> str | None:
    try:
        function(*args)
    except exception_type as error:
        return str(error)
    return None


def run_rank(rank: int, directory: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for case in CASES:
        batches = micro_batches(case, rank)
        advantages, loss_masks = [batch[0] for batch in batches], [batch[1] for batch in batches]
        results[case] = advantage_statistics(advantages, loss_masks, distributed=True)

    advantages, loss_mask = micro_batches("ragged", rank)[0]
    results["normalized"] = {
        mode: normalize_advantages(advantages, loss_mask, mode) for mode in ("none", "batch", "global")
    }
    results["group"] = normalize_advantages(advantages, loss_mask, "global", dist.new_group([0, 1]))

    poisoned = torch.tensor([1.0, math.nan if rank == 1 else 2.0])
    everywhere = torch.tensor([True, True])
    results["not_finite"] = message_of(ValueError, normalize_advantages, poisoned, everywhere, "global")

    accumulator = MetricAccumulator()
    for update in metric_updates(rank):
        accumulator.update(update)
    results["metrics"] = accumulator.reduce(distributed=True)
    results["metrics_after_reset"] = accumulator.reduce(distributed=True)
    accumulator.update({"reward": mean_of(1.0)} if rank == 0 else {})
    results["metrics_of_one_rank"] = accumulator.reduce(distributed=True)
    accumulator.update({"reward": mean_of(1.0) if rank == 0 else total(1.0)})
    results["metric_kinds"] = message_of(ValueError, accumulator.reduce, None, True)

    # A collective that a rank skipped or made twice would meet this one and fail or hang.
    joined = torch.ones(1)
    dist.all_reduce(joined)
    results["joined"] = joined.item()
    torch.save(results, Path(directory) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results_of_ranks(tmp_path_factory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("gloo")
    run_ranks(run_rank, (str(directory),), num_ranks=WORLD_SIZE)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


def all_data(case: str) -> MicroBatches:
    return [batch for rank in range(WORLD_SIZE) for batch in micro_batches(case, rank)]


@pytest.mark.parametrize("case", CASES)
def test_statistics_equal_those_of_one_process(results_of_ranks, case):
    values = torch.cat([advantages[loss_mask].double() for advantages, loss_mask in all_data(case)])
    for results in results_of_ranks:
        statistics = results[case]
        assert statistics.num_trained_tokens == values.numel()
        assert statistics.mean == pytest.approx(values.mean().item(), rel=1e-12, abs=1e-12)
        assert statistics.std == pytest.approx(values.std().item(), rel=1e-12, abs=1e-12)
    assert results_of_ranks[0][case] == results_of_ranks[1][case]


def test_small_spread_on_large_mean_survives(results_of_ranks):
    # Half of the tokens d below the mean, half d above: variance n d^2 / (n - 1), d half their distance.
    low, high = torch.tensor([5 - 1e-3, 5 + 1e-3]).double().tolist()
    num_tokens = NUM_CANCELLATION_TOKENS
    expected = (high - low) / 2 * math.sqrt(num_tokens / (num_tokens - 1))
    assert results_of_ranks[0]["small_spread_on_large_mean"].std == pytest.approx(expected, rel=1e-6)


def test_seed_bug_2_global_is_over_all_ranks_and_batch_is_not(results_of_ranks):
    tensors = [micro_batches("ragged", rank)[0] for rank in range(WORLD_SIZE)]
    values = torch.cat([advantages[loss_mask].double() for advantages, loss_mask in tensors])
    for (advantages, loss_mask), results in zip(tensors, results_of_ranks, strict=True):
        trained = advantages[loss_mask].double()
        of_all = ((trained - values.mean()) / (values.std() + 1e-8)).float()
        of_rank = ((trained - trained.mean()) / (trained.std() + 1e-8)).float()
        torch.testing.assert_close(results["normalized"]["global"][loss_mask], of_all)
        torch.testing.assert_close(results["normalized"]["batch"][loss_mask], of_rank)
        torch.testing.assert_close(results["normalized"]["none"][loss_mask], advantages[loss_mask])
        assert (of_all - of_rank).abs().max() > 0.1
        assert all(not normalized[~loss_mask].any() for normalized in results["normalized"].values())
        assert torch.equal(results["group"], results["normalized"]["global"])


def test_nan_of_one_rank_is_refused_on_all_ranks(results_of_ranks):
    # rank 0 has 2 finite advantages, rank 1 has 1 and a NaN
    assert "1 of 4 trained advantages are not finite, 0 of them on this rank" in results_of_ranks[0]["not_finite"]
    assert "1 of 4 trained advantages are not finite, 1 of them on this rank" in results_of_ranks[1]["not_finite"]


def test_metrics_equal_those_of_one_process(results_of_ranks):
    one_process = MetricAccumulator()
    for rank in range(WORLD_SIZE):
        for update in metric_updates(rank):
            one_process.update(update)
    expected = one_process.reduce()
    assert set(expected) == {"entropy", "reward", "only_rank_0", "only_rank_1", "longest", "shortest", "num_tokens"}
    for results in results_of_ranks:
        assert results["metrics"] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_metric_mean_weighs_tokens_of_all_ranks_alike(results_of_ranks):
    # rank 0 has 5 values, rank 1 has 8
    values = torch.cat(
        [torch.randn(n, generator=torch.Generator().manual_seed(rank)) for rank, n in enumerate((5, 8))]
    )
    assert results_of_ranks[0]["metrics"]["entropy"] == pytest.approx(values.double().mean().item(), rel=1e-12)


def test_ranks_without_metrics_join(results_of_ranks):
    for results in results_of_ranks:
        assert results["metrics_after_reset"] == {}
        assert results["metrics_of_one_rank"] == {"reward": 1.0}
        assert results["joined"] == WORLD_SIZE


def test_kinds_that_differ_between_ranks_are_refused_on_all_ranks(results_of_ranks):
    for results in results_of_ranks:
        assert "'reward' was given as 'mean' and as 'sum'" in results["metric_kinds"]
