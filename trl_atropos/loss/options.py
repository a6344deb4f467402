"""Options of `AtroposConfig` that say what the loss is. Names and meanings are those of TRL's `GRPOConfig` where it has them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

from ..options import check_declared
from .advantages import ADVANTAGE_BASELINES, ADVANTAGE_NORMALIZATIONS, SCALE_REWARDS, validate_clipping
from .loss_types import BUILT_IN_LOSSES, CLIPPED_LOSS_TYPES, LOSS_TYPES


IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
CORRECTION_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
INFERENCE_LOGPROBS = ("require", "use", "recompute")
REF_LOGPROBS = ("recompute", "require")


@dataclass
class LossOptions:
    """What a loss function reads: [`~loss.losses.policy_loss`] computes the loss of each token from them.

    Raises:
        ValueError: a value out of its range, or options that contradict each other; the message names them.
    """

    loss_type: str = field(
        default="dapo",
        metadata={
            "help": " ".join(f"`{name}`: {loss.meaning}" for name, loss in BUILT_IN_LOSSES.items())
            + " See docs/losses.md.",
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
    sapo_temperature_pos: float = field(
        default=1.0, metadata={"help": "For `sapo`: steepness of the gate of tokens with a positive advantage."}
    )
    sapo_temperature_neg: float = field(
        default=1.05, metadata={"help": "For `sapo`: steepness of the gate of the other tokens."}
    )
    vespo_k_pos: float = field(
        default=2.0,
        metadata={
            "help": "For `vespo`: how fast the weight of rollouts with a ratio below 1 fades, for positive advantages."
        },
    )
    vespo_lambda_pos: float = field(
        default=3.0,
        metadata={
            "help": "For `vespo`: how fast the weight of rollouts with a ratio above 1 fades, for positive advantages."
        },
    )
    vespo_k_neg: float = field(
        default=3.0, metadata={"help": "For `vespo`: as `vespo_k_pos`, for negative advantages."}
    )
    vespo_lambda_neg: float = field(
        default=2.0, metadata={"help": "For `vespo`: as `vespo_lambda_pos`, for negative advantages."}
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

    @property
    def upper_epsilon(self) -> float:
        """Distance of the upper bound of the clipped ratio from 1."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def needs_inference_logprobs(self) -> bool:
        """Whether the loss itself, not only a metric, depends on them."""
        return (
            self.loss_type != "weighted_sft"
            or self.vllm_importance_sampling_correction
            or self.off_policy_mask_threshold is not None
            or (self.beta != 0.0 and self.use_bias_correction_kl)
        )

    def __post_init__(self) -> None:
        check_declared(self, LossOptions)
        self._check_clipping()
        self._check_correction()
        self._check_vespo()
        if not 0 <= self.beta < math.inf:
            raise ValueError(
                f"beta is {self.beta}. A negative weight would push the policy away from the reference, and one that is "
                "not finite leaves no loss. Set `--beta` to 0 or more."
            )
        if self.loss_type == "weighted_sft" and self.importance_sampling_level == "sequence":
            raise ValueError(
                "importance_sampling_level is sequence and loss_type is weighted_sft. That loss has no importance ratio, "
                "so the option would do nothing. Leave out `--importance_sampling_level`, or set `--loss_type grpo`."
            )
        if not (0 < self.sapo_temperature_pos < math.inf and 0 < self.sapo_temperature_neg < math.inf):
            raise ValueError(
                f"sapo_temperature_pos is {self.sapo_temperature_pos} and sapo_temperature_neg is "
                f"{self.sapo_temperature_neg}. The loss divides by them. Set both above 0, and finite."
            )

    def _check_vespo(self) -> None:
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"{name} is {value}. The weight of a rollout would not fade on that side of 1. Set --{name} above 0, and finite."
                )
        if self.loss_type != "vespo":
            return
        if self.importance_sampling_level == "sequence":
            raise ValueError(
                "importance_sampling_level is sequence and loss_type is vespo. That loss takes the ratio of the whole rollout by "
                "itself, so the option would do nothing. Leave out `--importance_sampling_level`."
            )
        if self.vllm_importance_sampling_correction and self.vllm_importance_sampling_mode.startswith("sequence"):
            raise ValueError(
                f"vllm_importance_sampling_correction is on, vllm_importance_sampling_mode is {self.vllm_importance_sampling_mode} and "
                "loss_type is vespo. That loss multiplies the weights of a rollout's tokens. Set `--vllm_importance_sampling_mode` to "
                "token_truncate or token_mask."
            )

    def _check_clipping(self) -> None:
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} is {value}, it must be 0 or more, and finite. It is the distance of a bound from a ratio of "
                    f"1, so the interval would be empty. Set `--{name}`."
                )
        if self.loss_type == "cispo" and not self.epsilon_high:
            raise ValueError(
                f"loss_type is cispo and epsilon_high is {self.epsilon_high}. It caps the importance ratio itself there, not its "
                "distance from 1: the default of epsilon (0.2) would shrink every token's weight. Set "
                "`--epsilon_high 5.0`."
            )
        if self.delta is None:
            return
        if self.loss_type not in CLIPPED_LOSS_TYPES:
            raise ValueError(
                f"delta is {self.delta} and loss_type is {self.loss_type}. It is the second bound of the clipped ratio, "
                f"which that loss does not have. Leave out `--delta`, or set `--loss_type` to one of "
                f"{', '.join(CLIPPED_LOSS_TYPES)}."
            )
        if not self.delta > 1 + self.upper_epsilon:
            raise ValueError(
                f"delta is {self.delta} and 1 + epsilon_high is {1 + self.upper_epsilon:g}. It bounds the ratio of "
                "tokens with a negative advantage, beyond the interval. Set `--delta` above that."
            )

    def _check_correction(self) -> None:
        threshold = self.off_policy_mask_threshold
        if threshold is not None and not 0 < threshold < math.inf:
            raise ValueError(
                f"off_policy_mask_threshold is {threshold}. It is a KL divergence in nats: at 0 or below, on-policy rollouts "
                "would be masked too. Set `--off_policy_mask_threshold 0.5`, or leave it out."
            )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if not self.vllm_importance_sampling_correction:
            return
        if (low is not None and not low >= 0) or (high is not None and not high > (low or 0.0)):
            raise ValueError(
                f"vllm_importance_sampling_clip_min is {low} and vllm_importance_sampling_clip_max is {high}. They bound "
                "a ratio of probabilities: 0 <= min < max. Set `--vllm_importance_sampling_clip_max 3.0`."
            )
        if self.vllm_importance_sampling_mode.endswith("mask") and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_mode is {self.vllm_importance_sampling_mode} and both clip bounds are unset. "
                "Nothing would ever be masked. Set `--vllm_importance_sampling_clip_max 3.0`."
            )


@dataclass
class StepOptions(LossOptions):
    """What an optimizer step adds to the loss of its tokens: advantages, where logprobs come from, further terms.

    Raises:
        ValueError: as for [`LossOptions`].
    """

    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "The constant that `dr_grpo` divides by, in tokens. Defaults to `max_length`."},
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
    advantage_baseline: str = field(
        default="group",
        metadata={
            "help": "What a reward is compared with when the environment sends no advantages: `group`: the mean of its group "
            "(GRPO); `leave_one_out`: the mean of the others in its group (RLOO); `batch`: the mean of all rewards of the "
            "step (REINFORCE++), with which groups of one rollout are trained, too.",
            "choices": list(ADVANTAGE_BASELINES),
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
    ref_logprobs: str = field(
        default="recompute",
        metadata={
            "help": "Where the reference of the KL term comes from: `recompute`: from the model without its adapter, or from "
            "a frozen copy of the starting model if there is none. `require`: from the environment's `ref_logprobs`.",
            "choices": list(REF_LOGPROBS),
        },
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata={
            "help": "Do not train rollouts that end without an end-of-sequence token. The wire does not tell a stop string "
            "from a cut: leave it off for environments that stop at strings."
        },
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={
            "help": "Share of the trained tokens of a step, those with the highest entropy, whose advantages are kept; the others get "
            "0 (0.2 in Beyond the 80/20 Rule). Below 1, a step makes one more forward pass."
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

    @property
    def required_logprobs(self) -> tuple[str, ...]:
        """Which logprobs of the wire a rollout must have; one without them stops the run."""
        is_required = {
            "inference_logprobs": self.inference_logprobs == "require" and self.needs_inference_logprobs,
            "ref_logprobs": self.ref_logprobs == "require",
        }
        return tuple(name for name, required in is_required.items() if required)

    def __post_init__(self) -> None:
        # TRL takes booleans, too.
        self.scale_rewards = {"True": "group", "False": "none"}.get(str(self.scale_rewards), self.scale_rewards)
        super().__post_init__()
        check_declared(self, StepOptions)
        self._check_logprobs()
        if self.advantage_baseline == "batch" and self.scale_rewards == "group":
            raise ValueError(
                "advantage_baseline is batch and scale_rewards is group. A distance to the mean of the step is not measured in the "
                "spread of one group, which a group of one does not have. Set --scale_rewards batch or none."
            )
        if not 0 <= self.top_entropy_quantile <= 1:
            raise ValueError(
                f"top_entropy_quantile is {self.top_entropy_quantile}. It is the share of tokens that are trained. Set "
                "--top_entropy_quantile between 0 and 1."
            )
        if not math.isfinite(self.entropy_coef):
            raise ValueError(
                f"entropy_coef is {self.entropy_coef}. The loss would not be finite. Set --entropy_coef to a number."
            )
        if not 0 <= self.distillation_coef < math.inf:
            raise ValueError(
                f"distillation_coef is {self.distillation_coef}. A negative weight would push the policy away from the teacher. "
                "Set --distillation_coef to 0 or more."
            )
        if self.max_completion_length is not None and self.loss_type != "dr_grpo":
            raise ValueError(
                f"max_completion_length is {self.max_completion_length} and loss_type is {self.loss_type}. Only dr_grpo divides by "
                "it; environments decide how long completions get. Leave --max_completion_length out, or set --loss_type dr_grpo."
            )
        if self.max_completion_length is not None and not self.max_completion_length > 0:
            raise ValueError(
                f"max_completion_length is {self.max_completion_length}. The loss is divided by it. Set it above 0."
            )
        if self.advantage_clipping is not None:
            self._check_advantage_clipping(self.advantage_clipping)

    def _check_logprobs(self) -> None:
        if self.inference_logprobs == "recompute" and self.vllm_importance_sampling_correction:
            raise ValueError(
                "vllm_importance_sampling_correction is on and inference_logprobs is recompute. Then there is no difference to the "
                "policy that sampled left to correct. Set --inference_logprobs require, or leave the correction off."
            )
        if self.inference_logprobs == "recompute" and self.off_policy_mask_threshold is not None:
            raise ValueError(
                f"off_policy_mask_threshold is {self.off_policy_mask_threshold} and inference_logprobs is recompute. Then every "
                "rollout counts as on-policy, and nothing would be masked. Set --inference_logprobs require, or leave "
                "--off_policy_mask_threshold out."
            )
        if self.ref_logprobs == "require" and self.beta == 0.0:
            raise ValueError(
                "ref_logprobs is require and beta is 0. Without a KL term the reference would not be used. Set --beta, or leave "
                "--ref_logprobs out."
            )

    def _check_advantage_clipping(self, bounds: list[float]) -> None:
        validate_clipping(bounds)
        low, high = bounds
        if not low <= 0 <= high:
            warnings.warn(
                f"advantage_clipping is {bounds}, which leaves out 0: a rollout as good as its group's mean is pushed all the same. "
                "Bounds on both sides of 0 are meant, such as -5 5.",
                stacklevel=2,
            )
