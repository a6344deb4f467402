"""Combination of metrics over micro-batches; over ranks: tests/invariant/test_statistics_gloo.py."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.loss.metrics import Metric, MetricAccumulator, maximum_of, mean_of, merge_metrics, minimum_of, total
from trl_atropos.report.metric_help import ENVIRONMENT_METRICS, EVALUATION_METRICS, METRICS


def reduced(*updates: dict[str, Metric]) -> dict[str, float]:
    accumulator = MetricAccumulator()
    for update in updates:
        accumulator.update(update)
    return accumulator.reduce()


def test_seed_bug_5_mean_weighs_tokens_not_micro_batches():
    # (1 + 1 + 1 + 5) / 4 = 2; the mean of the means 1 and 5 would be 3
    assert reduced({"entropy": mean_of(torch.ones(3))}, {"entropy": mean_of(torch.tensor([5.0]))}) == {"entropy": 2.0}


def test_each_kind():
    first = torch.tensor([1.0, 4.0])
    second = torch.tensor([[-2.0], [3.0]])
    updates = [
        {"mean": mean_of(values), "sum": total(values), "min": minimum_of(values), "max": maximum_of(values)}
        for values in (first, second)
    ]
    # 1 + 4 - 2 + 3 = 6 over 4 values
    assert reduced(*updates) == {"mean": 1.5, "sum": 6.0, "min": -2.0, "max": 4.0}


def test_numbers_and_booleans_count_as_values():
    values = {"frac": mean_of(torch.tensor([True, False, True, True])), "step_time": mean_of(2.5), "n": total(3)}
    assert reduced(values) == {"frac": 0.75, "step_time": 2.5, "n": 3.0}


def test_metrics_without_data_are_left_out():
    empty = torch.zeros(0)
    nothing = {"a": mean_of(empty), "b": total(empty), "c": minimum_of(empty), "d": maximum_of(empty)}
    assert reduced(nothing) == {}
    assert reduced() == {}


def test_empty_micro_batch_does_not_disturb_extrema():
    # The 0 that stands in for "no data" must beat neither the maximum -3 nor the minimum 3.
    empty = torch.zeros(0)
    low = reduced({"max": maximum_of(torch.tensor([-3.0]))}, {"max": maximum_of(empty)})
    high = reduced({"min": minimum_of(empty)}, {"min": minimum_of(torch.tensor([3.0]))})
    assert low == {"max": -3.0}
    assert high == {"min": 3.0}


def test_reduce_starts_anew():
    accumulator = MetricAccumulator()
    accumulator.update({"entropy": mean_of(1.0)})
    assert accumulator.reduce() == {"entropy": 1.0}
    assert accumulator.reduce() == {}
    accumulator.update({"entropy": mean_of(3.0)})
    assert accumulator.reduce() == {"entropy": 3.0}


def test_nan_is_shown_not_hidden():
    nan = torch.tensor(math.nan)
    values = reduced(
        {"mean": mean_of(nan), "max": maximum_of(nan), "min": minimum_of(1.0)},
        {"mean": mean_of(1.0), "max": maximum_of(1.0), "min": minimum_of(nan)},
    )
    assert all(math.isnan(value) for value in values.values())


def test_values_keep_no_graph():
    logprobs = torch.zeros(3, requires_grad=True)
    for metric in (mean_of(logprobs), total(logprobs), minimum_of(logprobs), maximum_of(logprobs)):
        assert not metric.value.requires_grad


def test_values_are_summed_in_float64():
    # 1 + 2^-30 is not a float32; 2^-30 is lost when float32 adds it to 1.
    values = reduced({"sum": total(torch.tensor([1.0, 2.0**-30]))})
    assert values["sum"] == 1 + 2.0**-30


def test_kinds_must_agree():
    with pytest.raises(ValueError, match=r"'reward' was given as 'mean' and as 'max'"):
        merge_metrics("reward", mean_of(1.0), maximum_of(1.0))


def test_metric_survives_pickling():
    metric = pickle.loads(pickle.dumps(mean_of(torch.tensor([1.0, 2.0]))))
    assert (metric.kind, metric.value.item(), metric.count) == ("mean", 3.0, 2)


@settings(deadline=None, max_examples=50)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_any_split_gives_the_same_result(values, cuts):
    whole = torch.tensor(values, dtype=torch.float64)
    bounds = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    parts = [whole[start:end] for start, end in pairwise(bounds)]
    kinds = {"mean": mean_of, "sum": total, "min": minimum_of, "max": maximum_of}
    of_whole = reduced({name: make(whole) for name, make in kinds.items()})
    of_parts = reduced(*({name: make(part) for name, make in kinds.items()} for part in parts))
    # 30 values up to 1e6 in float64: each of 30 additions rounds by at most 3e7 * 1.1e-16
    assert of_parts == pytest.approx(of_whole, rel=1e-12, abs=1e-7)


def test_every_metric_is_described_in_one_line():
    for name, description in (METRICS | ENVIRONMENT_METRICS | EVALUATION_METRICS).items():
        assert description.endswith("."), name
        assert "\n" not in description, name
