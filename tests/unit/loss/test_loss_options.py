"""Options of the losses: what each value and combination is refused for, and what the options say of a loss."""

from __future__ import annotations

import math

import pytest

from trl_atropos.loss.loss_types import AGGREGATIONS, CLIPPED_LOSS_TYPES, LOSS_TYPES
from trl_atropos.loss.options import LossOptions


CORRECTION = {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_mask"}


def bounds(low: float | None, high: float | None) -> dict[str, float | None]:
    return {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"loss_type": "ppo"},
            ["loss_type", "'ppo'", "weighted_sft, grpo, dr_grpo, bnpo, dapo, cispo, sapo, luspo, vespo"],
        ),
        ({"importance_sampling_level": "group"}, ["importance_sampling_level", "'group'", "token, sequence"]),
        (
            {"vllm_importance_sampling_mode": "mask"},
            [
                "vllm_importance_sampling_mode",
                "'mask'",
                "token_truncate, token_mask, sequence_truncate, sequence_mask",
            ],
        ),
        *(({"epsilon": value}, [f"epsilon is {value}", "--epsilon"]) for value in (-0.1, math.nan, math.inf)),
        *(
            ({"epsilon_high": value}, [f"epsilon_high is {value}", "--epsilon_high"])
            for value in (-0.1, math.nan, math.inf)
        ),
        *(({"beta": value}, [f"beta is {value}", "--beta"]) for value in (-0.1, math.nan, math.inf)),
        *(
            ({name: value}, [f"{name} is {value}", "sapo_temperature_pos", "sapo_temperature_neg"])
            for name in ("sapo_temperature_pos", "sapo_temperature_neg")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        *(
            ({name: value}, [f"{name} is {value}", f"--{name}"])
            for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        *(
            ({"off_policy_mask_threshold": value}, [f"off_policy_mask_threshold is {value}", "0.5"])
            for value in (0.0, -1.0, math.nan, math.inf)
        ),
        ({"loss_type": "cispo", "epsilon_high": 0.0}, ["epsilon_high is 0.0", "--epsilon_high 5.0"]),
    ],
)
def test_value_out_of_range_is_refused(options, named):
    with pytest.raises(ValueError) as error:
        LossOptions(**options)
    assert [part for part in named if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "cispo"}, ["loss_type is cispo", "epsilon_high is None", "--epsilon_high 5.0"]),
        (
            {"loss_type": "weighted_sft", "importance_sampling_level": "sequence"},
            ["importance_sampling_level is sequence", "loss_type is weighted_sft", "--loss_type grpo"],
        ),
        *(
            (
                {"loss_type": loss_type, "epsilon_high": 5.0, "delta": 10.0},
                ["delta is 10.0", f"loss_type is {loss_type}", ", ".join(CLIPPED_LOSS_TYPES)],
            )
            for loss_type in ("weighted_sft", "cispo", "sapo", "vespo")
        ),
        (
            {"loss_type": "vespo", "importance_sampling_level": "sequence"},
            ["importance_sampling_level is sequence", "loss_type is vespo"],
        ),
        (
            {"loss_type": "vespo", "vllm_importance_sampling_correction": True},
            ["vllm_importance_sampling_mode is sequence_mask", "loss_type is vespo", "token_truncate or token_mask"],
        ),
        # The bound has to lie beyond 1 + epsilon_high, which is 1 + epsilon where it is not set.
        ({"delta": 1.2}, ["delta is 1.2", "1 + epsilon_high is 1.2", "--delta"]),
        ({"delta": 1.3, "epsilon_high": 0.4}, ["delta is 1.3", "1 + epsilon_high is 1.4"]),
        ({"delta": math.nan}, ["delta is nan"]),
        *(
            (
                {**CORRECTION, **bounds(low, high)},
                [
                    f"vllm_importance_sampling_clip_min is {low}",
                    f"vllm_importance_sampling_clip_max is {high}",
                    "0 <= min < max",
                ],
            )
            for low, high in ((-0.5, 3.0), (math.nan, None), (3.0, 3.0), (4.0, 3.0), (None, 0.0), (None, math.nan))
        ),
        *(
            (
                {**CORRECTION, "vllm_importance_sampling_mode": mode, **bounds(None, None)},
                [f"vllm_importance_sampling_mode is {mode}", "both clip bounds are unset", "clip_max 3.0"],
            )
            for mode in ("token_mask", "sequence_mask")
        ),
    ],
)
def test_contradiction_is_refused(options, named):
    with pytest.raises(ValueError) as error:
        LossOptions(**options)
    assert [part for part in named if part not in str(error.value)] == []


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": loss_type} for loss_type in LOSS_TYPES if loss_type != "cispo"),
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"epsilon": 0.0, "epsilon_high": 0.0},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        *({"loss_type": loss_type, "delta": 1.3} for loss_type in CLIPPED_LOSS_TYPES),
        {"loss_type": "weighted_sft", **CORRECTION},
        {**CORRECTION, **bounds(None, 2.0)},
        {**CORRECTION, **bounds(0.5, None)},
        {**CORRECTION, "vllm_importance_sampling_mode": "token_truncate", **bounds(None, None)},
        # Without the correction its bounds are not looked at.
        bounds(3.0, 1.0),
    ],
)
def test_what_fits_together_is_accepted(options):
    made = LossOptions(**options)
    assert {name: getattr(made, name) for name in options} == options


@pytest.mark.parametrize(
    ("epsilon_high", "upper"), [(None, 0.2), (0.28, 0.28), (0.0, 0.0)], ids=["unset", "set", "zero"]
)
def test_upper_epsilon(epsilon_high, upper):
    assert LossOptions(epsilon=0.2, epsilon_high=epsilon_high).upper_epsilon == upper


@pytest.mark.parametrize(
    ("options", "is_needed"),
    [
        ({"loss_type": "weighted_sft"}, False),
        ({"loss_type": "weighted_sft", "beta": 0.1}, True),
        ({"loss_type": "weighted_sft", "beta": 0.1, "use_bias_correction_kl": False}, False),
        ({"loss_type": "weighted_sft", "off_policy_mask_threshold": 0.1}, True),
        ({"loss_type": "weighted_sft", **CORRECTION}, True),
        *(
            ({"loss_type": loss_type, "epsilon_high": 0.3}, True)
            for loss_type in LOSS_TYPES
            if loss_type != "weighted_sft"
        ),
    ],
)
def test_needs_inference_logprobs(options, is_needed):
    assert LossOptions(**options).needs_inference_logprobs is is_needed


def test_every_loss_has_an_aggregation_that_token_weights_knows():
    assert set(AGGREGATIONS.values()) == {"token", "rollout", "constant", "rollout_sum"}
    assert set(CLIPPED_LOSS_TYPES) < set(LOSS_TYPES)
