"""From the rollouts of an optimizer step to the micro-batches of every rank, and from each of these to tensors.

Shape letters: R rollouts of a micro-batch with at least one trained token, N their trained tokens, U scored positions
(fewer than N where rollouts share trained tokens), K teacher tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..policy.layouts import common_prefix_length, lay_out, layout_inputs, num_computed_tokens, pack_first_fit
from ..policy.logprobs import align_with_targets, next_token_targets
from ..types import IGNORE_INDEX, NO_TOKEN, Rollout


MicroBatch = list[Rollout]


@dataclass(frozen=True)
class Dealer:
    """Cuts the rollouts of an optimizer step into the micro-batches of every rank.

    A step has at most `batch_size` rollouts over all `world_size` data-parallel ranks, of which this process is number
    `rank`. A forward pass of one rank takes `micro_batch_size` rollouts or, if `max_tokens` is not None, as many as
    fit into that token budget. `layout` tells how rollouts will be laid out, which decides what one costs of the
    budget; it is asked when a step is dealt, because the layout is found out only when the model is there.
    """

    batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    max_tokens: int | None = None
    layout: Callable[[], str] = lambda: "padded"

    def deal(self, rollouts: Sequence[Rollout]) -> list[list[MicroBatch]]:
        """For each rank its micro-batches, as many for every rank; some may be empty."""
        if self.max_tokens is not None:
            return deal_by_tokens(
                rollouts, max_tokens=self.max_tokens, layout=self.layout(), world_size=self.world_size
            )
        return deal_by_count(
            rollouts,
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=self.batch_size // (self.micro_batch_size * self.world_size),
            world_size=self.world_size,
        )


def deal_by_count(
    rollouts: Sequence[Rollout], *, micro_batch_size: int, num_micro_batches: int, world_size: int
) -> list[list[MicroBatch]]:
    """Cut the rollouts of an optimizer step into micro-batches of a fixed number of rollouts.

    There are at most `micro_batch_size` x `num_micro_batches` x `world_size` rollouts; after a dropped group there are
    fewer, and the last micro-batches may be empty. Groups stay together as far as the size allows, those with the
    longest rollouts first: little is padded, prompts are shared, and all ranks work on sequences of like length at the
    same time.

    Returns the `num_micro_batches` micro-batches of each rank.
    """
    flat = [rollout for group in _longest_first(rollouts) for rollout in group]
    cut = [flat[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(num_micro_batches * world_size)]
    return [cut[rank::world_size] for rank in range(world_size)]


def deal_by_tokens(
    rollouts: Sequence[Rollout], *, max_tokens: int, layout: str, world_size: int
) -> list[list[MicroBatch]]:
    """Cut the rollouts of an optimizer step into as few micro-batches as a token budget allows, of like cost.

    `max_tokens` is the number of positions that a forward pass computes at most, without the padding between trees; a
    single rollout above it gets a micro-batch of its own. `layout` is one of `layouts.LAYOUTS`: with `tree`, a prefix that
    rollouts of a group share costs once. What groups share is not counted off.

    Groups stay together unless one alone exceeds the budget. The costliest are dealt first, each to the micro-batch
    with the least work so far ([Graham 1969](https://doi.org/10.1137/0117039): at most 4/3 of the best possible
    maximum); where only a tighter packing fits, first-fit decreasing takes its place.

    Returns the micro-batches of each rank; some may be empty, so that all ranks have as many.
    """
    bundles = [bundle for group in _longest_first(rollouts) for bundle in _split(group, layout, max_tokens)]
    costs = [_cost(bundle, layout) for bundle in bundles]
    if layout == "padded":
        # Every rollout of a micro-batch is padded to its longest: an upper bound that adds up.
        longest = max((rollout.num_tokens for rollout in rollouts), default=0)
        costs = [len(bundle) * longest for bundle in bundles]
    num_bins = world_size * max(-(-sum(costs) // (max_tokens * world_size)), 1)
    bins = _fit(costs, num_bins, max_tokens)
    while bins is None:
        num_bins += world_size
        bins = _fit(costs, num_bins, max_tokens)
    micro_batches = [[rollout for i in members for rollout in bundles[i]] for members in bins]
    return [micro_batches[rank::world_size] for rank in range(world_size)]


@dataclass(frozen=True)
class RolloutCollator:
    """Makes the tensors of a micro-batch.

    `layout` is one of `layouts.LAYOUTS`; `shares_between_groups` is that of [`~policy.scoring.PolicyScorer`]. `temperature`
    is the sampling temperature of rollouts for which the wire
    names none. `applies_temperature` says whether the server's logprobs are those after temperature; if not, the
    trainer's are not either. `pad_token_id` is never attended to and never trained.
    """

    layout: str
    temperature: float
    applies_temperature: bool = True
    pad_token_id: int = 0
    shares_between_groups: bool = False

    def __call__(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """Collate rollouts that have advantages.

        A rollout is computed up to the token that predicts its last trained token: nothing depends on the rest. One
        without trained tokens is counted and not computed. Without any trained token, a dummy sequence is laid out, so
        that a rank without data still takes part in every collective of the step.

        The batch holds

        - what the layout needs (`layouts.layout_inputs`);
        - of the scored positions: `prediction_index` (U,) int64, counted over all rows, `targets` (U,) int64, and
          `temperature` (U,) float32;
        - of the trained tokens: `token_index` (N,) int64, the scored position of each; `advantages`,
          `inference_logprobs` and `ref_logprobs` (N,) float32, the last two in nats and NaN where unknown; and
          `rollout_index` (N,) int64;
        - of the rollouts: `num_rollout_tokens` (R,) int64, `advantage_scale` (R,) float32, and `names`, with which
          messages name them;
        - `num_rollouts`, which counts those without trained tokens too, and `num_sequence_tokens`, the number of
          positions without sharing and padding;
        - with a teacher: `teacher_token_ids` (U, K) int64 and `teacher_logprobs` (N, K) float32 in nats, 0 and -inf
          where there is no token; U is N then.
        """
        groups = [[r for r in group if r.num_trained_tokens] for group in _by_group(rollouts)]
        trained = [rollout for group in groups for rollout in group]
        targets = [next_token_targets(rollout.labels) for rollout in trained]
        where = [(target != IGNORE_INDEX).nonzero().squeeze(-1) for target in targets]
        computed = iter([r.input_ids[: int(w[-1]) + 1] for r, w in zip(trained, where, strict=True)])
        sequences = [[next(computed) for _ in group] for group in groups if group]
        layout = lay_out(
            self.layout,
            sequences or [[torch.full((2,), self.pad_token_id)]],
            self.pad_token_id,
            self.shares_between_groups,
        )

        def flat(columns: list[Tensor], empty: Tensor) -> Tensor:
            return torch.cat([empty, *[column[w] for column, w in zip(columns, where, strict=True)]])

        no_ids, no_floats = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        numbers = torch.tensor([w.numel() for w in where], dtype=torch.int64)
        temperatures = torch.tensor([self._temperature(rollout) for rollout in trained], dtype=torch.float32)
        batch: dict[str, Any] = {
            **layout_inputs(layout),
            "prediction_index": flat(list(layout.token_positions[: len(trained)]), no_ids),
            "targets": flat(targets, no_ids),
            "temperature": temperatures.repeat_interleave(numbers),
            "advantages": flat([_aligned(r.advantages, r, 0.0) for r in trained], no_floats),
            "inference_logprobs": flat([_aligned(r.inference_logprobs, r, torch.nan) for r in trained], no_floats),
            "ref_logprobs": flat([_aligned(r.ref_logprobs, r, torch.nan) for r in trained], no_floats),
            "rollout_index": torch.arange(len(trained)).repeat_interleave(numbers),
            "num_rollout_tokens": numbers,
            "advantage_scale": torch.tensor([0.0 if r.set_advantage_to_zero else r.advantage_scale for r in trained]),
            "num_rollouts": len(rollouts),
            "num_sequence_tokens": sum(sequence.numel() for group in sequences for sequence in group),
            "names": [str(rollout.origin) for rollout in trained],
        }
        if any(rollout.teacher_token_ids is not None for rollout in trained):
            batch.update(_teacher(trained, where))
            return {**batch, "token_index": torch.arange(int(numbers.sum()))}
        return _score_equal_tokens_once(batch)

    def _temperature(self, rollout: Rollout) -> float:
        if not self.applies_temperature:
            return 1.0
        return self.temperature if rollout.temperature is None else rollout.temperature


def _score_equal_tokens_once(batch: dict[str, Any]) -> dict[str, Any]:
    """Rollouts that share trained tokens have the same logprobs there: project their hidden state once."""
    temperatures, temperature_index = torch.unique(batch["temperature"], return_inverse=True)
    num_targets = int(batch["targets"].max()) + 1 if batch["targets"].numel() else 1
    # One number instead of three columns: torch.unique of rows took five times as long as all else in here.
    scored = (batch["prediction_index"] * num_targets + batch["targets"]) * temperatures.numel() + temperature_index
    _, token_index = torch.unique(scored, return_inverse=True)
    # For each scored position, one of the trained tokens that have it.
    example_of = torch.zeros(int(token_index.max()) + 1 if token_index.numel() else 0, dtype=torch.int64)
    example_of[token_index] = torch.arange(token_index.numel())
    for name in ("prediction_index", "targets", "temperature"):
        batch[name] = batch[name][example_of]
    return {**batch, "token_index": token_index}


def _teacher(trained: Sequence[Rollout], where: Sequence[Tensor]) -> dict[str, Tensor]:
    width = max(r.teacher_token_ids.shape[1] for r in trained if r.teacher_token_ids is not None)
    ids, logprobs = [], []
    for rollout, positions in zip(trained, where, strict=True):
        ids.append(torch.full((positions.numel(), width), NO_TOKEN))
        logprobs.append(torch.full((positions.numel(), width), -torch.inf))
        if rollout.teacher_token_ids is not None and rollout.teacher_logprobs is not None:
            # Of the token that is predicted, like every other column.
            ids[-1][:, : rollout.teacher_token_ids.shape[1]] = rollout.teacher_token_ids[positions + 1]
            logprobs[-1][:, : rollout.teacher_logprobs.shape[1]] = rollout.teacher_logprobs[positions + 1]
    # Any id that exists: the logprob of -inf says that there is no token.
    return {"teacher_token_ids": torch.cat(ids).clamp(min=0), "teacher_logprobs": torch.cat(logprobs)}


def _aligned(values: Tensor | None, rollout: Rollout, missing: float) -> Tensor:
    if values is None:
        return torch.full((rollout.num_tokens,), missing)
    return align_with_targets(values)


def _by_group(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    groups: dict[int | None, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.origin.group if rollout.origin else None, []).append(rollout)
    return list(groups.values())


def _longest_first(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Groups by their longest rollout, and the rollouts of each by length, longest first."""
    groups = [sorted(group, key=lambda rollout: -rollout.num_tokens) for group in _by_group(rollouts)]
    return sorted(groups, key=lambda group: -group[0].num_tokens)


def _split(group: list[Rollout], layout: str, max_tokens: int) -> list[MicroBatch]:
    """A group as one bundle, or as several if it exceeds the budget; one rollout each where nothing is shared."""
    if layout != "tree":
        return [[rollout] for rollout in group]
    bundles: list[MicroBatch] = []
    cost = 0
    # In lexicographic order each rollout shares the longest prefix with the one before it: that is all it saves.
    for rollout in sorted(group, key=lambda rollout: rollout.input_ids.tolist()):
        if bundles:
            cost += rollout.num_tokens - common_prefix_length(bundles[-1][-1].input_ids, rollout.input_ids)
        if bundles and cost <= max_tokens:
            bundles[-1].append(rollout)
        else:
            bundles.append([rollout])
            cost = rollout.num_tokens
    return bundles


def _cost(bundle: MicroBatch, layout: str) -> int:
    return num_computed_tokens([[rollout.input_ids for rollout in bundle]], layout)


def _fit(costs: Sequence[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    """Numbers of the items of each bin, fullest bin first; None if they are not found to fit. Balanced if possible."""
    balanced = _balance(costs, num_bins)
    if all(len(members) <= 1 or sum(costs[i] for i in members) <= capacity for members in balanced):
        return balanced
    packed = pack_first_fit(costs, capacity)
    if len(packed) > num_bins:
        return None
    return sorted(packed, key=lambda members: -sum(costs[i] for i in members)) + [[]] * (num_bins - len(packed))


def _balance(costs: Sequence[int], num_bins: int) -> list[list[int]]:
    """Numbers of the items of each bin: costliest item first, each into the bin with the least so far."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, number) for number in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda number: -costs[number]):
        total, number = heapq.heappop(heap)
        bins[number].append(item)
        heapq.heappush(heap, (total + costs[item], number))
    return sorted(bins, key=lambda members: -sum(costs[i] for i in members))
