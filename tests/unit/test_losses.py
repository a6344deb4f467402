"""The per-token losses: values, gradients, metrics, and independence of the split."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from trl_atropos.logprobs import token_logprobs_and_entropy
from trl_atropos.losses import (
    LOSS_TYPES,
    LossInputs,
    LossOutputs,
    clipped_ratio_loss,
    make_loss_function,
    weighted_sft_loss,
)
from trl_atropos.metrics import METRICS, MetricAccumulator


def loss_inputs(trainer_logprobs, advantages, inference_logprobs=None, entropy=None) -> LossInputs:
    trainer_logprobs = torch.as_tensor(trainer_logprobs, dtype=torch.float32).clone().requires_grad_()
    return LossInputs(
        trainer_logprobs=trainer_logprobs,
        advantages=torch.as_tensor(advantages, dtype=torch.float32),
        inference_logprobs=None if inference_logprobs is None else torch.as_tensor(inference_logprobs),
        entropy=torch.zeros(trainer_logprobs.shape) if entropy is None else torch.as_tensor(entropy),
    )


def at_ratio(ratio: float, advantage: float, entropy: float = 0.0) -> LossInputs:
    inference_logprob = -2.0
    return loss_inputs([inference_logprob + math.log(ratio)], [advantage], [inference_logprob], [entropy])


def reported(outputs: LossOutputs) -> dict[str, float]:
    accumulator = MetricAccumulator()
    accumulator.update(outputs.metrics)
    return accumulator.reduce()


class TestWeightedSftLoss:
    def test_sum_and_gradient(self):
        # -(2 * -0.5) - (-1 * -3) = 1 - 3 = -2; d/d logprob = -A
        inputs = loss_inputs([-0.5, -3.0], [2.0, -1.0])
        outputs = weighted_sft_loss(inputs)
        outputs.loss_sum.backward()
        assert outputs.loss_sum.item() == -2.0
        assert inputs.trainer_logprobs.grad.tolist() == [-2.0, 1.0]

    def test_advantage_1_is_cross_entropy(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(7, 11, generator=generator)
        targets = torch.randint(11, (7,), generator=generator)
        logprobs, entropy = token_logprobs_and_entropy(logits, targets)
        outputs = weighted_sft_loss(LossInputs(logprobs, torch.ones(7), None, entropy))
        torch.testing.assert_close(outputs.loss_sum, cross_entropy(logits, targets, reduction="sum"))

    def test_gradient_equals_clipped_ratio_at_ratio_1(self):
        on_policy = [-0.5, -3.0, -1.0]
        advantages = [2.0, -1.0, 0.0]
        gradients = []
        for loss_function in (weighted_sft_loss, clipped_ratio_loss):
            inputs = loss_inputs(on_policy, advantages, on_policy)
            loss_function(inputs).loss_sum.backward()
            gradients.append(inputs.trainer_logprobs.grad.tolist())
        # -A in both
        assert gradients == [[-2.0, 1.0, 0.0]] * 2


class TestClippedRatioLoss:
    # epsilon 0.2: clip(r) = 0.8, 1, 1.2 for r = 0.5, 1, 1.5.
    # loss = -min(r A, clip(r) A); its gradient with respect to the logprob is -r A where r A is the minimum, else 0.
    #   A = +1: min(0.5, 0.8) = 0.5    min(1, 1) = 1      min(1.5, 1.2) = 1.2 (clipped)
    #   A = -1: min(-0.5, -0.8) = -0.8 (clipped)   min(-1, -1) = -1   min(-1.5, -1.2) = -1.5
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
    def test_takes_the_minimum_for_both_signs_of_the_advantage(self, advantage, ratio, loss, gradient):
        # Atropos' example trainer takes the maximum for A < 0: gradient 0 at ratio 1.5, and 0.5 at ratio 0.5.
        inputs = at_ratio(ratio, advantage)
        outputs = clipped_ratio_loss(inputs, epsilon=0.2)
        outputs.loss_sum.backward()
        assert outputs.loss_sum.item() == pytest.approx(loss, rel=1e-6)
        assert inputs.trainer_logprobs.grad.item() == pytest.approx(gradient, rel=1e-6)

    def test_epsilon_high_moves_the_upper_bound_only(self):
        # A = 1: min(1.5, 1.28) = 1.28. A = -1: min(-0.5, -0.8) = -0.8 as before.
        assert clipped_ratio_loss(at_ratio(1.5, 1.0), 0.2, 0.28).loss_sum.item() == pytest.approx(-1.28, rel=1e-6)
        assert clipped_ratio_loss(at_ratio(0.5, -1.0), 0.2, 0.28).loss_sum.item() == pytest.approx(0.8, rel=1e-6)

    def test_metrics(self):
        # ratio        1.5   1.5   0.5   0.5   1
        # advantage     1    -1     1    -1    1
        # clipped      high   -     -    low   -
        ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0])
        inference_logprobs = torch.full((5,), -2.0)
        inputs = loss_inputs(
            inference_logprobs + ratios.log(),
            [1.0, -1.0, 1.0, -1.0, 1.0],
            inference_logprobs,
            entropy=[1.0, 2.0, 3.0, 4.0, 5.0],
        )
        assert reported(clipped_ratio_loss(inputs)) == pytest.approx(
            {
                "entropy": 3.0,
                "clip_ratio/low_mean": 0.2,
                "clip_ratio/high_mean": 0.2,
                "clip_ratio/region_mean": 0.4,
                "sampling/sampling_logp_difference/mean": (2 * math.log(1.5) + 2 * math.log(2)) / 5,
                "sampling/sampling_logp_difference/max": math.log(2),
                "sampling/importance_sampling_ratio/mean": 1.0,
                "sampling/importance_sampling_ratio/min": 0.5,
                "sampling/importance_sampling_ratio/max": 1.5,
            },
            rel=1e-6,
        )

    @pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
    def test_absurd_inference_logprob_keeps_loss_and_gradient_finite(self, advantage):
        # exp(9998) is inf, and inf * 0 is NaN; the log ratio is capped at 20 and has no gradient there.
        inputs = loss_inputs([-1.0], [advantage], [-9999.0])
        outputs = clipped_ratio_loss(inputs)
        outputs.loss_sum.backward()
        assert outputs.loss_sum.isfinite()
        assert inputs.trainer_logprobs.grad.tolist() == [0.0]
        assert reported(outputs)["sampling/importance_sampling_ratio/max"] == pytest.approx(math.exp(20), rel=1e-6)

    def test_missing_inference_logprobs_are_refused(self):
        with pytest.raises(ValueError, match=r"no inference_logprobs.*Resolve them first"):
            clipped_ratio_loss(loss_inputs([-1.0], [1.0]))


class TestBothLosses:
    @pytest.fixture(params=LOSS_TYPES)
    def loss_function(self, request):
        return make_loss_function(request.param, epsilon=0.2, epsilon_high=None)

    def test_no_trained_tokens_give_zero_with_a_graph(self, loss_function):
        logits = torch.randn(0, 5, requires_grad=True)
        logprobs, entropy = token_logprobs_and_entropy(logits, torch.zeros(0, dtype=torch.int64))
        outputs = loss_function(LossInputs(logprobs, torch.zeros(0), torch.zeros(0), entropy))
        outputs.loss_sum.backward()
        assert outputs.loss_sum.item() == 0.0
        assert logits.grad.shape == (0, 5)
        assert {metric.count for metric in outputs.metrics.values()} == {0}
        assert reported(outputs) == {}

    def test_entropy_and_sampling_metrics_do_not_depend_on_the_loss(self, loss_function):
        values = reported(loss_function(at_ratio(1.5, 1.0, entropy=0.25)))
        assert values["entropy"] == 0.25
        assert values["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.5, rel=1e-6)
        assert values["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(1.5), rel=1e-6)

    def test_every_metric_is_documented(self, loss_function):
        assert loss_function(at_ratio(1.5, 1.0)).metrics.keys() <= METRICS.keys()

    @settings(deadline=None, max_examples=25)
    @given(
        cuts=st.lists(st.integers(0, 12), max_size=5),
        loss_type=st.sampled_from(LOSS_TYPES),
        seed=st.integers(0, 2**16),
    )
    def test_any_split_into_micro_batches_gives_the_same_gradient(self, cuts, loss_type, seed):
        # Seed bug 5: a mean of the means of micro-batches weighs the tokens of short ones more.
        generator = torch.Generator().manual_seed(seed)
        num_tokens, hidden_size, vocab_size = 12, 4, 6
        hidden_states = torch.randn(num_tokens, hidden_size, generator=generator)
        targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
        advantages = torch.randn(num_tokens, generator=generator)
        inference_logprobs = -2 * torch.rand(num_tokens, generator=generator)
        initial_weight = torch.randn(hidden_size, vocab_size, generator=generator)
        loss_function = make_loss_function(loss_type, epsilon=0.2, epsilon_high=0.28)

        def gradient(bounds: list[int]) -> torch.Tensor:
            weight = initial_weight.clone().requires_grad_()
            for start, end in pairwise(bounds):
                rows = slice(start, end)
                logprobs, entropy = token_logprobs_and_entropy(hidden_states[rows] @ weight, targets[rows])
                inputs = LossInputs(logprobs, advantages[rows], inference_logprobs[rows], entropy)
                (loss_function(inputs).loss_sum / num_tokens).backward()
            return weight.grad

        split = gradient([0, *sorted(cuts), num_tokens])
        torch.testing.assert_close(split, gradient([0, num_tokens]), rtol=0, atol=1e-6)


class TestMakeLossFunction:
    def test_grpo_gets_its_bounds(self):
        # A = 1, ratio 1.5, upper bound 1 + 0.1
        loss_function = make_loss_function("grpo", epsilon=0.3, epsilon_high=0.1)
        assert loss_function(at_ratio(1.5, 1.0)).loss_sum.item() == pytest.approx(-1.1, rel=1e-6)

    def test_epsilon_high_defaults_to_epsilon(self):
        loss_function = make_loss_function("grpo", epsilon=0.3, epsilon_high=None)
        assert loss_function(at_ratio(1.5, 1.0)).loss_sum.item() == pytest.approx(-1.3, rel=1e-6)

    def test_unknown_loss_lists_choices(self):
        with pytest.raises(ValueError, match=r"'ppo'.*weighted_sft, grpo"):
            make_loss_function("ppo", epsilon=0.2, epsilon_high=None)

    @pytest.mark.parametrize(("epsilon", "epsilon_high"), [(-0.1, None), (0.2, -0.1)])
    def test_negative_bounds_are_refused(self, epsilon, epsilon_high):
        with pytest.raises(ValueError, match="--epsilon_high"):
            make_loss_function("grpo", epsilon=epsilon, epsilon_high=epsilon_high)


@pytest.mark.parametrize("field", ["advantages", "inference_logprobs", "entropy"])
def test_inputs_of_other_shapes_are_refused(field):
    tensors = {"trainer_logprobs": torch.zeros(3), "advantages": torch.zeros(3), "entropy": torch.zeros(3)}
    tensors["inference_logprobs"] = torch.zeros(3)
    # (1,) would broadcast
    with pytest.raises(ValueError, match=rf"'{field}': \(1,\).*expected \(N,\)"):
        LossInputs(**{**tensors, field: torch.zeros(1)})
