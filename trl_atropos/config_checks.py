"""Options of `AtroposConfig` that contradict each other, or would silently do nothing: refused when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING


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


def check_parallelism(args: AtroposConfig) -> None:
    """Refuse ranks that are not data-parallel: each is dealt rollouts of its own."""
    parallelism = args.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise ValueError(
            f"parallelism_config has {parallelism.non_data_parallel_size} tensor-, context- or sequence-parallel ranks per "
            "replica. They would be dealt different rollouts and counted several times in the loss. Use data parallelism, "
            "FSDP or DeepSpeed."
        )


def check_batch_size(args: AtroposConfig) -> None:
    step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.atropos_batch_size is None:
        args.atropos_batch_size = step_size
    elif args.atropos_batch_size != step_size:
        raise ValueError(
            f"atropos_batch_size ({args.atropos_batch_size}) is not per_device_train_batch_size "
            f"({args.per_device_train_batch_size}) x gradient_accumulation_steps "
            f"({args.gradient_accumulation_steps}) x processes ({args.world_size}) = {step_size}. One optimizer step "
            "trains one batch of the API. Leave --atropos_batch_size out, or make them equal."
        )
