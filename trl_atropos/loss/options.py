"""Which loss, with which bounds: the options of `losses.py`, checked for contradictions when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass


AGGREGATIONS = {
    "weighted_sft": "token",
    "grpo": "rollout",
    "dr_grpo": "constant",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "sapo": "rollout",
    "luspo": "rollout_sum",
}
"""loss_type -> what [`token_weights`] divides by."""

LOSS_TYPES = tuple(AGGREGATIONS)
CLIPPED_LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
CORRECTION_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class LossOptions:
    """The options of the losses; names and meanings are those of TRL's `GRPOConfig`. See `AtroposConfig`.

    Raises:
        ValueError: a value out of its range, or options that contradict each other; the message names them.
    """

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vllm_importance_sampling_correction: bool = False
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    off_policy_mask_threshold: float | None = None

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
        _check_choice("loss_type", self.loss_type, LOSS_TYPES)
        _check_choice("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        _check_choice("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, CORRECTION_MODES)
        self._check_clipping()
        self._check_correction()
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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"Invalid value for {name}: {value!r}. It is not one of the choices. Set `--{name}` to one of "
            f"{', '.join(choices)}."
        )
