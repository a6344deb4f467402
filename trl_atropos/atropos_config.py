"""Options of `AtroposTrainer`. Each is described once, in its field's `help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from .advantages import ADVANTAGE_NORMALIZATIONS, SCALE_REWARDS, validate_clipping
from .losses import LOSS_TYPES


INFERENCE_LOGPROBS = ("require", "use", "recompute")


@dataclass
class AtroposConfig(TrainingArguments):
    r"""
    Configuration class for the [`AtroposTrainer`].

    Only the options specific to this trainer are listed by `--help` under their own names; the others are those of
    [`~transformers.TrainingArguments`], of which these defaults differ: `logging_steps` 1, `learning_rate` 1e-6,
    `lr_scheduler_type` constant, `gradient_checkpointing` True, `bf16` True on a GPU, `max_steps` 1000,
    `ignore_data_skip` True, `logging_nan_inf_filter` False.

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
        metadata={"help": "Number of optimizer steps. Must be positive: the stream of rollouts has no end."},
    )
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "Always True: a live stream cannot be replayed by skipping batches."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Always False: a loss that is not finite stops the run instead."}
    )

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of "
            "the trainer is a string."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models and tokenizers that ship custom Python code."}
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Set every dropout probability to 0. With dropout the importance ratio of a fresh rollout is not 1."
        },
    )

    # Parameters that control the data
    atropos_api_url: str = field(
        default="http://localhost:8000", metadata={"help": "Root URL of the Atropos API (`run-api`)."}
    )
    atropos_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of rollouts of one optimizer step, registered with the API as `batch_size`. Defaults to "
            "per_device_train_batch_size x gradient_accumulation_steps x number of processes, and must equal it."
        },
    )
    max_length: int = field(
        default=2048,
        metadata={
            "help": "Longest rollout in tokens, prompt included. Registered as `max_token_len` = max_length + 1."
        },
    )
    api_timeout_s: float = field(
        default=60.0, metadata={"help": "Seconds to wait at start for the Atropos API to answer."}
    )
    batch_timeout_s: float = field(
        default=600.0,
        metadata={"help": "Seconds to wait for a batch before stopping with a diagnosis. Below `ddp_timeout`."},
    )
    refresh_interval: float = field(
        default=10.0,
        metadata={"help": "Cap in seconds of the poll interval while no batch is ready; polling starts at 0.1 s."},
    )
    max_dropped_fraction: float = field(
        default=0.0,
        metadata={
            "help": "Share of a batch's groups, in [0, 1), that may fail validation. Those groups are dropped, counted "
            "in `num_rollouts_dropped` and stay in the journal; a larger share stops the run. 0: any stops it."
        },
    )

    # Parameters that control the inference server
    vllm_server_base_url: str = field(
        default="http://localhost:8001", metadata={"help": "Root URL of the vLLM server that environments query."}
    )
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait at start for the vLLM server to be healthy."}
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "TCP port of the trainer's rendezvous with the workers, for NCCL."}
    )
    vllm_api_key: str | None = field(
        default=None, metadata={"help": "API key of the vLLM server. Defaults to VLLM_API_KEY of the environment."}
    )
    weight_sync_steps: int = field(default=1, metadata={"help": "Publish the policy every X optimizer steps."})
    weight_sync_timeout: float = field(
        default=300.0, metadata={"help": "Deadline in seconds of every single request of a publish."}
    )
    logprob_probe_tolerance: float = field(
        default=4.0,
        metadata={
            "help": "Largest accepted mean absolute difference between trainer and server logprobs of the probe after a "
            "publish, as a multiple of what rounding to the server's dtype explains. A larger one stops the run with "
            "the server paused."
        },
    )

    # Parameters that control the training
    loss_type: str = field(
        default="grpo",
        metadata={
            "help": "`grpo`: clipped importance ratio against `inference_logprobs`. `weighted_sft`: advantage-weighted "
            "cross entropy. Both are summed over tokens and divided by the trained tokens of the optimizer step.",
            "choices": list(LOSS_TYPES),
        },
    )
    epsilon: float = field(default=0.2, metadata={"help": "Lower bound of the clipped ratio: 1 - epsilon."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper bound of the clipped ratio: 1 + epsilon_high. Defaults to `epsilon`."}
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "How rewards become advantages when the environment sends none: `group` divides the difference to "
            "the group's mean by the group's standard deviation, `none` does not.",
            "choices": list(SCALE_REWARDS),
        },
    )
    advantage_normalization: str = field(
        default="none",
        metadata={
            "help": "`global`: zero mean and unit variance over all trained tokens of the optimizer step, all "
            "micro-batches and ranks. `batch`: over each micro-batch, so the result depends on "
            "per_device_train_batch_size. `none`: untouched.",
            "choices": list(ADVANTAGE_NORMALIZATIONS),
        },
    )
    advantage_clipping: list[float] | None = field(
        default=None,
        metadata={"help": "Two ascending numbers [min, max] to which advantages are clipped after normalization."},
    )
    inference_logprobs: str = field(
        default="require",
        metadata={
            "help": "What `loss_type=grpo` does with rollouts that carry no logprobs: `require` stops; `use` takes the "
            "wire's where present and treats the others as sampled by the current policy (ratio 1), counted in "
            "`inference_logprobs/missing_frac`; `recompute` treats all so.",
            "choices": list(INFERENCE_LOGPROBS),
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature of rollouts for which the wire names none. Applied to the trainer's logits "
            "if the server reports processed logprobs."
        },
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            import torch

            self.bf16 = not self.fp16 and torch.cuda.is_available() and not self.use_cpu
        super().__post_init__()
        self._check_choices()
        self._check_batch_size()
        if self.max_steps <= 0:
            raise ValueError(
                f"max_steps is {self.max_steps}. The stream of rollouts has no end, so epochs do not exist here. Set "
                "--max_steps to the number of optimizer steps."
            )
        self._check_unsupported()
        if self.batch_timeout_s >= self.ddp_timeout:
            raise ValueError(
                f"batch_timeout_s ({self.batch_timeout_s}) is not below ddp_timeout ({self.ddp_timeout}). The other "
                "ranks wait in a collective for the batch and would be killed first. Raise --ddp_timeout."
            )
        if self.advantage_clipping is not None:
            validate_clipping(self.advantage_clipping)

    def to_dict(self) -> dict[str, Any]:
        """Options as a dictionary, for logs and trackers: the API key is masked, as transformers does with tokens."""
        options = super().to_dict()
        if options.get("vllm_api_key"):
            options["vllm_api_key"] = "<VLLM_API_KEY>"
        return options

    def _check_choices(self) -> None:
        for name, choices in (
            ("loss_type", LOSS_TYPES),
            ("scale_rewards", SCALE_REWARDS),
            ("advantage_normalization", ADVANTAGE_NORMALIZATIONS),
            ("inference_logprobs", INFERENCE_LOGPROBS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Choose one of: {', '.join(choices)}.")
        for name in (
            "max_length",
            "weight_sync_steps",
            "temperature",
            "batch_timeout_s",
            "refresh_interval",
            "api_timeout_s",
            "vllm_server_timeout",
            "weight_sync_timeout",
            "logprob_probe_tolerance",
        ):
            # Written so that NaN is refused too.
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be positive. Set --{name}.")
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} is {value}, it must be 0 or more. Set --{name}.")
        if not 0.0 <= self.max_dropped_fraction < 1.0:
            raise ValueError(f"max_dropped_fraction is {self.max_dropped_fraction}, it must lie in [0, 1).")

    def _check_unsupported(self) -> None:
        """Refuse options of `TrainingArguments` that would be wrong here or would silently do nothing."""
        for name, accepted, reason in (
            ("ignore_data_skip", True, "a live stream cannot be replayed by skipping batches"),
            ("logging_nan_inf_filter", False, "it would show a finite loss where there is none"),
            ("auto_find_batch_size", False, "a batch that was fetched cannot be fetched again in another size"),
            ("use_liger_kernel", False, "its fused loss leaves no logits at trained positions"),
            ("label_smoothing_factor", 0.0, "the loss is not the cross entropy of transformers"),
        ):
            if getattr(self, name) != accepted:
                raise ValueError(f"{name} is {getattr(self, name)}: {reason}. Leave --{name} at {accepted}.")

    def _check_batch_size(self) -> None:
        step_size = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        if self.atropos_batch_size is None:
            self.atropos_batch_size = step_size
        elif self.atropos_batch_size != step_size:
            raise ValueError(
                f"atropos_batch_size ({self.atropos_batch_size}) is not per_device_train_batch_size "
                f"({self.per_device_train_batch_size}) x gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}) x processes ({self.world_size}) = {step_size}. One optimizer step "
                "trains one batch of the API. Leave --atropos_batch_size out, or make them equal."
            )
