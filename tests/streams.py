"""A stream as the trainer makes it, over any iterator of fetched batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trl_atropos.data.micro_batches import Dealer
from trl_atropos.data.options import DataOptions
from trl_atropos.data.prepare import BatchPreparer
from trl_atropos.data.quarantine import Quarantine
from trl_atropos.data.sources import FetchedBatch
from trl_atropos.data.steps import StepMaker
from trl_atropos.data.stream import RolloutStream
from trl_atropos.loss.options import StepOptions
from trl_atropos.wire.journal import Journal
from trl_atropos.wire.parse import WireLimits


LIMITS = WireLimits(vocab_size=100, max_length=32)

REQUIRED = {
    (): StepOptions(loss_type="weighted_sft", scale_rewards="none"),
    ("inference_logprobs",): StepOptions(scale_rewards="none"),
    ("ref_logprobs",): StepOptions(
        loss_type="weighted_sft",
        beta=0.1,
        use_bias_correction_kl=False,
        ref_logprobs="require",
        scale_rewards="none",
    ),
    ("inference_logprobs", "ref_logprobs"): StepOptions(beta=0.1, ref_logprobs="require", scale_rewards="none"),
}
"""Logprobs that a rollout must have -> options under which it must."""


@dataclass
class Trainer:
    """`Progress` of a trainer that has made no step yet."""

    policy_version_of: Callable[[], int] = lambda: 0
    num_steps_left: int = 10
    global_step: int = 0

    @property
    def policy_version(self) -> int:
        return self.policy_version_of()


def make_stream(
    open_batches: Callable[[], Iterator[FetchedBatch]],
    *,
    quarantine: Quarantine | None = None,
    max_dropped_fraction: float = 0.0,
    journal: Journal | None = None,
    lookup: Any = None,
    policy_version: int | Callable[[], int] = 0,
    num_steps: int = 10,
    progress: Trainer | None = None,
    layout: Callable[[], str] = lambda: "padded",
    required_logprobs: tuple[str, ...] = (),
    eos_token_ids: frozenset[int] | None = None,
    mask_truncated_completions: bool = False,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 4,
    micro_batch_size: int = 2,
    **data_options: Any,
) -> RolloutStream:
    """Two rollouts a forward pass, four a step, unless said otherwise."""
    progress = progress or Trainer(policy_version if callable(policy_version) else lambda: policy_version, num_steps)
    data = DataOptions(atropos_batch_size=batch_size, **{"num_prefetched_batches": 0, **data_options})
    step = REQUIRED[required_logprobs]
    if mask_truncated_completions:
        step = StepOptions(loss_type="weighted_sft", scale_rewards="none", mask_truncated_completions=True)
    dealer = Dealer(batch_size, micro_batch_size, rank, world_size, data.max_tokens_per_micro_batch, layout)
    prepare = BatchPreparer(LIMITS, progress, lookup, journal)

    def open_steps() -> StepMaker:
        return StepMaker(
            prepare(open_batches()),
            dealer,
            progress,
            data,
            step,
            # Refused groups go nowhere: the first one ends the run.
            quarantine=quarantine or Quarantine(os.devnull, max_dropped_fraction),
            journal=journal,
            eos_token_ids=eos_token_ids,
        )

    return RolloutStream(dealer, progress, open_steps, num_batches_ahead=data.num_batches_ahead)
