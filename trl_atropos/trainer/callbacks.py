"""What happens at the start of a run and after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepCallback(TrainerCallback):
    """Publishes once before the first batch and then every `weight_sync_steps` optimizer steps, the last included;
    then says that the batch of the step is trained. At the last step, the publish is also waited for.

    `mark_trained`, `publish` and `finish_publish` are called on every rank; without servers, the last two are None.
    """

    def __init__(
        self,
        mark_trained: Callable[[], None],
        publish: Callable[[], None] | None = None,
        weight_sync_steps: int = 1,
        finish_publish: Callable[[], None] | None = None,
    ):
        self.mark_trained = mark_trained
        self.publish = publish
        self.weight_sync_steps = weight_sync_steps
        self.finish_publish = finish_publish

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
        if self.finish_publish is not None and control.should_training_stop:
            self.finish_publish()
        self.mark_trained()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the publish in the background where training ended between two steps."""
        if self.finish_publish is not None:
            self.finish_publish()
