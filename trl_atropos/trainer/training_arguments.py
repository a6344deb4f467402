"""Every option of transformers' `TrainingArguments`: whether it acts here, and if not, what is accepted and why.

An option that is in none of the three tables came with a transformers that is newer than they are, and is refused as well.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import TrainingArguments


@dataclass(frozen=True)
class Restriction:
    """What of an option is accepted, the default first; why nothing else is, and what to use instead."""

    accepted: tuple[Any, ...]
    why: str
    instead: str = ""


SUPPORTED = frozenset((
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "resume_from_checkpoint",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "weight_decay",
    "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
    "bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps",
    "use_cpu",
    "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "seed", "full_determinism", "skip_memory_metrics",
    "logging_steps", "logging_first_step", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm",
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better",
    "save_steps", "save_only_model", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint",
    "restore_callback_states_from_checkpoint",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
    "hub_revision",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    "ddp_timeout",
    "fsdp", "fsdp_config", "deepspeed", "parallelism_config",
))  # fmt: skip
"""Options that act as transformers says."""

HARMLESS = {
    "do_train": "a flag for scripts; the trainer does not read it",
    "do_eval": "a flag for scripts; the trainer does not read it",
    "do_predict": "a flag for scripts; the trainer does not read it",
    "remove_unused_columns": "rollouts have no columns, so none is removed",
    "dataloader_pin_memory": "micro-batches are made in this process and copied as they are",
    "local_rank": "set by the launcher",
}
"""Options of which every value describes what happens."""

_NO_DATASET = "rollouts come from the API or from data_path, in their order, and are made into micro-batches by rank 0"
_NO_LOCAL_EVALUATION = "an evaluation is done by the inference server and by the environments, not by this model"
_EPOCHS = "the stream of rollouts has no epochs"

RESTRICTED = {
    "logging_strategy": Restriction(("steps", "no"), _EPOCHS, "Set --logging_strategy steps and --logging_steps."),
    "save_strategy": Restriction(("steps", "no", "best"), _EPOCHS, "Set --save_strategy steps and --save_steps."),
    "eval_strategy": Restriction(("no", "steps"), _EPOCHS, "Set --eval_strategy steps and --eval_steps."),
    "logging_nan_inf_filter": Restriction((False,), "it would show a finite loss where there is none"),
    "include_num_input_tokens_seen": Restriction(
        ("no",), "`num_tokens` is logged at every step", "Leave --include_num_input_tokens_seen out."
    ),
    "ignore_data_skip": Restriction((True,), "a live stream cannot be replayed by skipping batches"),
    "auto_find_batch_size": Restriction(
        (False,),
        "a batch that was fetched cannot be fetched again in another size",
        "Lower --per_device_train_batch_size, or set --max_tokens_per_micro_batch.",
    ),
    "average_tokens_across_devices": Restriction(
        (True,),
        "the denominators of a loss are those of the whole step, so that any number of ranks gives the same gradient",
    ),
    "debug": Restriction(
        ([],),
        "its hooks take the minimum of every output, and the head of the model is given no position during its forward pass",
        "Leave --debug out; a loss or gradient that is not finite ends the run, and names the rollouts.",
    ),
    "label_smoothing_factor": Restriction((0.0,), "the loss is not the cross entropy of transformers"),
    "neftune_noise_alpha": Restriction(
        (None,), "noise in the embeddings changes the logprobs of the policy itself, against which the ratio is taken"
    ),
    "use_liger_kernel": Restriction((False,), "its fused loss leaves no logits at trained positions"),
    "liger_kernel_config": Restriction((None,), "Liger kernels are not used"),
    "use_cache": Restriction((False,), "a training step has no use for cached keys and values"),
    "data_seed": Restriction((None,), f"nothing is sampled: {_NO_DATASET}"),
    "dataloader_drop_last": Restriction((False,), _NO_DATASET),
    "dataloader_num_workers": Restriction(
        (0,), _NO_DATASET, "--num_prefetched_batches 1 fetches and checks the next batch during a step."
    ),
    "dataloader_persistent_workers": Restriction((False,), _NO_DATASET),
    "dataloader_prefetch_factor": Restriction(
        (None,), _NO_DATASET, "--num_prefetched_batches 1 fetches and checks the next batch during a step."
    ),
    "dataloader_multiprocessing_context": Restriction((None,), _NO_DATASET),
    "dataloader_in_order": Restriction((True,), _NO_DATASET),
    "train_sampling_strategy": Restriction(("random", "sequential"), _NO_DATASET),
    "length_column_name": Restriction(("length",), _NO_DATASET),
    "label_names": Restriction((None, ["labels"]), _NO_LOCAL_EVALUATION),
    "bf16_full_eval": Restriction((False,), _NO_LOCAL_EVALUATION),
    "fp16_full_eval": Restriction((False,), _NO_LOCAL_EVALUATION),
    "per_device_eval_batch_size": Restriction((8,), _NO_LOCAL_EVALUATION),
    "prediction_loss_only": Restriction((False,), _NO_LOCAL_EVALUATION),
    "eval_do_concat_batches": Restriction((True,), _NO_LOCAL_EVALUATION),
    "eval_use_gather_object": Restriction((False,), _NO_LOCAL_EVALUATION),
    "eval_accumulation_steps": Restriction((None,), _NO_LOCAL_EVALUATION),
    "include_for_metrics": Restriction(([],), _NO_LOCAL_EVALUATION),
    "batch_eval_metrics": Restriction((False,), _NO_LOCAL_EVALUATION),
}
"""Options that cannot act, or not with every value."""

ACCELERATOR_CONFIG = Restriction(
    ("use_configured_state",), f"the other keys of accelerator_config say how a dataset is dealt, and {_NO_DATASET}"
)
"""The keys of `accelerator_config` that act."""


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse options of `TrainingArguments` that would be wrong here, or would silently do nothing.

    Raises:
        `ValueError`: names option, value, reason and what to do.
    """
    for field in dataclasses.fields(TrainingArguments):
        value = getattr(args, field.name)
        value = value.value if isinstance(value, enum.Enum) else value
        if field.name in SUPPORTED or field.name in HARMLESS:
            continue
        if field.name == "accelerator_config":
            _check_accelerator_config(value)
        elif field.name in RESTRICTED:
            restriction = RESTRICTED[field.name]
            if value not in restriction.accepted:
                instead = restriction.instead or f"Leave --{field.name} at {restriction.accepted[0]}."
                raise ValueError(f"{field.name} is {value}: {restriction.why}. {instead}")
        elif value != _default(field):
            raise ValueError(
                f"{field.name} is {value}: this option came with transformers {transformers.__version__}, and nobody has "
                f"looked at what it does to this trainer. Leave --{field.name} out, or install an earlier transformers."
            )


def _check_accelerator_config(config: Any) -> None:
    """Refuse keys that say how a dataset is dealt; `config` is what `TrainingArguments` made of the option."""
    default = type(config)()
    changed = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(default, field.name)
        and field.name not in ACCELERATOR_CONFIG.accepted
    ]
    if changed:
        raise ValueError(
            f"accelerator_config sets {', '.join(changed)}: {ACCELERATOR_CONFIG.why}. Leave them out of --accelerator_config."
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
