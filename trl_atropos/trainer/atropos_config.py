"""All options of `AtroposTrainer`: those of its parts, those of transformers, and what must fit together between them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from accelerate import ParallelismConfig
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..data.options import DataOptions
from ..distributed import CONTROL_PATIENCE
from ..loss.options import StepOptions
from ..options import PositiveFloat, check_declared
from ..policy.options import PolicyOptions
from ..report.options import ReportOptions, choose_tracker
from ..weight_sync.options import WeightSyncOptions
from .training_arguments import check_training_arguments


METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules of transformers that step with a metric of an evaluation."""


@dataclass
class AtroposConfig(DataOptions, PolicyOptions, StepOptions, WeightSyncOptions, ReportOptions, TrainingArguments):
    r"""
    Configuration class for the [`AtroposTrainer`].

    Only the options specific to this trainer are listed by `--help` under their own names; the others are those of
    [`~transformers.TrainingArguments`], of which these defaults differ: `logging_steps` 1, `learning_rate` 1e-6,
    `lr_scheduler_type` constant, `gradient_checkpointing` True, `bf16` True on a GPU, `max_steps` 1000,
    `num_train_epochs` 1, `ddp_find_unused_parameters` False, `ignore_data_skip` True, `logging_nan_inf_filter` False,
    `report_to` auto.

    Raises:
        `ValueError`: at construction, if options contradict each other; the message names both.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Defaults that differ from TrainingArguments
    logging_steps: float = field(default=1, metadata={"help": "Log every X optimizer steps."})
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass to save memory."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 mixed precision. If not set: True on a GPU unless `fp16` is set, False on a CPU."},
    )
    max_steps: int = field(
        default=1000,
        metadata={
            "help": "Number of optimizer steps. Must be positive: the stream of rollouts has no end. With `data_path` the run "
            "ends earlier if the data does."
        },
    )
    num_train_epochs: PositiveFloat = field(
        default=1.0, metadata={"help": "Passes over `data_path`. Not used with a live API."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "With DDP, search each step for parameters without a gradient. There are none: every parameter that is "
            "trained takes part in every micro-batch."
        },
    )
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "Always True: a live stream cannot be replayed by skipping batches."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Always False: a loss that is not finite stops the run instead."}
    )
    resume_without_optimizer: bool = field(
        default=False,
        metadata={
            "help": "Resume from a checkpoint of `save_only_model`, too: with the optimizer, the learning rate schedule and the "
            "random numbers of a fresh start."
        },
    )

    @property
    def sequence_parallel_size(self) -> int:
        """How many ranks share a sequence, as the options or the launcher say.

        Raises:
            `ValueError`: for tensor and context parallelism, and for what does not go together with sequence parallelism.
        """
        parallelism = self.parallelism_config
        if parallelism is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
            # What the launcher was told, as accelerate reads it.
            parallelism = ParallelismConfig()
        if parallelism is None:
            return 1
        size = parallelism.sp_size
        if parallelism.non_data_parallel_size != size:
            raise ValueError(
                f"The parallelism configuration has {parallelism.tp_size} tensor-parallel and {parallelism.cp_size} context-parallel "
                "ranks per replica. They would be dealt different rollouts and counted several times in the loss. Use data "
                "parallelism, FSDP, DeepSpeed, or sequence parallelism (parallelism_config_sp_size)."
            )
        if size > 1:
            _check_sequence_parallel(self, size, parallelism.data_parallel_size)
        return size

    def __post_init__(self) -> None:
        if self.bf16 is None:
            import torch

            self.bf16 = not self.fp16 and torch.cuda.is_available() and not self.use_cpu
        if choose_tracker(self):
            # transformers would upload it when the model is pushed.
            self.trackio_static_space_id = False
        TrainingArguments.__post_init__(self)
        check_training_arguments(self)
        for part in (DataOptions, PolicyOptions, StepOptions, WeightSyncOptions, ReportOptions):
            part.__post_init__(self)
        if self.max_steps <= 0:
            raise ValueError(
                f"max_steps is {self.max_steps}. The stream of rollouts has no end, so epochs do not exist here. Set "
                "--max_steps to the number of optimizer steps."
            )
        check_declared(self, AtroposConfig)
        if self.push_merged and not self.push_to_hub:
            raise ValueError(
                "push_merged is set and push_to_hub is not. Nothing is uploaded so. Set --push_to_hub, too."
            )
        _check_evaluation(self)
        _check_waiting(self)
        _check_token_budget(self)
        _check_batch_size(self)
        _check_offloading(self)
        _check_recomputing(self)

    def to_dict(self) -> dict[str, Any]:
        """Options as a dictionary, for logs and trackers: the API key is masked, as transformers does with tokens."""
        options = super().to_dict()
        if options.get("vllm_api_key"):
            options["vllm_api_key"] = "<VLLM_API_KEY>"
        return options

    def __str__(self) -> str:
        # The one that @dataclass makes shows the tokens.
        options = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{options})"

    __repr__ = __str__


def _check_evaluation(args: AtroposConfig) -> None:
    """Refuse an evaluation that does not know when, or of what."""
    has_evaluation = args.eval_path is not None or args.eval_log_dir is not None
    if has_evaluation != (args.eval_strategy != "no"):
        raise ValueError(
            f"eval_strategy is {args.eval_strategy.value}, eval_path {args.eval_path} and eval_log_dir {args.eval_log_dir}. An "
            "evaluation needs to know when and what. Set --eval_strategy steps and --eval_path or --eval_log_dir, or none of them."
        )
    if args.lr_scheduler_type in METRIC_SCHEDULES and args.eval_path is None:
        raise ValueError(
            f"lr_scheduler_type is {SchedulerType(args.lr_scheduler_type).value} and eval_path is None. This schedule steps with a metric at every "
            "evaluation, and environments evaluate when they please. Set --eval_path and --metric_for_best_model, or another "
            "--lr_scheduler_type."
        )


def _check_waiting(args: AtroposConfig) -> None:
    """Refuse to wait for a batch for longer than the other ranks wait for rank 0."""
    patience_s = CONTROL_PATIENCE.total_seconds()
    if args.batch_timeout_s >= patience_s:
        raise ValueError(
            f"batch_timeout_s ({args.batch_timeout_s}) is not below {patience_s:.0f} s. On several ranks the others wait for the "
            "batch that long and would end first. Lower --batch_timeout_s."
        )


def _check_token_budget(args: AtroposConfig) -> None:
    """Refuse a token budget that a rollout does not fit into, or that something else would decide about."""
    budget = args.max_tokens_per_micro_batch
    if budget is None:
        return
    if budget < args.max_length:
        raise ValueError(
            f"max_tokens_per_micro_batch is {budget} and max_length is {args.max_length}. A rollout is trained whole, so "
            "the longest must fit. Raise --max_tokens_per_micro_batch, or lower --max_length."
        )
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"max_tokens_per_micro_batch is {budget} and gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}. The token budget decides how many forward passes a step takes. Set "
            "--gradient_accumulation_steps 1, and --per_device_train_batch_size to the rollouts of a step per process."
        )


def _check_offloading(args: AtroposConfig) -> None:
    """Refuse to move activations from host memory to host memory."""
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "activation_offloading is on and the trainer runs on a CPU. Activations are in host memory already. Leave "
            "--activation_offloading out; --gradient_checkpointing true saves memory on a CPU."
        )


def _check_recomputing(args: AtroposConfig) -> None:
    """Refuse what selective recomputation does not go together with, and options that would do nothing."""
    if args.recompute_granularity != "selective":
        return
    if not args.gradient_checkpointing:
        raise ValueError(
            "recompute_granularity is selective and gradient_checkpointing is off. Nothing is recomputed so. Set "
            "--gradient_checkpointing true, or leave --recompute_granularity out."
        )
    kwargs = args.gradient_checkpointing_kwargs or {}
    assert isinstance(kwargs, dict), "TrainingArguments parses the options that are dictionaries"
    without_effect = sorted(
        name
        for name, value in kwargs.items()
        if name != "every_n_layers" and (name, value) != ("use_reentrant", False)
    )
    if without_effect:
        raise ValueError(
            f"recompute_granularity is selective and gradient_checkpointing_kwargs sets {', '.join(without_effect)}. They say how "
            "whole layers are run again, and none is. Leave them out of --gradient_checkpointing_kwargs (every_n_layers acts), "
            "or set --recompute_granularity full."
        )
    for name, is_on, why in (
        ("activation_offloading", args.activation_offloading, "What is kept of a layer would stay on the device"),
        ("torch_compile", args.torch_compile, "The compiler decides itself what it recomputes"),
        (
            "deepspeed",
            is_deepspeed_zero3_enabled(),
            "ZeRO-3 gathers the weights of a layer for as long as it runs, and they would be kept with its tensors",
        ),
    ):
        if is_on:
            stage = " (ZeRO-3)" if name == "deepspeed" else ""
            raise ValueError(
                f"recompute_granularity is selective and {name}{stage} is on. {why}. Set --recompute_granularity full, or leave "
                f"--{name} out."
            )


def _check_sequence_parallel(args: AtroposConfig, size: int, num_replicas: int) -> None:
    if size * num_replicas != args.world_size:
        raise ValueError(
            f"parallelism_config_sp_size is {size} and parallelism_config_dp_shard_size {num_replicas}, there are "
            f"{args.world_size} processes. Set the two so that their product is the number of processes."
        )
    for name, accepted, why in (
        (
            "per_device_train_batch_size",
            (1,),
            "ranks share one sequence at a time; --gradient_accumulation_steps takes more",
        ),
        ("max_tokens_per_micro_batch", (None,), "a micro-batch is one sequence"),
        ("sequence_layout", ("auto", "padded"), "a row is one sequence"),
    ):
        if getattr(args, name) not in accepted:
            raise ValueError(
                f"{name} is {getattr(args, name)} and {size} ranks share each sequence (parallelism_config_sp_size): {why}. Set "
                f"--{name} {accepted[-1]}, or leave it out."
            )


def _check_batch_size(args: AtroposConfig) -> None:
    """Set `atropos_batch_size` if it is not given, and refuse one that is not what one optimizer step trains."""
    num_data_ranks = args.world_size // args.sequence_parallel_size
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_data_ranks
    if args.atropos_batch_size is None:
        args.atropos_batch_size = step_size
    elif args.atropos_batch_size != step_size:
        raise ValueError(
            f"atropos_batch_size ({args.atropos_batch_size}) is not per_device_train_batch_size "
            f"({args.per_device_train_batch_size}) x gradient_accumulation_steps "
            f"({args.gradient_accumulation_steps}) x data-parallel processes ({num_data_ranks}) = {step_size}. One optimizer step "
            "trains one batch of the API. Leave --atropos_batch_size out, or make them equal."
        )
