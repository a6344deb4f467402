"""The losses of trained tokens: closed forms, gradients and metrics."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import at_ratios, loss_inputs, options_of

from trl_atropos.loss.loss_types import CLIPPED_LOSS_TYPES, LOSS_TYPES
from trl_atropos.loss.losses import LossInputs, LossOutputs, policy_loss
from trl_atropos.loss.metrics import MetricAccumulator
from trl_atropos.loss.options import LossOptions
from trl_atropos.policy.logprobs import token_logprobs_and_entropy
from trl_atropos.report.metric_help import METRICS


# It is refused: the loss takes the ratio of the whole rollout by itself.
VESPO_SEQUENCE = ("vespo", "sequence")
RATIO_LOSS_TYPES = [loss_type for loss_type in LOSS_TYPES if loss_type != "weighted_sft"]


def losses_and_gradient(inputs: LossInputs, options: LossOptions) -> tuple[list[float], list[float]]:
    """The token losses, and the gradient of their sum with respect to the logprobs."""
    token_losses = policy_loss(inputs, options).token_losses
    (gradient,) = torch.autograd.grad(token_losses.sum(), inputs.trainer_logprobs)
    return token_losses.tolist(), gradient.tolist()


def reported(outputs: LossOutputs) -> dict[str, float]:
    accumulator = MetricAccumulator()
    accumulator.update(outputs.metrics)
    return accumulator.reduce()


class TestSurrogate:
    # epsilon 0.2: clip(r) = 0.8, 1, 1.2 for r = 0.5, 1, 1.5.
    # loss = -min(r A, clip(r) A); its gradient with respect to the logprob is -r A where r A is the minimum, else 0.
    #   A = +1: min(0.5, 0.8) = 0.5    min(1, 1) = 1      min(1.5, 1.2) = 1.2 (clipped)
    #   A = -1: min(-0.5, -0.8) = -0.8 (clipped)   min(-1, -1) = -1   min(-1.5, -1.2) = -1.5
    @pytest.mark.parametrize("loss_type", CLIPPED_LOSS_TYPES)
    @pytest.mark.parametrize(
        ("advantage", "ratio", "loss", "gradient"),
        [
            (1.0, 0.5, -0.5, -0.5),
            (1.0, 1.0, -1.0, -1.0),
            (1.0, 1.5, -1.2, 0.0),
            (-1.0, 0.5, 0.8, 0.0),
            (-1.0, 1.0, 1.0, 1.0),
            (-1.0, 1.5, 1.5, 1.5),
        ],
    )
    def test_table_of_signs(self, loss_type, advantage, ratio, loss, gradient):
        losses, gradients = losses_and_gradient(at_ratios([ratio], [advantage]), options_of(loss_type, epsilon=0.2))
        assert losses == pytest.approx([loss])
        assert gradients == pytest.approx([gradient])

    def test_inverted_clip_of_atropos_example_trainer(self):
        # It takes the maximum for A < 0: max(-1.5, -1.2) has no gradient at ratio 1.5, where a bad token became more
        # likely and must be pushed down; max(-0.5, -0.8) keeps pushing at ratio 0.5, where it is down already.
        ratios, advantages = [1.5, 0.5], torch.tensor([-1.0, -1.0], dtype=torch.float64)
        inputs = at_ratios(ratios, advantages)
        ratio = (inputs.trainer_logprobs - inputs.inference_logprobs).exp()
        candidates = ratio * advantages, ratio.clamp(0.8, 1.2) * advantages
        inverted = -torch.where(advantages >= 0, torch.minimum(*candidates), torch.maximum(*candidates)).sum()
        assert torch.autograd.grad(inverted, inputs.trainer_logprobs)[0].tolist() == pytest.approx([0.0, 0.5])

        _, gradient = losses_and_gradient(at_ratios(ratios, advantages), LossOptions(loss_type="grpo"))
        assert gradient == pytest.approx([1.5, 0.0])

    def test_epsilon_high_moves_the_upper_bound_only(self):
        # A = 1: min(1.5, 1.28) = 1.28. A = -1: min(-0.5, -0.8) = -0.8 as without it.
        options = LossOptions(loss_type="grpo", epsilon=0.2, epsilon_high=0.28)
        assert losses_and_gradient(at_ratios([1.5, 0.5], [1.0, -1.0]), options)[0] == pytest.approx([-1.28, 0.8])

    def test_delta_bounds_the_ratio_of_negative_advantages(self):
        # r = 3, delta 2. A = -1: min(-2, -1.2) = -2, no gradient beyond delta. A = 1: min(2, 1.2) = 1.2 as without.
        # r = 1.5, A = -1: min(-1.5, -1.2) = -1.5, below delta.
        losses, gradient = losses_and_gradient(
            at_ratios([3.0, 3.0, 1.5], [-1.0, 1.0, -1.0]), LossOptions(loss_type="grpo", delta=2.0)
        )
        assert losses == pytest.approx([2.0, -1.2, 1.5])
        assert gradient == pytest.approx([0.0, 0.0, 1.5])

    @pytest.mark.parametrize("advantage", [1.0, -2.0])
    def test_cispo_caps_the_weight_and_keeps_the_gradient(self, advantage):
        # loss = -sg(min(r, 5)) A logprob, so its gradient is -min(r, 5) A, also beyond the cap and below 1 - epsilon.
        ratios, weights = [0.5, 1.0, 8.0], [0.5, 1.0, 5.0]
        inputs = at_ratios(ratios, [advantage] * 3)
        losses, gradient = losses_and_gradient(inputs, LossOptions(loss_type="cispo", epsilon_high=5.0))
        logprobs = inputs.trainer_logprobs.tolist()
        assert losses == pytest.approx([-w * advantage * x for w, x in zip(weights, logprobs, strict=True)])
        assert gradient == pytest.approx([-w * advantage for w in weights])

    def test_sapo_gates_with_a_temperature_for_each_sign(self):
        # gate = 4 / t * sigmoid(t (r - 1)); d gate / d logprob = 4 sigmoid (1 - sigmoid) r.
        # r = 1: sigmoid 1/2, gate 2 / t, slope 1. r = 1 + ln 3 / t: sigmoid 3/4, gate 3 / t, slope 3/4 r.
        far_pos, far_neg = 1 + math.log(3) / 1.0, 1 + math.log(3) / 2.0
        options = LossOptions(loss_type="sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=2.0)
        losses, gradient = losses_and_gradient(
            at_ratios([1.0, far_pos, 1.0, far_neg], [1.0, 1.0, -1.0, -1.0]), options
        )
        assert losses == pytest.approx([-2.0, -3.0, 1.0, 1.5])
        assert gradient == pytest.approx([-1.0, -0.75 * far_pos, 1.0, 0.75 * far_neg])

    def test_vespo_weighs_a_rollout_by_the_product_of_its_ratios(self):
        # Rollout 0: w = 2 * 0.25 = 0.5, A > 0: e^(1 - 0.5) 0.5^2. Rollout 1: w = 3, A < 0: e^(2 (1 - 3)) 3^3.
        weights = [math.exp(0.5) * 0.25] * 2 + [math.exp(-4.0) * 27]
        options = LossOptions(loss_type="vespo", vespo_lambda_pos=1.0)
        inputs = at_ratios([2.0, 0.25, 3.0], [1.0, 1.0, -1.0], lengths=[2, 1])
        losses, gradient = losses_and_gradient(inputs, options)
        logprobs, signs = inputs.trainer_logprobs.tolist(), [1.0, 1.0, -1.0]
        assert losses == pytest.approx([-w * a * x for w, a, x in zip(weights, signs, logprobs, strict=True)])
        assert gradient == pytest.approx([-w * a for w, a in zip(weights, signs, strict=True)])

    def test_weighted_sft_ignores_the_policy_that_sampled(self):
        losses, gradient = losses_and_gradient(
            loss_inputs([-0.5, -3.0], [2.0, -1.0], [-9.0, -0.1]), LossOptions(loss_type="weighted_sft")
        )
        assert losses == [1.0, -3.0]
        assert gradient == [-2.0, 1.0]

    def test_sequence_ratio_is_the_geometric_mean_of_a_rollout(self):
        # Rollout 0: sqrt(1.21 * 1) = 1.1 for both tokens. The logprob of each moves log s by 1/2 and both losses with it:
        # 2 * -1.1 / 2. Rollout 1 has no token. Rollout 2: 1.5, clipped.
        losses, gradient = losses_and_gradient(
            at_ratios([1.21, 1.0, 1.5], [1.0, 1.0, 1.0], lengths=[2, 0, 1]),
            LossOptions(loss_type="grpo", importance_sampling_level="sequence"),
        )
        assert losses == pytest.approx([-1.1, -1.1, -1.2])
        assert gradient == pytest.approx([-1.1, -1.1, 0.0])

    @pytest.mark.parametrize(
        ("loss_type", "level"),
        [
            (loss, level)
            for loss in RATIO_LOSS_TYPES
            for level in ("token", "sequence")
            if (loss, level) != VESPO_SEQUENCE
        ],
    )
    def test_unknown_inference_logprob_has_the_gradient_of_on_policy(self, loss_type, level):
        options = options_of(loss_type, importance_sampling_level=level)
        trainer_logprobs, advantages = [-0.5, -3.0, -1.0], [2.0, -1.0, 0.0]
        results = [
            losses_and_gradient(loss_inputs(trainer_logprobs, advantages, inference_logprobs), options)
            for inference_logprobs in (trainer_logprobs, [math.nan] * 3, [-0.5, math.nan, -1.0], None)
        ]
        assert results == [results[0]] * 4
        if level == "token":
            assert results[0][1] == pytest.approx([-2.0, 1.0, 0.0])

    @pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
    def test_absurd_inference_logprob_keeps_loss_and_gradient_finite(self, advantage):
        # exp(9998) is inf, and inf * 0 is NaN; the log ratio is capped at 20 and has no gradient there.
        inputs = loss_inputs([-1.0], [advantage], [-9999.0])
        losses, gradient = losses_and_gradient(inputs, LossOptions(loss_type="grpo"))
        assert math.isfinite(losses[0])
        assert gradient == [0.0]
        metrics = reported(policy_loss(inputs, LossOptions(loss_type="grpo")))
        assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(math.exp(20))


class TestOffPolicyMask:
    def test_drops_negative_advantages_of_rollouts_beyond_the_threshold(self):
        # Mean of inference - trainer: rollouts 0 and 1 (1 + 0) / 2 = 0.5, rollout 2 (0.25 + 0.25) / 2 = 0.25.
        inputs = loss_inputs(
            [-3.0, -2.0, -3.0, -2.0, -2.25, -2.25],
            [-1.0, -1.0, 1.0, 1.0, -1.0, -1.0],
            [-2.0] * 6,
            lengths=[2, 2, 2],
        )
        options = LossOptions(loss_type="weighted_sft", off_policy_mask_threshold=0.25)
        losses, gradient = losses_and_gradient(inputs, options)
        # -A logprob
        assert losses == [0.0, 0.0, 3.0, 2.0, -2.25, -2.25]
        assert gradient == [0.0, 0.0, -1.0, -1.0, 1.0, 1.0]
        assert reported(policy_loss(inputs, options))["off_policy_mask/masked_frac"] == pytest.approx(2 / 6)

    def test_mean_counts_a_token_of_unknown_logprob_as_on_policy(self):
        # (1 + 0) / 2 = 0.5, where the known token alone has 1.
        inputs = loss_inputs([-3.0, -2.0], [-1.0, -1.0], [-2.0, math.nan])
        options = LossOptions(loss_type="weighted_sft", off_policy_mask_threshold=0.5)
        assert losses_and_gradient(inputs, options)[1] == [1.0, 1.0]


class TestImportanceSamplingCorrection:
    # Rollouts of ratios (2, 2), (0.25) and (1.5): as sequences 4, 0.25 and 1.5. Bounds 0.5 and 3.
    @pytest.mark.parametrize(
        ("mode", "weights"),
        [
            ("token_truncate", [2.0, 2.0, 0.5, 1.5]),
            ("token_mask", [2.0, 2.0, 0.0, 1.5]),
            ("sequence_truncate", [3.0, 3.0, 0.5, 1.5]),
            ("sequence_mask", [0.0, 0.0, 0.0, 1.5]),
        ],
    )
    @pytest.mark.parametrize("loss_type", ["dapo", "luspo", "weighted_sft"])
    def test_weights_of_each_mode(self, mode, weights, loss_type):
        advantages = [1.0, 1.0, -2.0, 3.0]
        inputs = at_ratios([2.0, 2.0, 0.25, 1.5], advantages, lengths=[2, 1, 1])
        options = LossOptions(
            loss_type=loss_type,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=0.5,
            vllm_importance_sampling_clip_max=3.0,
        )
        # The surrogate's own ratio is 1, so nothing is clipped, and its gradient is -A.
        _, gradient = losses_and_gradient(inputs, options)
        assert gradient == pytest.approx([-w * a for w, a in zip(weights, advantages, strict=True)])
        metrics = reported(policy_loss(inputs, options))
        assert metrics["sampling/correction_weight/mean"] == pytest.approx(sum(weights) / 4)
        assert metrics["sampling/correction_weight/zero_frac"] == weights.count(0.0) / 4
        assert metrics.get("clip_ratio/region_mean", 0.0) == 0.0

    @pytest.mark.parametrize(
        ("mode", "low", "high", "weights"),
        [
            ("token_truncate", None, 3.0, [3.0, 0.25]),
            ("token_truncate", 0.5, None, [4.0, 0.5]),
            ("token_truncate", None, None, [4.0, 0.25]),
            ("token_mask", None, 3.0, [0.0, 0.25]),
            ("token_mask", 0.5, None, [4.0, 0.0]),
        ],
    )
    def test_one_bound_or_none(self, mode, low, high, weights):
        options = LossOptions(
            loss_type="dapo",
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low,
            vllm_importance_sampling_clip_max=high,
        )
        losses, _ = losses_and_gradient(at_ratios([4.0, 0.25], [-1.0, -1.0]), options)
        assert losses == pytest.approx(weights)

    def test_unknown_logprob_weighs_1_and_adds_nothing_to_its_rollout(self):
        inputs = loss_inputs([-1.0, -1.0], [-1.0, -1.0], [-1.0 - math.log(2), math.nan])
        for mode, weights in (("token_truncate", [2.0, 1.0]), ("sequence_truncate", [2.0, 2.0])):
            options = LossOptions(vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=mode)
            assert losses_and_gradient(inputs, options)[0] == pytest.approx(weights)


class TestKlToReference:
    def test_k3(self):
        # d = ref - trainer = ln 2, 0, -ln 2: e^d - d - 1 = 1 - ln 2, 0, ln 2 - 1/2; its gradient is 1 - e^d = -1, 0, 1/2.
        ref_logprobs = [-2.0 + math.log(2), -2.0, -2.0 - math.log(2)]
        inputs = loss_inputs([-2.0] * 3, [0.0] * 3, ref_logprobs=ref_logprobs)
        options = LossOptions(loss_type="grpo", beta=0.5, use_bias_correction_kl=False)
        losses, gradient = losses_and_gradient(inputs, options)
        kl = [1 - math.log(2), 0.0, math.log(2) - 0.5]
        assert losses == pytest.approx([0.5 * value for value in kl])
        assert gradient == pytest.approx([-0.5, 0.0, 0.25])
        assert reported(policy_loss(inputs, options))["kl"] == pytest.approx(0.5 / 3)

    def test_the_bias_correction_makes_its_gradient_that_of_the_reverse_kl(self):
        # On policy r = 1 and d r = d logprob, so the gradient of r (e^d - d - 1) is (e^d - d - 1) + (1 - e^d) = -d.
        ref_logprobs = [-2.0 + math.log(2), -2.0, -2.0 - math.log(2)]
        inputs = loss_inputs([-2.0] * 3, [0.0] * 3, ref_logprobs=ref_logprobs)
        losses, gradient = losses_and_gradient(inputs, LossOptions(loss_type="grpo", beta=0.5))
        assert losses == pytest.approx([0.5 * (1 - math.log(2)), 0.0, 0.5 * (math.log(2) - 0.5)])
        assert gradient == pytest.approx([-0.5 * math.log(2), 0.0, 0.5 * math.log(2)])

    def test_masks_and_weights_leave_it_alone(self):
        # Both the off-policy mask (KL 1) and the correction (ratio e^-1 < 0.5) take this token's surrogate away.
        inputs = loss_inputs([-3.0], [-1.0], [-2.0], ref_logprobs=[-3.0 + math.log(2)])
        options = LossOptions(
            beta=0.5,
            use_bias_correction_kl=False,
            off_policy_mask_threshold=0.5,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode="token_mask",
            vllm_importance_sampling_clip_min=0.5,
        )
        losses, gradient = losses_and_gradient(inputs, options)
        assert losses == pytest.approx([0.5 * (1 - math.log(2))])
        assert gradient == pytest.approx([-0.5])

    def test_missing_ref_logprobs_are_refused(self):
        with pytest.raises(ValueError, match=r"beta is not 0.*no ref_logprobs.*`--beta 0`"):
            policy_loss(loss_inputs([-1.0], [1.0]), LossOptions(beta=0.1))


class TestMetrics:
    def test_clip_and_sampling_metrics(self):
        # ratio        1.5   1.5   0.5 | 0.5   1
        # advantage     1    -1     1  | -1    1
        # clipped      high   -     -  | low   -
        inputs = at_ratios(
            [1.5, 1.5, 0.5, 0.5, 1.0],
            [1.0, -1.0, 1.0, -1.0, 1.0],
            lengths=[3, 2],
            entropy=[1.0, 2.0, 3.0, 4.0, 5.0],
        )
        assert reported(policy_loss(inputs, LossOptions(loss_type="grpo"))) == pytest.approx(
            {
                "entropy": 3.0,
                "clip_ratio/low_mean": 1 / 5,
                "clip_ratio/low_min": 0.0,
                "clip_ratio/high_mean": 1 / 5,
                "clip_ratio/high_max": 1 / 3,
                "clip_ratio/region_mean": 2 / 5,
                "sampling/sampling_logp_difference/mean": (2 * math.log(1.5) + 2 * math.log(2)) / 5,
                "sampling/sampling_logp_difference/max": math.log(2),
                "sampling/importance_sampling_ratio/mean": 1.0,
                "sampling/importance_sampling_ratio/min": 0.5,
                "sampling/importance_sampling_ratio/max": 1.5,
            }
        )

    def test_smallest_and_largest_clip_ratio_are_means_of_rollouts(self):
        # Clipped below: 2 of 2 and 1 of 2 tokens; above: 1 of 3.
        inputs = at_ratios([0.5, 0.5, 0.5, 1.0, 1.5, 1.0, 1.0], [-1.0] * 4 + [1.0] * 3, lengths=[2, 2, 3])
        metrics = reported(policy_loss(inputs, LossOptions(loss_type="grpo")))
        assert metrics["clip_ratio/low_min"] == 0.0
        assert metrics["clip_ratio/high_max"] == pytest.approx(1 / 3)
        inputs = at_ratios([0.5, 0.5, 0.5, 1.0], [-1.0] * 4, lengths=[2, 2])
        assert reported(policy_loss(inputs, LossOptions(loss_type="grpo")))["clip_ratio/low_min"] == 1 / 2

    def test_smallest_clip_ratio_is_that_of_a_rollout_with_trained_tokens(self):
        # Every trained token is clipped. TRL leaves the empty rollout (0 / 0) out, too.
        inputs = at_ratios([0.5, 0.5], [-1.0, -1.0], lengths=[1, 0, 1])
        assert reported(policy_loss(inputs, LossOptions(loss_type="grpo")))["clip_ratio/low_min"] == 1.0

    def test_sampling_metrics_leave_unknown_logprobs_out(self):
        inputs = loss_inputs([-1.0, -1.0], [1.0, 1.0], [-1.0 - math.log(1.5), math.nan])
        metrics = reported(policy_loss(inputs, LossOptions(loss_type="grpo")))
        assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(1.5))
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.5)
        assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(1.5)

    @pytest.mark.parametrize("inference_logprobs", [None, [math.nan]])
    def test_no_known_logprob_reports_no_sampling_metric(self, inference_logprobs):
        metrics = reported(policy_loss(loss_inputs([-1.0], [1.0], inference_logprobs), LossOptions()))
        assert not [name for name in metrics if name.startswith("sampling/")]

    def test_cispo_counts_capped_positive_advantages(self):
        inputs = at_ratios([8.0, 8.0, 2.0, 0.5], [1.0, -1.0, 1.0, 1.0])
        outputs = policy_loss(inputs, LossOptions(loss_type="cispo", epsilon_high=5.0))
        assert reported(outputs)["cispo_clip_ratio"] == 0.25

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_every_metric_is_documented(self, loss_type):
        options = options_of(
            loss_type,
            beta=0.1,
            off_policy_mask_threshold=0.5,
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode="token_mask",
        )
        assert policy_loss(at_ratios([1.5], [1.0], ref_logprobs=[-1.0]), options).metrics.keys() <= METRICS.keys()

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_no_trained_token_gives_no_metric_and_a_graph(self, loss_type):
        logits = torch.randn(0, 5, requires_grad=True)
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.zeros(0, dtype=torch.int64))
        rollout_index = torch.zeros(0, dtype=torch.int64)
        inputs = LossInputs(logprobs, torch.zeros(0), entropy, rollout_index, 0, torch.zeros(0), torch.zeros(0))
        outputs = policy_loss(inputs, options_of(loss_type, beta=0.1))
        outputs.token_losses.sum().backward()
        assert logits.grad.shape == (0, 5)
        assert reported(outputs) == {}


@pytest.mark.parametrize("field", ["advantages", "inference_logprobs", "entropy", "rollout_index", "ref_logprobs"])
def test_inputs_of_other_shapes_are_refused(field):
    names = ("trainer_logprobs", "advantages", "entropy", "rollout_index", "inference_logprobs", "ref_logprobs")
    tensors = {name: torch.zeros(3) for name in names}
    # (1,) would broadcast
    with pytest.raises(ValueError, match=rf"'{field}': \(1,\).*expected \(N,\)"):
        LossInputs(**{**tensors, field: torch.zeros(1)}, num_rollouts=1)
