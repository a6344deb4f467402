"""Reductions of the logged metrics. Their names and meanings: `report/metric_help.py`.

A metric is collected per micro-batch and reported per optimizer step, over all ranks. A mean travels as (sum, count):
every token weighs the same however the batch was split, which a mean of means does not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import control_group


@dataclass(frozen=True)
class Metric:
    """A partial result that can be combined with those of other micro-batches and ranks.

    Values stay on their device until [`MetricAccumulator.reduce`], so that collecting a metric never waits for the
    accelerator.

    Args:
        kind (`str`):
            `"mean"`, `"sum"`, `"min"` or `"max"`: how partial results combine.
        value (`torch.Tensor` of shape `()`, float64):
            The sum of the values for `"mean"` and `"sum"`, else the extremum. 0 when there are none.
        count (`int`):
            How many values went in. 0: there is no data, and the metric is not reported.
    """

    kind: Literal["mean", "sum", "min", "max"]
    value: Tensor
    count: int


def mean_of(values: Tensor | float) -> Metric:
    """A mean in which every element weighs the same; bool counts as 0 and 1. Without data if `values` is empty."""
    flat = _flatten(values)
    return Metric("mean", flat.sum(), flat.numel())


def total(values: Tensor | float) -> Metric:
    """A sum over elements, micro-batches and ranks; bool counts as 0 and 1. Without data if `values` is empty."""
    flat = _flatten(values)
    return Metric("sum", flat.sum(), flat.numel())


def minimum_of(values: Tensor | float) -> Metric:
    """The smallest element; NaN if there is one. Without data if `values` is empty."""
    flat = _flatten(values)
    return Metric("min", flat.amin() if flat.numel() else flat.sum(), flat.numel())


def maximum_of(values: Tensor | float) -> Metric:
    """The largest element; NaN if there is one. Without data if `values` is empty.

    Also for a number that every rank has alike, such as a version.
    """
    flat = _flatten(values)
    return Metric("max", flat.amax() if flat.numel() else flat.sum(), flat.numel())


def merge_metrics(name: str, left: Metric, right: Metric) -> Metric:
    """Combines two partial results of the metric `name` to what one would have got from the values of both.

    The result is on the device of `left`.

    Raises:
        ValueError: the two are of different kinds.
    """
    if left.kind != right.kind:
        raise ValueError(
            f"Metric {name!r} was given as {left.kind!r} and as {right.kind!r}. The two cannot be combined. Give one "
            "of them another name."
        )
    if left.count == 0 or right.count == 0:
        return left if right.count == 0 else right
    right_value = right.value.to(left.value.device)
    if left.kind == "min":
        value = torch.minimum(left.value, right_value)
    elif left.kind == "max":
        value = torch.maximum(left.value, right_value)
    else:
        value = left.value + right_value
    return Metric(left.kind, value, left.count + right.count)


class MetricAccumulator:
    """Collects the metrics of the micro-batches of an optimizer step, then reduces them over ranks."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def update(self, metrics: Mapping[str, Metric]) -> None:
        """Adds the metrics of a micro-batch. A name may be absent from some micro-batches and some ranks.

        Raises:
            ValueError: a name was used before with another kind.
        """
        for name, metric in metrics.items():
            held = self._metrics.get(name)
            self._metrics[name] = metric if held is None else merge_metrics(name, held, metric)

    def reduce(
        self,
        process_group: dist.ProcessGroup | None = None,
        distributed: bool = False,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Reduces over micro-batches and, when `distributed`, over ranks; then starts anew.

        A collective call when `distributed`: every rank of the group must make it, also one that has no metrics. Ranks
        may hold different names, which is why the names travel with the numbers. `process_group` None is all
        ranks.

        This rank's values are gathered on `device` before they are read: on the accelerator that computed them, the
        host waits for it once instead of once per metric. Metrics without data are left out; the others are the same
        on every rank.

        Raises:
            ValueError: two ranks used a name with different kinds.
        """
        metrics = _to_host(self._metrics, device)
        self._metrics = {}
        if distributed:
            group = process_group or control_group()
            metrics_of_ranks: list[dict[str, Metric]] = [{}] * dist.get_world_size(group)
            dist.all_gather_object(metrics_of_ranks, metrics, group=group)
            over_ranks = MetricAccumulator()
            for metrics_of_rank in metrics_of_ranks:
                over_ranks.update(metrics_of_rank)
            metrics = over_ranks._metrics
        return {
            name: metric.value.item() / metric.count if metric.kind == "mean" else metric.value.item()
            for name, metric in metrics.items()
            if metric.count > 0
        }


def _flatten(values: Tensor | float) -> Tensor:
    return torch.as_tensor(values).detach().to(torch.float64).flatten()


def _to_host(metrics: dict[str, Metric], device: torch.device | str) -> dict[str, Metric]:
    if not metrics:
        return {}
    values = torch.stack([metric.value.to(device) for metric in metrics.values()]).cpu()
    return {
        name: replace(metric, value=value)
        for (name, metric), value in zip(metrics.items(), values.unbind(), strict=True)
    }
