"""Options of `AtroposConfig` that contradict each other, or would silently do nothing: refused when it is made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from accelerate import ParallelismConfig


if TYPE_CHECKING:
    from .atropos_config import AtroposConfig


def check_choices(args: object, choices_of: Mapping[str, Sequence[str]]) -> None:
    """Refuse a value that is not one of an option's choices."""
    for name, choices in choices_of.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"{name} is {getattr(args, name)!r}. Choose one of: {', '.join(choices)}.")


def check_positive(args: object, names: Sequence[str]) -> None:
    """Refuse zero, negative numbers and NaN."""
    for name in names:
        # Written so that NaN is refused too.
        if not getattr(args, name) > 0:
            raise ValueError(f"{name} is {getattr(args, name)}, it must be positive. Set --{name}.")


def check_loss(args: AtroposConfig) -> None:
    """Refuse options of the loss that contradict each other."""
    options = args.loss_options
    for condition, what, why, fix in (
        (
            args.inference_logprobs == "recompute" and options.vllm_importance_sampling_correction,
            "vllm_importance_sampling_correction is on and inference_logprobs is recompute",
            "Then there is no difference to the policy that sampled left to correct",
            "Set --inference_logprobs require, or leave the correction off",
        ),
        (
            args.inference_logprobs == "recompute" and options.off_policy_mask_threshold is not None,
            f"off_policy_mask_threshold is {options.off_policy_mask_threshold} and inference_logprobs is recompute",
            "Then every rollout counts as on-policy, and nothing would be masked",
            "Set --inference_logprobs require, or leave --off_policy_mask_threshold out",
        ),
        (
            args.ref_logprobs == "require" and args.beta == 0.0,
            "ref_logprobs is require and beta is 0",
            "Without a KL term the reference would not be used",
            "Set --beta, or leave --ref_logprobs out",
        ),
        (
            not math.isfinite(args.entropy_coef),
            f"entropy_coef is {args.entropy_coef}",
            "The loss would not be finite",
            "Set --entropy_coef to a number",
        ),
        (
            not 0 <= args.distillation_coef < math.inf,
            f"distillation_coef is {args.distillation_coef}",
            "A negative weight would push the policy away from the teacher",
            "Set --distillation_coef to 0 or more",
        ),
        (
            args.max_completion_length is not None and args.loss_type != "dr_grpo",
            f"max_completion_length is {args.max_completion_length} and loss_type is {args.loss_type}",
            "Only dr_grpo divides by it; environments decide how long completions get",
            "Leave --max_completion_length out, or set --loss_type dr_grpo",
        ),
        (
            args.max_completion_length is not None and not args.max_completion_length > 0,
            f"max_completion_length is {args.max_completion_length}",
            "The loss is divided by it",
            "Set it above 0",
        ),
    ):
        if condition:
            raise ValueError(f"{what}. {why}. {fix}.")
    if args.max_tokens_per_micro_batch is not None:
        _check_token_budget(args, args.max_tokens_per_micro_batch)


def _check_token_budget(args: AtroposConfig, budget: int) -> None:
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


def check_unsupported(args: AtroposConfig) -> None:
    """Refuse options of `TrainingArguments` that would be wrong here or would silently do nothing."""
    for name, accepted, reason in (
        ("ignore_data_skip", True, "a live stream cannot be replayed by skipping batches"),
        ("logging_nan_inf_filter", False, "it would show a finite loss where there is none"),
        ("auto_find_batch_size", False, "a batch that was fetched cannot be fetched again in another size"),
        ("use_liger_kernel", False, "its fused loss leaves no logits at trained positions"),
        ("label_smoothing_factor", 0.0, "the loss is not the cross entropy of transformers"),
    ):
        if getattr(args, name) != accepted:
            raise ValueError(f"{name} is {getattr(args, name)}: {reason}. Leave --{name} at {accepted}.")


def check_offloading(args: AtroposConfig) -> None:
    """Refuse to move activations from host memory to host memory."""
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "activation_offloading is on and the trainer runs on a CPU. Activations are in host memory already. Leave "
            "--activation_offloading out; --gradient_checkpointing true saves memory on a CPU."
        )


def sequence_parallel_size(args: AtroposConfig) -> int:
    """How many ranks share a sequence, as the options or the launcher say.

    Raises:
        `ValueError`: for tensor and context parallelism, and for what does not go together with sequence parallelism.
    """
    parallelism = args.parallelism_config
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
        _check_sequence_parallel(args, size, parallelism.data_parallel_size)
    return size


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


def check_batch_size(args: AtroposConfig) -> None:
    """Set `atropos_batch_size` if it is not given, and refuse one that is not what one optimizer step trains."""
    num_data_ranks = args.world_size // sequence_parallel_size(args)
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
