"""The trainer.

    Atropos API --RolloutStream--> micro-batches of one optimizer step
        get_batch_samples   layout; token counts and advantage statistics over all micro-batches and ranks
        training_step       one or several micro-batches
        compute_loss        model -> logprobs at trained positions -> weighted sum of the tokens' losses
        optimizer.step      only if every loss and every gradient is finite
        on_step_end         PolicyPublisher -> vLLM servers

Shape letters: B rollouts, T tokens, N trained tokens of a micro-batch, R its rollouts, U its scored positions.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)
from trl.models import get_act_offloading_ctx_manager

from ..data.micro_batches import Dealer, RolloutCollator
from ..distributed import is_distributed, run_on_main_process, without_gradient_sync
from ..loss.losses import LossFunction, LossInputs, make_loss_function
from ..loss.metrics import Metric, MetricAccumulator, mean_of
from ..loss.step import LossWatch, check_grad_norm, distillation_loss, is_overflow, keep_high_entropy, prepare_step
from ..loss.weighted_sft import weighted_sft_loss_of_model
from ..policy.forward import PolicyForward, make_forward
from ..policy.load import (
    eos_token_ids,
    padding_id,
    prepare_policy,
    tokenizer_of,
    use_sparse_embedding_gradient,
    vocab_size_of,
)
from ..policy.recompute import recompute_selectively
from ..policy.sequence_parallel import use_sequence_parallel
from ..report.completions import make_completions_table
from ..report.watching import Watching
from ..weight_sync.base import WeightTransport
from ..weight_sync.publisher import WeightSync
from ..wire.parse import WireLimits
from .atropos_config import AtroposConfig
from .callbacks import StepCallback
from .checkpoints import check_optimizer, find_checkpoint
from .evaluation import Evaluator
from .hub_uploads import HubUploads
from .preflight import check_launch, warn_of_spinning_threads
from .run_data import RunData
from .servers import Connection, open_connection
from .step_clock import StepClock


if TYPE_CHECKING:
    from peft import PeftConfig


logger = logging.getLogger(__name__)


class AtroposTrainer(HubUploads):
    """
    Trainer for Atropos environments: takes scored rollouts from the Atropos API, applies an advantage-weighted loss that
    is exact at any split of the batch, and keeps the vLLM server that the environments query on the newest policy.

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`):
            The policy: an instance, or a path or id that is loaded with `args.model_init_kwargs` (float32 unless these
            say otherwise).
        args ([`AtroposConfig`], *optional*):
            Options.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Tokenizer, or a processor with one, for padding, for the logprob probe, and to be saved with the model. Loaded
            from the model's path if not given.
        peft_config (`PeftConfig`, *optional*):
            Wraps the model. Not together with a `PeftModel`.
        callbacks (`list[TrainerCallback]`, *optional*):
            More callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and learning rate scheduler.
        weight_transport ([`~weight_sync.base.WeightTransport`], *optional*):
            Moves the weights to the server. Chosen from what the server reports if not given.
        loss_fn ([`~loss.losses.LossFunction`], *optional*):
            Your own loss instead of the one of `args.loss_type`: a pure function from [`~loss.losses.LossInputs`] to
            [`~loss.losses.LossOutputs`]. Its token losses are weighed as `args.loss_type` says (docs/losses.md).

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
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        weight_transport: WeightTransport | None = None,
        loss_fn: LossFunction | None = None,
    ):
        args = args or AtroposConfig(output_dir="atropos-output")
        # Before the adapter is created: its initial weights are random, and must be the same on every rank.
        set_seed(args.seed)
        self._needs_reference = args.beta != 0.0 and args.ref_logprobs == "recompute"
        policy = prepare_policy(
            model,
            args,
            processing_class,
            peft_config,
            needs_reference=self._needs_reference,
            sequence_parallel_size=args.sequence_parallel_size,
            max_length=args.max_length,
        )
        self._reference_model = policy.reference_model
        # Rollouts are text: of a processor, which is saved with the model, nothing else is needed.
        self._tokenizer = tokenizer_of(policy.processing_class)
        super().__init__(
            model=policy.model,
            args=args,
            processing_class=policy.processing_class,
            # What is evaluated is not a dataset, but transformers insists on one.
            eval_dataset=None if args.eval_strategy == "no" else [],
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)
        self.args: AtroposConfig = args
        self.loss_function = make_loss_function(args) if loss_fn is None else loss_fn
        self._forward: PolicyForward | None = None
        self._loss_watch = LossWatch()
        self._activation_offloading = (
            get_act_offloading_ctx_manager(self.model) if args.activation_offloading else nullcontext()
        )
        self._evaluator = Evaluator(args.eval_path, args.eval_log_dir, args.eval_max_tokens)
        # Every metric that an evaluation has had, with its last value.
        self._last_evaluation: dict[str, float] = {}
        self._completions = make_completions_table(args, args, args, self._tokenizer)
        self._weight_transport = weight_transport
        # Made at the first publish or at the start of train(), whichever comes first.
        self._connection: Connection | None = None
        # Of the run that train() makes, or made last.
        self._data: RunData | None = None
        self._metrics = MetricAccumulator()
        self._clock = StepClock()
        self._sequence_parallel = use_sequence_parallel(self.accelerator)
        self._data_group = self._sequence_parallel.data_group if self._sequence_parallel else None
        # A compiler knows no sparse gradient.
        if self.accelerator.distributed_type == DistributedType.NO and not args.torch_compile:
            use_sparse_embedding_gradient(self.model)
        is_live = args.data_path is None
        publish, finish = (self.publish_policy, self._finish_publish) if is_live else (None, None)
        self.add_callback(StepCallback(self._mark_trained, publish, args.weight_sync_steps, finish))
        self._watching = Watching(self, args, publishes=args.data_path is None)

    # Life of a run

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint, or True for the newest complete one in `output_dir`. Batches that were fetched and not trained
                by then are trained first. With True and no checkpoint yet, the run starts at step 0 with those.
            kwargs:
                As for [`~transformers.Trainer.train`].

        Raises:
            [`TrlAtroposError`]: before the first step if API, server, data and model do not fit together; later if the data
                or a publish fails. The server is left paused if it does not hold a complete policy.
        """
        check_launch(self.accelerator, self.args.n_gpu)
        if self.is_world_process_zero():
            warn_of_spinning_threads(self.args.device)
        checkpoint, state = run_on_main_process(lambda: self._find_checkpoint(resume_from_checkpoint))
        # Another run may wrap the model in another way, and takes other data.
        self._forward, self._data = None, None
        try:
            if self.args.data_path is None:
                self._connect().publisher.begin_run(state.get("policy_version", 0))
            self._data = self._open_data(state, resumes=bool(resume_from_checkpoint))
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self._watching.close()
            if self._data is not None:
                self._data.close()
            if self._connection is not None:
                self._connection.close()

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> tuple[str | None, dict[str, Any]]:
        checkpoint, state = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        check_optimizer(checkpoint, state, self.args)
        return checkpoint, state

    def _connect(self) -> Connection:
        """Reach the servers and check them, unless that is done; collective."""
        if self._connection is None:
            self._connection = open_connection(self.args, self.model, self._tokenizer, self._weight_transport)
        return self._connection

    def _open_data(self, state: dict[str, Any], *, resumes: bool) -> RunData:
        """Open the source of batches; collective. Recorded data may end the run before `max_steps`."""
        args, num_sharing = self.args, self.args.sequence_parallel_size
        assert args.atropos_batch_size is not None, "set when the options were checked"
        dealer = Dealer(
            args.atropos_batch_size,
            args.per_device_train_batch_size,
            # Ranks that share sequences are dealt the same rollouts.
            rank=args.process_index // num_sharing,
            world_size=args.world_size // num_sharing,
            max_tokens=args.max_tokens_per_micro_batch,
            layout=lambda: self._get_forward().scorer.plan.layout,
        )
        data = RunData(
            args,
            self,
            dealer,
            WireLimits(
                vocab_size=vocab_size_of(self.model),
                max_length=args.max_length,
                reads_teacher=args.distillation_coef > 0,
            ),
            None if self._connection is None else self._connection.servers,
            is_main_process=self.is_world_process_zero(),
            resumes=resumes,
            state=state,
            eos_token_ids=eos_token_ids(self.model, self._tokenizer, is_required=args.mask_truncated_completions),
        )
        if data.num_offline_steps is not None:
            args.max_steps = min(args.max_steps, data.num_offline_steps)
        return data

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches, straight from the source. Not prepared by accelerate: they are dealt already."""
        assert self._data is not None, "train() opens the data"
        # Collated in get_batch_samples: the layout is found out with the wrapped model, which does not exist yet.
        # A generator of its own: the loader draws from it at its start, which a resume must not do twice from the global one.
        return DataLoader(self._data.stream, batch_size=None, collate_fn=list, generator=torch.Generator())

    def _mark_trained(self) -> None:
        if self._data is not None:
            self._data.mark_trained(self.state.global_step)

    @property
    def global_step(self) -> int:
        """Optimizer steps done so far."""
        return self.state.global_step

    @property
    def num_steps_left(self) -> int:
        """Optimizer steps that are still to be made."""
        return self.args.max_steps - self.state.global_step

    @property
    def policy_version(self) -> int:
        """Number of the policy that was published last, or is on its way; 0, the starting checkpoint, before the first
        publish."""
        return self._connection.publisher.policy_version if self._connection else 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._data is not None:
            self._data.before_save(self.state, self.policy_version)
        super()._save_checkpoint(model, trial)
        if self._data is not None:
            self._data.after_save()

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
        # A run that was killed after its last step has none left; transformers would make one more.
        num_left = num_batches if self.state.global_step < self.args.max_steps else 0
        items = [[collate(rollouts) for rollouts in item] for item in itertools.islice(epoch_iterator, num_left)]
        if not items:
            # Recorded data of which whole batches were refused is at its end before the last step.
            self.control.should_training_stop = True
            return [], torch.zeros((), device=device)
        if self._connection is not None:
            self._connection.publisher.sleep()
        micro_batches = [batch for item in items for batch in item]
        num_trained_tokens, metrics = prepare_step(
            micro_batches, self.args, self.args.max_length, device, self._data_group
        )
        if self.args.top_entropy_quantile < 1.0:
            metrics |= self._keep_high_entropy(micro_batches)
        metrics["perf/has_layout_fallback"] = mean_of(bool(self._get_forward().scorer.plan.fallbacks))
        self._metrics.update({**(self._data.pop_metrics() if self._data else {}), **metrics})
        return items, torch.tensor(num_trained_tokens, device=device)

    def _keep_high_entropy(self, micro_batches: list[dict[str, Any]]) -> dict[str, Metric]:
        """Find out at which tokens of the step the policy is least sure, and train only these; collective."""
        self.model_wrapped.train()
        entropies = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in micro_batches:
                inputs = self._prepare_inputs(batch)
                scores, _ = self._get_forward().scorer(self.model_wrapped, inputs)
                entropies.append(scores.entropy[inputs["token_index"]])
        return keep_high_entropy(micro_batches, entropies, self.args.top_entropy_quantile, self._data_group)

    def _get_forward(self) -> PolicyForward:
        if self._forward is None:
            model = self.accelerator.unwrap_model(self.model)
            if self.args.recompute_granularity == "selective":
                # The Trainer has enabled gradient checkpointing by now.
                recompute_selectively(model)
            self._forward = make_forward(
                model,
                self.model_wrapped,
                self._reference_model,
                self.accelerator,
                layout=self.args.sequence_layout,
                max_length=self.args.max_length,
                needs_reference=self._needs_reference,
                sequence_parallel=self._sequence_parallel,
                has_float32_head=self.args.cast_lm_head_to_fp32,
            )
        return self._forward

    def _get_collator(self) -> RolloutCollator:
        scorer = self._get_forward().scorer
        return RolloutCollator(
            layout=scorer.plan.layout,
            shares_between_groups=scorer.shares_between_groups,
            temperature=self.args.temperature,
            applies_temperature=self._connection is None or self._connection.facts.has_processed_logprobs,
            pad_token_id=padding_id(self._tokenizer, vocab_size_of(self.model)),
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

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:  # noqa: D102 (that of `Trainer`)
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
                From [`~data.micro_batches.RolloutCollator`] through `get_batch_samples`.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Not supported: full outputs are never computed.
            num_items_in_batch (`torch.Tensor`, *optional*):
                Not used: `token_weights` of the inputs hold every denominator.

        Returns:
            `torch.Tensor` of shape `()`. Times the number of data-parallel ranks: gradients are averaged over them.
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
            distillation, metric = distillation_loss(scores.teacher_token_logprobs[token_index], inputs)
            loss = loss + args.distillation_coef * distillation
            self._metrics.update({"distillation/loss": metric})
        return loss * forward.num_data_ranks

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

        The arguments are those of the function, shapes and errors included; `attention_mask` and `position_ids` of shape
        `(B, T)` go to the model.

        Returns:
            `torch.Tensor` of shape `()`: a mean over the trained tokens of these tensors.
        """
        optional = {"attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: tensor for name, tensor in optional.items() if tensor is not None}
        head = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        inputs = {"input_ids": input_ids, **given}
        return weighted_sft_loss_of_model(
            self.model_wrapped, head, inputs, advantages, loss_mask, self.args, temperature=self.args.temperature
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last call before optimizer.step(): beyond it one NaN is in every weight and in the optimizer's state.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._loss_watch.check(self.state.global_step + 1, self.args.device)
        scaler = self.accelerator.scaler
        if scaler is not None:
            is_skipped = is_overflow(grad_norm, scaler.get_scale())
            self._metrics.update({"perf/skipped_steps_frac": mean_of(is_skipped)})
            if is_skipped:
                return grad_norm
        check_grad_norm(self.state.global_step + 1, grad_norm)
        return grad_norm

    # Publishing

    def publish_policy(self) -> None:
        """Publish the current weights. Collective: call it on every rank, after an optimizer step.

        With `weight_sync_background`, they are on their way when this ends.
        """
        model = self.accelerator.unwrap_model(self.model)
        self._record_publish(self._connect().publisher.publish_step(model, self.state.global_step))

    def _finish_publish(self) -> None:
        if self._connection is not None:
            metrics = self._connection.publisher.finish()
            if metrics:
                self._record_publish(metrics)

    def _record_publish(self, metrics: dict[str, float]) -> None:
        if not metrics:
            self._clock.start(self.state.global_step)
        elif self.is_world_process_zero():
            self._metrics.update({name: mean_of(value) for name, value in metrics.items()})

    def weight_sync(self, policy_version: int) -> AbstractContextManager[WeightSync]:
        """`with trainer.weight_sync(version) as sync: sync.push(model)`, on every rank: pauses the servers, takes a model or
        all (name, tensor) pairs, and ends with the servers resumed and the publish proven, or raises with them still
        paused. The trainer publishes by itself after its steps."""
        return self._connect().publisher.weight_sync(policy_version, self._record_publish)

    # Evaluation and logging

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate `eval_path` and `eval_log_dir`; every rank gets the metrics (`report/metric_help.py`).

        Environments evaluate when they please: what is new is logged, and what is returned, and chooses the best
        checkpoint, is the last value of every metric.
        """
        # Of the newest policy.
        self._finish_publish()
        servers = None if self._connection is None else self._connection.servers
        client = None if servers is None else servers.vllm_clients[0]
        metrics = run_on_main_process(lambda: self._evaluator(client))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self._last_evaluation |= metrics
        return dict(self._last_evaluation)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model
        if name is None or f"eval_{name.removeprefix('eval_')}" in metrics:
            return super()._determine_best_metric(metrics, trial)
        logger.warning(
            f"metric_for_best_model is {name}, and no evaluation has had it yet, so that no checkpoint is the best one; there are: "
            f"{', '.join(sorted(metrics)) or 'none'}. If that does not change, correct --metric_for_best_model."
        )
        return False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log. Names and units: `report/metric_help.py`."""
        if "loss" in logs:
            logs = {**logs, **self._collect_metrics()}
            if self._completions is not None and self._data is not None:
                self._completions.log(self._data.stream.step_groups, self.state.global_step)
        super().log(logs, start_time)

    def _collect_metrics(self) -> dict[str, float]:
        self._metrics.update(self._clock.read(self.state.global_step))
        metrics = self._metrics.reduce(self._data_group, is_distributed(), self.args.device)
        metrics["policy_version"] = float(self.policy_version)
        totals = self._data.stream.total_metrics() if self._data else {}
        return {**metrics, **{name: float(value) for name, value in totals.items()}}
