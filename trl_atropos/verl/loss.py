"""Our losses as a loss function of verl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..loss.losses import LossFunction, LossInputs
from ..loss.metrics import MetricAccumulator
from ..loss.options import StepOptions
from ..loss.step import LossWatch


class RolloutLoss:
    """What `TrainingWorker.set_loss_fn` of verl is given: the loss of a micro-batch of the rows of [`~verl.rows.make_rows`].

    `options` say which logprobs are read, and whether the entropy of the policy is rewarded. `metrics` collects those of the
    loss, `watch` remembers which rollouts had one that is not finite, and `names` is how messages name the rows of the step:
    set it before the step.
    """

    def __init__(self, loss_function: LossFunction, options: StepOptions):
        self.names: Sequence[str] = ()
        self.metrics = MetricAccumulator()
        self.watch = LossWatch()
        self._loss_function = loss_function
        self._options = options

    @property
    def needs_entropy(self) -> bool:
        """Whether verl must compute the entropy, for which it keeps one more tensor of all logits."""
        return self._options.entropy_coef != 0.0

    def __call__(
        self, model_output: Mapping[str, Tensor], data: Mapping[str, Any], dp_group: dist.ProcessGroup | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """The micro-batch's share of the loss of the step, times the ranks over which verl averages gradients.

        `model_output` has `log_probs`, nested (B, T): entry t belongs to token t + 1; and `entropy` if it is needed. `data`
        has the columns of the rows, and of verl `batch_num_tokens`, the trained tokens of the step, and `dp_size`.
        Returns no metrics: verl would take means of means.
        """
        options = self._options
        # torch does not declare what nested tensors have.
        log_probs: Any = model_output["log_probs"]
        is_trained = data["is_trained"].values().bool()
        lengths = log_probs.offsets().diff()
        num_rows = lengths.numel()
        trainer_logprobs = log_probs.values()[is_trained].float()
        entropy = model_output["entropy"].values()[is_trained].float() if self.needs_entropy else None

        def column(name: str) -> Tensor:
            values: Tensor = data[name].values()
            return values[is_trained]

        inputs = LossInputs(
            trainer_logprobs=trainer_logprobs,
            advantages=column("advantages"),
            entropy=torch.zeros_like(trainer_logprobs.detach()) if entropy is None else entropy.detach(),
            rollout_index=torch.arange(num_rows, device=lengths.device).repeat_interleave(lengths)[is_trained],
            num_rollouts=num_rows,
            inference_logprobs=None if options.inference_logprobs == "recompute" else column("inference_logprobs"),
            ref_logprobs=column("ref_logprobs") if options.ref_logprobs == "require" else None,
        )
        outputs = self._loss_function(inputs)
        names = [self.names[row] for row in data["row"].tolist()]
        self.watch.add(names, inputs.sum_per_rollout(outputs.token_losses.detach()))
        self.metrics.update(
            {name: metric for name, metric in outputs.metrics.items() if name != "entropy" or entropy is not None}
        )
        loss = (outputs.token_losses * column("token_weights")).sum()
        if entropy is not None:
            loss = loss - options.entropy_coef * entropy.sum() / max(data["batch_num_tokens"], 1)
        # A loss may be infinite where its gradient is not. verl leaves a step out only where the gradient is not finite.
        is_finite = outputs.token_losses.detach().isfinite().all()
        return loss * torch.where(is_finite, 1.0, torch.nan) * data["dp_size"], {}
