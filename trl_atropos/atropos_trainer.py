"""The trainer.

    Atropos API --RolloutStream--> micro-batches of one optimizer step
        get_batch_samples   layout; token counts and advantage statistics over all micro-batches and ranks
        training_step       one or several micro-batches
        compute_loss        model -> logprobs at trained positions -> weighted sum of the tokens' losses
        optimizer.step      only if every loss and every gradient is finite
        on_step_end         PublishPolicyCallback -> PolicyPublisher -> vLLM server

Shape letters: B rollouts, T tokens, N trained tokens of a micro-batch, R its rollouts, U its scored positions.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from trl.models import get_act_offloading_ctx_manager

from .advantages import clip_advantages, normalize_advantages
from .atropos_config import AtroposConfig
from .callbacks import PublishPolicyCallback, StepTableCallback
from .connections import Connections, connect, stream_settings
from .data import RolloutStream
from .distributed import is_distributed, run_on_main_process, without_gradient_sync
from .errors import NonFiniteGradientError
from .journal import Journal
from .logprobs import select_positions_before, token_logprobs_and_entropy
from .loss_options import AGGREGATIONS
from .losses import LossFunction, LossInputs, make_loss_function, select_trained, weighted_cross_entropy
from .metrics import Metric, MetricAccumulator, maximum_of, mean_of
from .micro_batches import RolloutCollator
from .modeling import add_adapter, disable_dropout, eos_token_ids, load_model, use_sparse_embedding_gradient
from .optimizer_step import LossWatch, StepOptions, prepare_step, teacher_cross_entropy
from .policy_forward import PolicyForward, make_forward, make_reference_model
from .preflight import ServerFacts, check_launch
from .publishing import TrainerPublishing
from .weight_sync.base import WeightTransport
from .weight_sync.probe import LogprobProbe
from .weight_sync.session import WeightSync


if TYPE_CHECKING:
    from peft import PeftConfig


logger = logging.getLogger(__name__)

JOURNAL_NAME = "rollouts.jsonl"


class AtroposTrainer(Trainer):
    """
    Trainer for Atropos environments: takes scored rollouts from the Atropos API, applies an advantage-weighted loss that
    is exact at any split of the batch, and keeps the vLLM server that the environments query on the newest policy.

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`):
            The policy: an instance, or a path or id that is loaded with `args.model_init_kwargs` (float32 unless these
            say otherwise).
        args ([`AtroposConfig`], *optional*):
            Options.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer, for padding, for the logprob probe, and to be saved with the model. Loaded from the model's path
            if not given.
        peft_config (`PeftConfig`, *optional*):
            Wraps the model. Not together with a `PeftModel`.
        callbacks (`list[TrainerCallback]`, *optional*):
            More callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        weight_transport ([`~weight_sync.base.WeightTransport`], *optional*):
            Moves the weights to the server. Chosen from what the server reports if not given.
        loss_fn ([`~losses.LossFunction`], *optional*):
            Your own loss instead of the one of `args.loss_type`: a pure function from [`~losses.LossInputs`] to
            [`~losses.LossOutputs`]. Its token losses are weighed as `args.loss_type` says (docs/losses.md).

    Example:

    ```python
    trainer = AtroposTrainer(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        args=AtroposConfig(
            output_dir="out", atropos_api_url="http://localhost:8000", vllm_server_base_url="http://localhost:8001"
        ),
    )
    trainer.train()
    ```
    """

    _tag_names: ClassVar[list[str]] = ["trl", "atropos"]
    _name = "Atropos"

    # The weights of the tokens hold every denominator: dividing again by the number of micro-batches would be wrong.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: AtroposConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        weight_transport: WeightTransport | None = None,
        loss_fn: LossFunction | None = None,
    ):
        args = args or AtroposConfig(output_dir="atropos-output")
        # Before the adapter is created: its initial weights are random, and must be the same on every rank.
        set_seed(args.seed)
        given_model, model = model, load_model(model, args)
        if processing_class is None and getattr(model.config, "_name_or_path", None):
            processing_class = AutoTokenizer.from_pretrained(
                model.config._name_or_path, trust_remote_code=args.trust_remote_code
            )
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        if args.disable_dropout:
            disable_dropout(model)
        # Before the optimizer's first step: the copy must be of the starting policy.
        needs_copy = args.beta != 0.0 and args.ref_logprobs == "recompute" and not hasattr(model, "peft_config")
        self._reference_model = make_reference_model(given_model, args) if needs_copy else None
        super().__init__(
            model=model,
            args=args,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        self.args: AtroposConfig = args
        self.loss_function = make_loss_function(args.loss_options) if loss_fn is None else loss_fn
        self._step_options = StepOptions(
            args.advantage_normalization,
            args.advantage_clipping,
            aggregation=AGGREGATIONS[args.loss_type],
            max_completion_length=args.max_completion_length or args.max_length,
        )
        self._forward: PolicyForward | None = None
        self._loss_watch = LossWatch()
        self._activation_offloading = (
            get_act_offloading_ctx_manager(self.model) if args.activation_offloading else nullcontext()
        )
        self._weight_transport = weight_transport
        self._connections: Connections | None = None
        self._server_facts: ServerFacts | None = None
        self._stream: RolloutStream | None = None
        self._metrics = MetricAccumulator()
        self._publishing: TrainerPublishing | None = None
        self._last_log: tuple[float, int] | None = None
        if self.accelerator.distributed_type == DistributedType.NO:
            use_sparse_embedding_gradient(self.model)
        self.add_callback(PublishPolicyCallback(self.publish_policy, args.weight_sync_steps))
        self.pop_callback(PrinterCallback)
        self.pop_callback(ProgressCallback)
        self.add_callback(StepTableCallback())

    # Life of a run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. Takes the arguments of [`~transformers.Trainer.train`].

        Raises:
            [`TrlAtroposError`]: before the first step if API, server and model do not fit together; later if the data
                or a publish fails. The server is left paused if it does not hold a complete policy.
        """
        check_launch(self.accelerator)
        self._connect()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._connections is not None:
                self._connections.close()

    def _connect(self) -> None:
        """Reach the servers and check them; collective."""
        self._server_facts = run_on_main_process(self._connect_main_process)
        probe = LogprobProbe(self.processing_class, self._vocab_size)
        self._publishing = TrainerPublishing(self.args, self._connections, probe, self._server_facts.dtype)

    def _connect_main_process(self) -> ServerFacts:
        device = self.accelerator.device
        self._connections = connect(self.args, self.model.config, device, self._weight_transport)
        return self._connections.facts

    def _register(self) -> None:
        """Register with the API. Called on rank 0, after the first publish: the first `/batch` releases environments."""
        assert self._connections is not None
        self._connections.register(self.args, starting_step=self.state.global_step)

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches, straight from the API. Not prepared by accelerate: they are dealt already."""
        args = self.args
        assert self._server_facts is not None, "train() connects before it asks for data"
        eos_ids = eos_token_ids(self.model, self.processing_class) if args.mask_truncated_completions else None
        settings = stream_settings(args, vocab_size=self._vocab_size, eos_token_ids=eos_ids)
        connections = self._connections
        lookup = connections.get_policy_versions if connections is not None else None
        self._stream = RolloutStream(
            client=None if connections is None else connections.atropos_client,
            journal=Journal(Path(args.output_dir) / JOURNAL_NAME) if self.is_world_process_zero() else None,
            settings=settings,
            register=self._register,
            policy_version=lambda: self.policy_version,
            lookup_policy_versions=lookup if self._server_facts.knows_policy_versions else None,
            layout=lambda: self._get_forward().scorer.plan.layout,
        )
        # Collated in get_batch_samples: the layout is found out with the wrapped model, which does not exist yet.
        return DataLoader(self._stream, batch_size=None, collate_fn=_unchanged)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """Take one optimizer step's micro-batches, normalise and clip their advantages, and weigh their tokens.

        Statistics and denominators cover all micro-batches of all ranks, so that any split of the same rollouts gives
        the same gradient.

        Returns:
            `tuple[list, torch.Tensor]`: for each call of `training_step` its list of micro-batches, and the trained
            tokens of the step over all ranks.
        """
        collate = self._get_collator()
        items = [[collate(rollouts) for rollouts in next(epoch_iterator)] for _ in range(num_batches)]
        if self._publishing is not None:
            self._publishing.sleep()
        micro_batches = [batch for item in items for batch in item]
        num_trained_tokens, metrics = prepare_step(micro_batches, self._step_options, device)
        metrics["perf/has_layout_fallback"] = mean_of(bool(self._get_forward().scorer.plan.fallbacks))
        self._metrics.update({**(self._stream.pop_metrics() if self._stream else {}), **metrics})
        return items, torch.tensor(num_trained_tokens, device=device)

    def _get_forward(self) -> PolicyForward:
        if self._forward is None:
            model = self.accelerator.unwrap_model(self.model)
            self._forward = make_forward(self.args, model, self.model_wrapped, self._reference_model, self.accelerator)
        return self._forward

    def _get_collator(self) -> RolloutCollator:
        facts = self._server_facts
        return RolloutCollator(
            layout=self._get_forward().scorer.plan.layout,
            temperature=self.args.temperature,
            applies_temperature=facts is None or facts.has_processed_logprobs,
            pad_token_id=getattr(self.processing_class, "pad_token_id", None) or 0,
        )

    # Loss

    def training_step(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forward and backward of one item of `get_batch_samples`: all of its micro-batches, gradients added up."""
        loss = torch.zeros((), device=self.args.device)
        with self._activation_offloading:
            for batch in inputs[:-1]:
                with without_gradient_sync(self.accelerator, model):
                    loss += super().training_step(model, batch, num_items_in_batch)
            return loss + super().training_step(model, inputs[-1], num_items_in_batch)

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        return sum(super(AtroposTrainer, self).floating_point_ops(batch) for batch in inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of one micro-batch: its share of the loss of the optimizer step.

        Args:
            model (`nn.Module`):
                The wrapped policy.
            inputs (`dict`):
                From [`~micro_batches.RolloutCollator`] through `get_batch_samples`.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Not supported: full outputs are never computed.
            num_items_in_batch (`torch.Tensor`, *optional*):
                Not used: `token_weights` of the inputs hold every denominator.

        Returns:
            `torch.Tensor` of shape `()`. Times the number of ranks, because gradients are averaged over ranks.
        """
        if return_outputs:
            raise NotImplementedError("AtroposTrainer computes logits at trained positions only.")
        args, token_index, forward = self.args, inputs["token_index"], self._get_forward()
        ref_logprobs = inputs["ref_logprobs"] if args.ref_logprobs == "require" else None
        if forward.reference is not None:
            ref_logprobs = forward.reference.logprobs(model, inputs)[token_index]
        scores, no_loss = forward.scorer(model, inputs)
        entropy = scores.entropy[token_index]
        loss_inputs = LossInputs(
            trainer_logprobs=scores.logprobs[token_index],
            advantages=inputs["advantages"],
            entropy=entropy.detach(),
            rollout_index=inputs["rollout_index"],
            num_rollouts=len(inputs["names"]),
            inference_logprobs=None if args.inference_logprobs == "recompute" else inputs["inference_logprobs"],
            ref_logprobs=ref_logprobs,
        )
        outputs = self.loss_function(loss_inputs)
        self._loss_watch.add(inputs["names"], loss_inputs.sum_per_rollout(outputs.token_losses.detach()))
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Its backward takes the optimizer step: afterwards is too late.
            self._loss_watch.check(self.state.global_step + 1, self.args.device)
        self._metrics.update(outputs.metrics)
        loss = (outputs.token_losses * inputs["token_weights"]).sum() + no_loss
        if args.entropy_coef != 0.0:
            loss = loss - args.entropy_coef * entropy.sum() * inputs["token_mean_weight"]
        if args.distillation_coef != 0.0 and scores.teacher_token_logprobs is not None:
            distillation_sum = teacher_cross_entropy(scores.teacher_token_logprobs[token_index], inputs)
            loss = loss + args.distillation_coef * distillation_sum * inputs["teacher_mean_weight"]
            distillation_sum = distillation_sum.detach().double()
            self._metrics.update({"distillation/loss": Metric("mean", distillation_sum, inputs["num_with_teacher"])})
        return loss * self.accelerator.num_processes

    def compute_advantage_weighted_sft_loss(
        self,
        input_ids: torch.Tensor,
        advantages: torch.Tensor,
        loss_mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[`~trl_atropos.advantage_weighted_sft_loss`] of the current policy, at `args.temperature` and with this
        trainer's normalisation and clipping of the advantages.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, int64), advantages (`(B, T)`, `(B, 1)` or `(B,)`), loss_mask
            (`(B, T)`): see there, errors included.
            attention_mask, position_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                For the model; its own defaults if not given.

        Returns:
            `torch.Tensor` of shape `()`: a mean over the trained tokens of these tensors.
        """
        positions, targets, trained_advantages = select_trained(input_ids, advantages, loss_mask)
        normalized = normalize_advantages(
            trained_advantages, torch.ones_like(targets, dtype=torch.bool), self.args.advantage_normalization
        )
        optional = {"attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: tensor for name, tensor in optional.items() if tensor is not None}
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        with select_positions_before(head, positions):
            logits = self.model_wrapped(input_ids=input_ids, **given, use_cache=False).logits.squeeze(0)
        logprobs, _ = token_logprobs_and_entropy(logits, targets, self.args.temperature)
        return weighted_cross_entropy(logprobs, clip_advantages(normalized, self.args.advantage_clipping))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last call before optimizer.step(): beyond it one NaN is in every weight and in the optimizer's state.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._loss_watch.check(self.state.global_step + 1, self.args.device)
        if grad_norm is not None and not math.isfinite(float(grad_norm)):
            raise NonFiniteGradientError(
                f"The gradient norm of step {self.state.global_step + 1} is {float(grad_norm)}.",
                "The optimizer step was not taken: the model and the server hold the last good policy.",
                "Resume from the last checkpoint with a smaller --learning_rate, or set --max_grad_norm; in half "
                "precision load the model in float32 (--dtype float32).",
            )
        return grad_norm

    # Publishing

    def publish_policy(self) -> None:
        """Publish the current weights. Collective: call it on every rank, after an optimizer step."""
        model = self.accelerator.unwrap_model(self.model)
        metrics = self._require_publishing().publish(model, self.state.global_step)
        if not metrics:
            self._last_log = (time.perf_counter(), self.state.global_step)
        elif self.is_world_process_zero():
            self._metrics.update({name: mean_of(value) for name, value in metrics.items()})

    def weight_sync(self, policy_version: int) -> AbstractContextManager[WeightSync]:
        """`with trainer.weight_sync(version) as sync: sync.push(model)`, on every rank: pauses the servers, takes a model or
        all (name, tensor) pairs, and ends with the servers resumed and the publish proven, or raises with them still
        paused. The trainer publishes by itself after its steps."""
        return self._require_publishing().weight_sync(policy_version)

    def _require_publishing(self) -> TrainerPublishing:
        if self._publishing is None:
            self._connect()
        assert self._publishing is not None
        return self._publishing

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log. Names and units: `metrics.METRICS`."""
        if "loss" in logs:
            logs = {**logs, **self._collect_metrics()}
        super().log(logs, start_time)

    def _collect_metrics(self) -> dict[str, float]:
        now = time.perf_counter()
        if self._last_log is not None:
            last_time, last_step = self._last_log
            self._metrics.update({"step_time": mean_of((now - last_time) / (self.state.global_step - last_step))})
        self._last_log = (now, self.state.global_step)
        # Linux reports kibibytes.
        peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._metrics.update({"memory/peak_rss_bytes": maximum_of(float(peak_rss_bytes))})
        metrics = self._metrics.reduce(distributed=is_distributed(), device=self.args.device)
        metrics["policy_version"] = float(self.policy_version)
        if self._stream is not None:
            metrics["num_tokens"] = float(self._stream.num_tokens)
            metrics["num_rollouts_trained"] = float(self._stream.num_rollouts_trained)
            metrics["num_rollouts_dropped"] = float(self._stream.num_rollouts_dropped)
        return metrics

    @property
    def policy_version(self) -> int:
        """Of the last publish; 0 before the first."""
        return self._publishing.policy_version if self._publishing else 0

    @property
    def _vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size


def _unchanged(item: Any) -> Any:
    return item
