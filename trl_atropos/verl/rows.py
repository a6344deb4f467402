"""From this rank's rollouts of an optimizer step to the rows that verl trains.

verl cuts the rows of a rank into micro-batches as its own options say. Everything that depends on the whole step is in
the rows by then, so that any cut gives the same gradient.

Shape letters: B rows of a rank, T tokens of a row, N trained tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..loss.metrics import Metric
from ..loss.options import StepOptions
from ..loss.step import prepare_step
from ..policy.logprobs import align_with_targets, next_token_targets
from ..types import IGNORE_INDEX, Rollout


@dataclass(frozen=True)
class Rows:
    """The rows of one rank for one optimizer step.

    `columns` are what [`make_rows`] says, `names` (B,) is how messages name the rows, and `metrics` are those of the
    advantages.
    """

    columns: dict[str, Tensor]
    names: list[str]
    metrics: dict[str, Metric]


def make_rows(
    rollouts: Sequence[Rollout],
    num_rows: int,
    options: StepOptions,
    *,
    temperature: float,
    applies_temperature: bool = True,
    max_length: int,
    pad_token_id: int,
    device: torch.device,
    process_group: dist.ProcessGroup | None = None,
) -> Rows:
    """Make `num_rows` rows of at most as many rollouts, which have advantages; a collective call over `process_group`.

    A row ends with the last trained token of its rollout: nothing depends on the rest. A row without any, and every row
    beyond the rollouts, has two tokens that are not trained, so that all ranks have as many rows.

    `temperature` is that of sampling for rollouts that name none; with `applies_temperature` False, the server's logprobs
    are those before temperature, and so are the trainer's. `max_length`, the longest rollout in tokens, is a constant of
    [`~loss.step.prepare_step`], whose collectives run on `device`.

    The columns are those of verl, nested tensors (B, T): `input_ids`, `position_ids` and `loss_mask`, which is aligned
    with its own token; and ours, aligned with the position that predicts a token: `is_trained` int64, and where it is 1
    `advantages`, `token_weights`, `inference_logprobs` and `ref_logprobs`, float32, the last two in nats and NaN where
    unknown. `row` (B,) int64 counts the rows, and `sampling_temperature` (B,) is float32.
    """
    shares = [_share(rollout) for rollout in rollouts]
    filler = torch.full((2,), pad_token_id)
    input_ids = [
        filler if share.where.numel() == 0 else rollout.input_ids[: int(share.where[-1]) + 2]
        for rollout, share in zip(rollouts, shares, strict=True)
    ]
    num_left = num_rows - len(rollouts)
    assert num_left >= 0, "the dealer gives no rank more"
    input_ids += [filler] * num_left
    step = _as_micro_batch(rollouts, shares, input_ids)
    _, metrics = prepare_step([step], options, max_length, device, process_group)
    # Of micro-batches, which verl makes.
    metrics = {name: metric for name, metric in metrics.items() if not name.startswith("perf/")}

    lengths = [ids.numel() for ids in input_ids]
    where = [share.where for share in shares] + [torch.zeros(0, dtype=torch.int64)] * num_left
    flat = torch.cat([start + positions for start, positions in zip(_starts(lengths), where, strict=True)])

    def column(values: Tensor) -> Tensor:
        whole = values.new_zeros(sum(lengths))
        whole[flat] = values
        return _nested(torch.split(whole, lengths))

    trained = torch.ones(flat.numel(), dtype=torch.int64)
    loss_mask = torch.zeros(sum(lengths), dtype=torch.int64)
    loss_mask[flat + 1] = 1
    temperatures = [temperature if rollout.temperature is None else rollout.temperature for rollout in rollouts]
    columns = {
        "input_ids": _nested(input_ids),
        "position_ids": _nested([torch.arange(length) for length in lengths]),
        "loss_mask": _nested(torch.split(loss_mask, lengths)),
        "is_trained": column(trained),
        "advantages": column(step["advantages"]),
        "token_weights": column(step["token_weights"]),
        "inference_logprobs": column(_trained(shares, "inference_logprobs")),
        "ref_logprobs": column(_trained(shares, "ref_logprobs")),
        "row": torch.arange(num_rows),
        "sampling_temperature": torch.tensor(temperatures + [1.0] * num_left)
        if applies_temperature
        else torch.ones(num_rows),
    }
    return Rows(
        columns, [str(rollout.origin) for rollout in rollouts] + ["a row without a rollout"] * num_left, metrics
    )


@dataclass(frozen=True)
class _Share:
    """The trained tokens of one rollout, at the positions `where` that predict them."""

    where: Tensor
    advantages: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor


def _share(rollout: Rollout) -> _Share:
    (where,) = (next_token_targets(rollout.labels) != IGNORE_INDEX).nonzero(as_tuple=True)

    def at_targets(values: Tensor | None) -> Tensor:
        if values is None:
            return torch.full(where.shape, torch.nan)
        return align_with_targets(values)[where]

    return _Share(
        where,
        at_targets(rollout.advantages),
        at_targets(rollout.inference_logprobs),
        at_targets(rollout.ref_logprobs),
    )


def _as_micro_batch(
    rollouts: Sequence[Rollout], shares: Sequence[_Share], input_ids: Sequence[Tensor]
) -> dict[str, Any]:
    """The rank's rollouts as the one micro-batch of which [`prepare_step`] makes statistics and weights."""
    numbers = torch.tensor([share.where.numel() for share in shares], dtype=torch.int64)
    flat_ids = torch.cat(list(input_ids))
    return {
        "input_ids": flat_ids,
        "num_sequence_tokens": flat_ids.numel(),
        "advantages": _trained(shares, "advantages"),
        "rollout_index": torch.arange(len(shares)).repeat_interleave(numbers),
        "num_rollout_tokens": numbers,
        "advantage_scale": torch.tensor(
            [0.0 if rollout.set_advantage_to_zero else rollout.advantage_scale for rollout in rollouts]
        ),
        "num_rollouts": len(rollouts),
    }


def _trained(shares: Sequence[_Share], name: str) -> Tensor:
    return torch.cat([torch.zeros(0), *[getattr(share, name) for share in shares]])


def _starts(lengths: Sequence[int]) -> list[int]:
    ends = torch.tensor(lengths).cumsum(0)
    return [0, *ends[:-1].tolist()]


def _nested(rows: Sequence[Tensor]) -> Tensor:
    """Rows (T,) as one nested tensor (B, T), as verl has its columns."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
