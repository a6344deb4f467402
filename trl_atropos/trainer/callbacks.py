"""What happens at the start of a run and after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepCallback(TrainerCallback):
    """Publishes once before the first batch and then every `weight_sync_steps` optimizer steps, the last included;
    then says that the batch of the step is trained.

    `mark_trained` and `publish` are called on every rank; without servers, `publish` is None.
    """

    def __init__(
        self,
        mark_trained: Callable[[], None],
        publish: Callable[[], None] | None = None,
        weight_sync_steps: int = 1,
    ):
        self.mark_trained = mark_trained
        self.publish = publish
        self.weight_sync_steps = weight_sync_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the starting policy."""
        if self.publish is not None:
            self.publish()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish where it is due, then mark the batch."""
        is_due = state.global_step % self.weight_sync_steps == 0 or control.should_training_stop
        if self.publish is not None and is_due:
            self.publish()
        self.mark_trained()
