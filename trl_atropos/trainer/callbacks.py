"""Trainer callbacks that the run needs: publish the policy, mark what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class PublishPolicyCallback(TrainerCallback):
    """Publishes once before the first batch and then every `weight_sync_steps` optimizer steps, the last included.

    Args:
        publish (`Callable[[], None]`):
            Publishes the policy; called on every rank.
        weight_sync_steps (`int`):
            See `AtroposConfig`.
    """

    def __init__(self, publish: Callable[[], None], weight_sync_steps: int):
        self.publish = publish
        self.weight_sync_steps = weight_sync_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish the starting policy."""
        self.publish()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish where it is due."""
        if state.global_step % self.weight_sync_steps == 0 or control.should_training_stop:
            self.publish()


class TrainedBatchCallback(TrainerCallback):
    """Says after each optimizer step that its batch is trained.

    Args:
        mark_trained (`Callable[[], None]`):
            Called on every rank.
    """

    def __init__(self, mark_trained: Callable[[], None]):
        self.mark_trained = mark_trained

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the batch of the step."""
        self.mark_trained()
