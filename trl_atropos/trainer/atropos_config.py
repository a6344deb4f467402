"""Options of `AtroposTrainer`. Each is described once, in its field's `help`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments

from ..data.options import DataConfig, check_data
from ..loss.advantages import ADVANTAGE_NORMALIZATIONS, SCALE_REWARDS, validate_clipping
from ..loss.options import CORRECTION_MODES, IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES, LossOptions
from ..policy.layouts import LAYOUTS
from ..report.options import WatchConfig, check_watching, choose_tracker
from ..weight_sync.options import PublishConfig, check_publish
from .config_checks import (
    check_batch_size,
    check_choices,
    check_loss,
    check_offloading,
    check_positive,
    check_unsupported,
)


INFERENCE_LOGPROBS = ("require", "use", "recompute")
REF_LOGPROBS = ("recompute", "require")
SEQUENCE_LAYOUTS = ("auto", *LAYOUTS)


@dataclass
class AtroposConfig(DataConfig, PublishConfig, WatchConfig, TrainingArguments):
    r"""
    Configuration class for the [`AtroposTrainer`].

    Only the options specific to this trainer are listed by `--help` under their own names; the others are those of
    [`~transformers.TrainingArguments`], of which these defaults differ: `logging_steps` 1, `learning_rate` 1e-6,
    `lr_scheduler_type` constant, `gradient_checkpointing` True, `bf16` True on a GPU, `max_steps` 1000,
    `num_train_epochs` 1, `ignore_data_skip` True, `logging_nan_inf_filter` False, `report_to` auto.

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
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Passes over `data_path`. Not used with a live API."}
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

    push_merged: bool = field(
        default=False,
        metadata={
            "help": "With `push_to_hub` and LoRA: at the end upload the policy merged into one model as well, to "
            "`<hub_model_id>-merged`."
        },
    )

    # Parameters that control the training
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "`dapo`, `grpo`, `dr_grpo`, `bnpo`, `luspo`: clipped importance ratio, averaged over the tokens of the "
            "step (`dapo`, and `bnpo`, which is the same at a split-invariant denominator), over rollouts of means over "
            "tokens (`grpo`), over rollouts of sums (`luspo`), or divided by a constant (`dr_grpo`). `cispo`: capped "
            "ratio as a weight. `sapo`: smooth gate instead of clipping. `weighted_sft`: advantage-weighted cross entropy. "
            "See docs/losses.md.",
            "choices": list(LOSS_TYPES),
        },
    )
    epsilon: float = field(default=0.2, metadata={"help": "Lower bound of the clipped ratio: 1 - epsilon."})
    epsilon_high: float | None = field(
        default=None,
        metadata={
            "help": "Upper bound of the clipped ratio: 1 + epsilon_high. Defaults to `epsilon`. For `cispo` the cap of the "
            "ratio itself, which must be set (5.0 in the ScaleRL paper)."
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "Caps the ratio of tokens with a negative advantage, where the clipped loss has no upper bound "
            "(INTELLECT-2). Above 1 + epsilon_high."
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "`token`: one ratio per token. `sequence`: the geometric mean of the ratios of a rollout, for all of its "
            "tokens (GSPO).",
            "choices": list(IMPORTANCE_SAMPLING_LEVELS),
        },
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "The constant that `dr_grpo` divides by, in tokens. Defaults to `max_length`."},
    )
    sapo_temperature_pos: float = field(
        default=1.0, metadata={"help": "For `sapo`: steepness of the gate of tokens with a positive advantage."}
    )
    sapo_temperature_neg: float = field(
        default=1.05, metadata={"help": "For `sapo`: steepness of the gate of the other tokens."}
    )
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL term to the reference policy. 0: there is no reference."}
    )
    use_bias_correction_kl: bool = field(
        default=True,
        metadata={
            "help": "Multiply the KL term of a token by its importance ratio, with gradient (DeepSeek-V3.2): without it the "
            "gradient is not that of the KL divergence from the policy to the reference."
        },
    )
    ref_logprobs: str = field(
        default="recompute",
        metadata={
            "help": "Where the reference of the KL term comes from: `recompute`: from the model without its adapter, or from "
            "a frozen copy of the starting model if there is none. `require`: from the environment's `ref_logprobs`.",
            "choices": list(REF_LOGPROBS),
        },
    )
    entropy_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the mean entropy of trained tokens, which is subtracted from the loss."},
    )
    distillation_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross entropy to a teacher's likeliest tokens (the wire's `distill_token_ids` and "
            "`distill_logprobs`), a mean over the trained tokens that have them."
        },
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "False: the clipped ratio is taken to the policy that sampled. True: it is taken to the policy at the "
            "start of the step, and the difference to the policy that sampled is corrected by a truncated or masked weight "
            "(TRL's GRPOTrainer)."
        },
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={
            "help": "Weight of the correction: ratio per token or product over the rollout (`sequence`), clipped to the "
            "bounds (`truncate`) or 0 outside of them (`mask`).",
            "choices": list(CORRECTION_MODES),
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Upper bound of the weight of the correction."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Lower bound of the weight of the correction."}
    )
    off_policy_mask_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Tokens with a negative advantage are not trained in rollouts whose mean KL, in nats per token, between "
            "the policy that sampled and the current one exceeds this (DeepSeek-V3.2)."
        },
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata={
            "help": "Do not train rollouts that end without an end-of-sequence token. The wire does not tell a stop string "
            "from a cut: leave it off for environments that stop at strings."
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "How rewards become advantages when the environment sends none: `group` divides the difference to "
            "the group's mean by the group's standard deviation, `batch` by that of all rewards of the step, `none` does "
            "not divide.",
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
            "help": "What the losses with an importance ratio do with the wire's logprobs: `require` stops at a rollout "
            "without them; `use` takes them where present and treats the other rollouts as sampled by the current policy "
            "(ratio 1), counted in `inference_logprobs/missing_frac`; `recompute` treats all so.",
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

    # Parameters that control the forward pass
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Form micro-batches by a token budget instead of a number of rollouts: `per_device_train_batch_size` "
            "rollouts per process make one optimizer step, in as many forward passes as this many tokens each allow."
        },
    )
    sequence_layout: str = field(
        default="auto",
        metadata={
            "help": "`tree`: prefixes that rollouts of a group share are computed once. `packed`: no padding. `padded`: one "
            "row per rollout. `auto`: the first of these that gives the logprobs of each rollout run alone on this model, "
            "tried at start.",
            "choices": list(SEQUENCE_LAYOUTS),
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in host memory until the backward pass. Needs a GPU."}
    )

    @property
    def loss_options(self) -> LossOptions:
        """The options of the loss, checked."""
        return LossOptions(**{option.name: getattr(self, option.name) for option in fields(LossOptions)})

    @property
    def needs_inference_logprobs(self) -> bool:
        """Whether a rollout without logprobs stops the run."""
        return self.inference_logprobs == "require" and self.loss_options.needs_inference_logprobs

    def __post_init__(self) -> None:
        if self.bf16 is None:
            import torch

            self.bf16 = not self.fp16 and torch.cuda.is_available() and not self.use_cpu
        if choose_tracker(self):
            # transformers would upload it when the model is pushed.
            self.trackio_static_space_id = False
        super().__post_init__()
        check_watching(self)
        if self.push_merged and not self.push_to_hub:
            raise ValueError(
                "push_merged is set and push_to_hub is not. Nothing is uploaded so. Set --push_to_hub, too."
            )
        # TRL takes booleans, too.
        self.scale_rewards = {"True": "group", "False": "none"}.get(str(self.scale_rewards), self.scale_rewards)
        self._check_choices()
        check_publish(self)
        check_data(self)
        check_loss(self)
        check_batch_size(self)
        if self.max_steps <= 0:
            raise ValueError(
                f"max_steps is {self.max_steps}. The stream of rollouts has no end, so epochs do not exist here. Set "
                "--max_steps to the number of optimizer steps."
            )
        check_unsupported(self)
        check_offloading(self)
        if self.advantage_clipping is not None:
            validate_clipping(self.advantage_clipping)
            low, high = self.advantage_clipping
            if not low <= 0 <= high:
                warnings.warn(
                    f"advantage_clipping is {self.advantage_clipping}, which leaves out 0: a rollout as good as its group's "
                    "mean is pushed all the same. Bounds on both sides of 0 are meant, such as -5 5.",
                    stacklevel=2,
                )

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

    def _check_choices(self) -> None:
        check_choices(
            self,
            {
                "scale_rewards": SCALE_REWARDS,
                "advantage_normalization": ADVANTAGE_NORMALIZATIONS,
                "inference_logprobs": INFERENCE_LOGPROBS,
                "ref_logprobs": REF_LOGPROBS,
                "sequence_layout": SEQUENCE_LAYOUTS,
            },
        )
        check_positive(self, ("max_length", "temperature"))
