"""This rank's share of every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from ..distributed import run_on_main_process
from ..loss.metrics import Metric
from ..types import Position, RolloutGroup
from .micro_batches import Dealer, MicroBatch
from .prepare import Progress
from .steps import Step, StepMaker


def position_of(state: dict[str, Any]) -> Position:
    """Read from what a checkpoint holds of the data where it goes on; the beginning if it holds nothing."""
    return Position(state.get("next_batch", 0), state.get("next_group", 0))


class RolloutStream(IterableDataset[list[MicroBatch]]):
    """A stream of this rank's micro-batches.

    Per optimizer step, rank 0 takes one batch and deals it (`steps.py`, `micro_batches.py`). Every rank gets the same
    number of micro-batches; some may be empty. An item of the stream is a list of micro-batches: one, or with a token
    budget all of the step; a micro-batch is a list of rollouts with token-level advantages.

    `open_steps` opens the source; it is called once, on rank 0, and may be None on the others. With
    `num_batches_ahead` at 1 the next batch is fetched while a step is trained, with 0 after it. `state` is what
    `state_dict` returned when the checkpoint was saved from which the run goes on; None at a start from scratch.

    `num_tokens` (prompts included), `num_rollouts_trained` and `num_rollouts_dropped` count what was handed out,
    refused and dropped since the start of the run, the part before a resume included. What a checkpoint holds of them
    counts what was trained: a signal may ask for one in the middle of a step.
    """

    def __init__(
        self,
        dealer: Dealer,
        progress: Progress,
        open_steps: Callable[[], StepMaker] | None,
        *,
        num_batches_ahead: int = 0,
        state: dict[str, Any] | None = None,
    ):
        state = state or {}
        self.dealer = dealer
        self.num_tokens: int = state.get("num_tokens", 0)
        self.num_rollouts_trained: int = state.get("num_rollouts_trained", 0)
        self.num_rollouts_dropped: int = state.get("num_rollouts_dropped", 0)
        self._progress = progress
        self._open_steps = open_steps
        self._num_batches_ahead = num_batches_ahead
        self._metrics: dict[str, Metric] = {}
        self._steps: StepMaker | None = None
        # What a checkpoint holds until the optimizer has made the step with this number.
        self._before_step: tuple[int, dict[str, Any]] = (progress.global_step, state)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        run_on_main_process(self._open)
        num_left = self._progress.num_steps_left
        while True:
            num_left -= 1
            self._before_step = (self._progress.global_step, self._whole_state())
            step = self._next_step(prefetches=self._num_batches_ahead > 0 and num_left > 0)
            if step is None:
                return
            self.num_tokens += step.num_tokens
            self.num_rollouts_trained += step.num_trained
            self.num_rollouts_dropped += step.num_dropped
            # Rank 0 saw the whole batch: its numbers are those of all ranks, and counted once.
            self._metrics = step.metrics if self.dealer.rank == 0 else {}
            micro_batches = step.micro_batches[self.dealer.rank]
            if self.dealer.max_tokens is None:
                yield from ([micro_batch] for micro_batch in micro_batches)
            else:
                yield micro_batches

    @property
    def position(self) -> Position:
        """On rank 0, place of the first group that was not trained."""
        return position_of(self.state_dict())

    @property
    def step_groups(self) -> tuple[RolloutGroup, ...]:
        """On rank 0, the groups of the step that was handed out last; empty elsewhere, and before the first step."""
        return () if self._steps is None else self._steps.groups

    def state_dict(self) -> dict[str, Any]:
        """On rank 0, what a checkpoint must hold of the data: what was trained, and nothing that was only handed out."""
        step, before = self._before_step
        return before if self._progress.global_step == step else self._whole_state()

    def mark_trained(self, step: int) -> None:
        """Note in the journal that the optimizer step `step` trained what was handed out last."""
        if self._steps is not None:
            self._steps.mark_trained(step)

    def total_metrics(self) -> dict[str, int]:
        """The counters since the start of the run, under the names of their metrics."""
        return {
            "num_tokens": self.num_tokens,
            "num_rollouts_trained": self.num_rollouts_trained,
            "num_rollouts_dropped": self.num_rollouts_dropped,
        }

    def pop_metrics(self) -> dict[str, Metric]:
        """Return the metrics of the step that was handed out last, once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def _whole_state(self) -> dict[str, Any]:
        return {**({} if self._steps is None else self._steps.state_dict()), **self.total_metrics()}

    def _open(self) -> None:
        assert self._open_steps is not None, "rank 0 has a source"
        self._steps = self._open_steps()

    def _next_step(self, *, prefetches: bool) -> Step | None:
        def take() -> Step | None:
            assert self._steps is not None, "_open() comes first"
            return self._steps.take(prefetches=prefetches)

        return run_on_main_process(take)
