"""What a step knows of all its micro-batches, and of its losses. Over several ranks: tests/invariant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from trl import GRPOTrainer

from trl_atropos.data.micro_batches import RolloutCollator
from trl_atropos.errors import NonFiniteGradientError
from trl_atropos.loss.loss_types import AGGREGATIONS
from trl_atropos.loss.metrics import Metric, MetricAccumulator
from trl_atropos.loss.options import StepOptions
from trl_atropos.loss.step import LossWatch, is_overflow, keep_high_entropy, prepare_step, teacher_cross_entropy
from trl_atropos.report.metric_help import METRICS
from trl_atropos.types import Rollout, RolloutOrigin


CPU = torch.device("cpu")
MAX_LENGTH = 10
LOSS_TYPE_OF = {"token": "dapo", "rollout": "grpo", "constant": "dr_grpo", "rollout_sum": "luspo"}


def options(
    normalization: str = "none", clipping: Sequence[float] | None = None, aggregation: str = "token"
) -> StepOptions:
    return StepOptions(
        advantage_normalization=normalization,
        advantage_clipping=None if clipping is None else list(clipping),
        loss_type=LOSS_TYPE_OF[aggregation],
    )


def rollout(advantages: Sequence[float], number: int = 0, **fields: Any) -> Rollout:
    """A prompt of one token and one trained token for each advantage."""
    input_ids = torch.arange(10, 11 + len(advantages)) + 20 * number
    labels = input_ids.masked_fill(torch.arange(input_ids.numel()) == 0, -100)
    values = torch.tensor([0.0, *advantages])
    origin = RolloutOrigin(env_id=0, group=0, rollout=number)
    return Rollout(input_ids=input_ids, labels=labels, reward=0.0, advantages=values, origin=origin, **fields)


def micro_batches(*contents: Sequence[Rollout]) -> list[dict[str, Any]]:
    return [RolloutCollator("packed", temperature=1.0)(rollouts) for rollouts in contents]


def advantages_of(batches: Sequence[dict[str, Any]]) -> list[float]:
    return torch.cat([batch["advantages"] for batch in batches]).tolist()


def reduced(metrics: dict[str, Metric]) -> dict[str, float]:
    accumulator = MetricAccumulator()
    accumulator.update(metrics)
    return accumulator.reduce()


# Mean 1, deviations 0, 0, -4, 4, unbiased variance 32 / 3: 4 / sqrt(32 / 3) = sqrt(3 / 2).
EXAMPLE = [1.0, 1.0, -3.0, 5.0]
NORMALIZED = [0.0, 0.0, -math.sqrt(1.5), math.sqrt(1.5)]


def whole_and_halves() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    left, right = rollout(EXAMPLE[:2], 0), rollout(EXAMPLE[2:], 1)
    return micro_batches([left, right]), micro_batches([left], [right])


class TestAdvantageNormalization:
    def test_none_leaves_them_as_they_are(self):
        whole, _ = whole_and_halves()
        prepare_step(whole, options("none"), MAX_LENGTH, CPU)
        assert advantages_of(whole) == EXAMPLE

    def test_batch_is_over_each_micro_batch_and_depends_on_the_split(self):
        whole, halves = whole_and_halves()
        prepare_step(whole, options("batch"), MAX_LENGTH, CPU)
        prepare_step(halves, options("batch"), MAX_LENGTH, CPU)
        assert advantages_of(whole) == pytest.approx(NORMALIZED)
        # [1, 1] has no spread: 0. [-3, 5]: mean 1, variance 32, 4 / sqrt(32) = sqrt(1 / 2).
        assert advantages_of(halves) == pytest.approx([0.0, 0.0, -math.sqrt(0.5), math.sqrt(0.5)])

    def test_global_is_over_the_step_and_the_same_for_every_split(self):
        for batches in whole_and_halves():
            prepare_step(batches, options("global"), MAX_LENGTH, CPU)
            assert advantages_of(batches) == pytest.approx(NORMALIZED)

    def test_a_micro_batch_without_tokens_changes_nothing_and_gets_everything(self):
        batches = micro_batches([rollout(EXAMPLE[:2], 0)], [], [rollout(EXAMPLE[2:], 1)])
        num_trained_tokens, _ = prepare_step(batches, options("global", [-1.0, 1.0]), MAX_LENGTH, CPU)
        assert num_trained_tokens == 4
        assert advantages_of(batches) == pytest.approx([0.0, 0.0, -1.0, 1.0])
        assert batches[1]["token_weights"].shape == (0,)
        assert batches[1]["token_mean_weight"].item() == 0.25

    @pytest.mark.parametrize("normalization", ["none", "batch", "global"])
    def test_a_single_trained_token_keeps_its_advantage(self, normalization):
        batches = micro_batches([rollout([0.3])])
        prepare_step(batches, options(normalization), MAX_LENGTH, CPU)
        assert advantages_of(batches) == pytest.approx([0.3])

    @pytest.mark.parametrize("normalization", ["none", "batch", "global"])
    def test_nothing_trained_at_all(self, normalization):
        batches = micro_batches([], [])
        num_trained_tokens, metrics = prepare_step(batches, options(normalization, [-1.0, 1.0]), MAX_LENGTH, CPU)
        assert num_trained_tokens == 0
        assert advantages_of(batches) == []
        assert reduced(metrics)["num_trained_tokens"] == 0

    def test_an_advantage_that_is_not_finite_stops_the_step(self):
        with pytest.raises(ValueError, match="1 of 2 trained advantages are not finite"):
            prepare_step(micro_batches([rollout([1.0, math.nan])]), options(), MAX_LENGTH, CPU)


class TestClipping:
    def test_bounds_are_in_units_of_the_normalised_advantages(self):
        whole, _ = whole_and_halves()
        _, metrics = prepare_step(whole, options("global", [-1.0, 1.2]), MAX_LENGTH, CPU)
        # Clipped before, [1, 1, -1, 1.2], the numbers would be others: mean 0.55.
        assert advantages_of(whole) == pytest.approx([0.0, 0.0, -1.0, 1.2])
        values = reduced(metrics)
        assert (values["advantages/clipped_frac_low"], values["advantages/clipped_frac_high"]) == (0.25, 0.25)

    def test_fractions_are_over_the_tokens_of_the_step(self):
        batches = micro_batches([rollout([-9.0])], [rollout([0.0, 2.0, 9.0, 9.0, 1.0], 1)])
        _, metrics = prepare_step(batches, options("none", [-5.0, 2.0]), MAX_LENGTH, CPU)
        # 1 of 6 below; 2 of 6 above, of which the bound itself is none.
        values = reduced(metrics)
        assert values["advantages/clipped_frac_low"] == pytest.approx(1 / 6)
        assert values["advantages/clipped_frac_high"] == pytest.approx(2 / 6)

    def test_without_bounds_nothing_is_reported(self):
        whole, _ = whole_and_halves()
        _, metrics = prepare_step(whole, options(), MAX_LENGTH, CPU)
        assert not {"advantages/clipped_frac_low", "advantages/clipped_frac_high"} & metrics.keys()


class TestZeroAdvantage:
    def test_it_pushes_nothing_and_the_others_as_before(self):
        flagged = rollout(EXAMPLE[2:], 1, set_advantage_to_zero=True)
        for normalization, expected in {"none": [1.0, 1.0], "global": [0.0, 0.0]}.items():
            batches = micro_batches([flagged, rollout(EXAMPLE[:2], 0)])
            prepare_step(batches, options(normalization), MAX_LENGTH, CPU)
            assert advantages_of(batches) == pytest.approx([0.0, 0.0, *expected])

    def test_its_tokens_count_in_the_statistics_and_in_the_denominator(self):
        batches = micro_batches([rollout(EXAMPLE[:2], 0, set_advantage_to_zero=True), rollout(EXAMPLE[2:], 1)])
        num_trained_tokens, _ = prepare_step(batches, options("global"), MAX_LENGTH, CPU)
        # With all four tokens -+sqrt(3 / 2); over the last two alone it would be -+sqrt(1 / 2).
        assert advantages_of(batches) == pytest.approx(NORMALIZED)
        assert num_trained_tokens == 4
        assert batches[0]["token_weights"].tolist() == [0.25] * 4

    def test_bounds_that_leave_out_0_do_not_lift_it(self):
        batches = micro_batches([rollout([3.0], 0, set_advantage_to_zero=True), rollout([3.0], 1)])
        prepare_step(batches, options("none", [1.0, 2.0]), MAX_LENGTH, CPU)
        assert advantages_of(batches) == [0.0, 2.0]


# Three rollouts with 1, 3 and no trained tokens, over two micro-batches.
WEIGHTS = {
    # 1 / trained tokens of the step
    "token": [1 / 4, 1 / 4, 1 / 4, 1 / 4],
    # 1 / (rollouts of the step x trained tokens of the rollout)
    "rollout": [1 / 3, 1 / 9, 1 / 9, 1 / 9],
    # 1 / (rollouts of the step x max_completion_length of 10)
    "constant": [1 / 30] * 4,
    # 1 / rollouts of the step
    "rollout_sum": [1 / 3] * 4,
}


class TestTokenWeights:
    def test_every_aggregation_is_covered(self):
        assert set(AGGREGATIONS.values()) == WEIGHTS.keys()

    @pytest.mark.parametrize("aggregation", WEIGHTS)
    def test_of_each_aggregation(self, aggregation):
        batches = micro_batches([rollout([1.0], 0)], [rollout([1.0, 2.0, 3.0], 1), rollout([], 2)])
        prepare_step(batches, options(aggregation=aggregation), MAX_LENGTH, CPU)
        weights = torch.cat([batch["token_weights"] for batch in batches])
        assert weights.tolist() == pytest.approx(WEIGHTS[aggregation])
        assert [batch["token_mean_weight"].item() for batch in batches] == [0.25, 0.25]

    def test_means_over_tokens_with_a_teacher_divide_by_those_of_the_step(self):
        # Of the five trained tokens three have a teacher: the second and third of the first rollout, one of the other.
        ids = torch.tensor([[1, 2], [-1, -1], [3, -1], [4, 5]])
        taught = rollout(
            [1.0, 1.0, 1.0], 0, teacher_token_ids=ids, teacher_logprobs=torch.where(ids < 0, -torch.inf, -1.0)
        )
        single = torch.tensor([[-1], [6]])
        other = rollout([1.0], 1, teacher_token_ids=single, teacher_logprobs=torch.where(single < 0, -torch.inf, -1.0))
        batches = micro_batches([taught], [other], [rollout([1.0], 2)])
        prepare_step(batches, options(), MAX_LENGTH, CPU)
        assert [batch["num_with_teacher"] for batch in batches] == [2, 1, 0]
        assert [batch["teacher_mean_weight"].item() for batch in batches] == pytest.approx([1 / 3] * 3)

    def test_a_step_without_a_teacher_divides_by_1_not_by_0(self):
        whole, _ = whole_and_halves()
        prepare_step(whole, options(), MAX_LENGTH, CPU)
        assert whole[0]["num_with_teacher"] == 0
        assert whole[0]["teacher_mean_weight"].item() == 1.0


class TestMetrics:
    def test_of_a_step(self):
        batches = micro_batches([rollout([1.0, 2.0], 0)], [rollout([3.0], 1), rollout([4.0], 2)])
        num_trained_tokens, metrics = prepare_step(batches, options(), MAX_LENGTH, CPU)
        values = reduced(metrics)
        assert values.keys() <= METRICS.keys()
        assert num_trained_tokens == 4
        assert values["num_trained_tokens"] == 4
        assert values["advantages/zero_std"] == 0
        assert values["perf/num_micro_batches"] == 2

    @pytest.mark.parametrize("batches", [[[rollout([2.0, 2.0])]], [[rollout([2.0])], [rollout([2.0], 1)]]])
    def test_equal_advantages_have_zero_std(self, batches):
        _, metrics = prepare_step(micro_batches(*batches), options(), MAX_LENGTH, CPU)
        assert reduced(metrics)["advantages/zero_std"] == 1

    @pytest.mark.parametrize(
        # Computed are 1, 1 and 3 tokens: the last one of a rollout predicts nothing. Padded 3 x 3; as trees 1 + 1 + 3 in
        # rows of 3: two rows.
        ("layout", "fraction"), [("packed", 5 / 5), ("padded", 9 / 5), ("tree", 6 / 5)]
    )  # fmt: skip
    def test_computed_tokens_frac_counts_padding(self, layout, fraction):
        rollouts = [
            replace(rollout(advantages, number), origin=RolloutOrigin(0, number, 0))
            for number, advantages in enumerate([[1.0], [1.0], [1.0, 1.0, 1.0]])
        ]
        batch = RolloutCollator(layout, temperature=1.0)(rollouts)
        _, metrics = prepare_step([batch], options(), MAX_LENGTH, CPU)
        assert reduced(metrics)["perf/computed_tokens_frac"] == pytest.approx(fraction)

    def test_computed_tokens_frac_counts_shared_prefixes_once(self):
        twins = [replace(rollout([1.0, 1.0]), origin=RolloutOrigin(0, 0, n)) for n in range(2)]
        batch = RolloutCollator("tree", temperature=1.0)(twins)
        _, metrics = prepare_step([batch], options(), MAX_LENGTH, CPU)
        # 2 positions for 2 + 2 tokens
        assert reduced(metrics)["perf/computed_tokens_frac"] == 0.5


class TestTeacherCrossEntropy:
    TEACHER = torch.tensor([[0.5, 0.25], [0.75, 0.0]]).log()

    def test_closed_form(self):
        # -(1/2 log 1/4 + 1/4 log 1/2) - 3/4 log 1/8 = log 2 (1 + 1/4 + 9/4) = 3.5 log 2
        student = torch.tensor([[1 / 4, 1 / 2], [1 / 8, 1.0]]).log()
        loss = teacher_cross_entropy(student, {"teacher_logprobs": self.TEACHER})
        assert loss.shape == ()
        assert loss.item() == pytest.approx(3.5 * math.log(2), rel=1e-6)

    @pytest.mark.parametrize("value", [-math.inf, math.nan])
    def test_what_the_student_says_of_padding_plays_no_role_also_in_the_gradient(self, value):
        student = torch.tensor([[1 / 4, 1 / 2], [1 / 8, 1.0]]).log()
        student[1, 1] = value
        student.requires_grad_()
        loss = teacher_cross_entropy(student, {"teacher_logprobs": self.TEACHER})
        loss.backward()
        assert loss.item() == pytest.approx(3.5 * math.log(2), rel=1e-6)
        # d / d log q_k = -p_k
        assert student.grad.flatten().tolist() == pytest.approx([-0.5, -0.25, -0.75, 0.0])

    def test_the_gradient_at_the_logits_is_student_minus_teacher(self):
        # A teacher that names the whole vocabulary: KL's gradient, softmax(z) - p.
        teacher = torch.tensor([[0.5, 0.3, 0.2]]).log()
        logits = torch.tensor([[1.0, -1.0, 0.5]], requires_grad=True)
        teacher_cross_entropy(logits.log_softmax(-1), {"teacher_logprobs": teacher}).backward()
        torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - teacher.exp())

    def test_no_token_at_all_is_0_and_still_has_a_gradient(self):
        student = torch.zeros(0, 3, requires_grad=True)
        loss = teacher_cross_entropy(student, {"teacher_logprobs": torch.zeros(0, 3)})
        loss.backward()
        assert loss.item() == 0.0
        assert student.grad.shape == (0, 3)


class TestLossWatch:
    def test_finite_losses_pass(self):
        watch = LossWatch()
        watch.add(["a", "b"], torch.tensor([1.0, -2.0]))
        watch.add([], torch.zeros(0))
        watch.check(1, CPU)

    def test_nothing_seen_passes(self):
        LossWatch().check(1, CPU)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_the_error_names_step_and_rollout(self, value):
        watch = LossWatch()
        watch.add(["group 0, rollout 0", "group 0, rollout 1"], torch.tensor([1.0, 2.0]))
        watch.add(["group 1, rollout 0", "group 1, rollout 1"], torch.tensor([1.0, value], requires_grad=True))
        with pytest.raises(NonFiniteGradientError) as caught:
            watch.check(7, CPU)
        assert caught.value.what == "The loss of step 7 is not finite, because of group 1, rollout 1."
        assert "not taken" in caught.value.why
        assert "output_dir/journal" in caught.value.fix

    def test_many_are_counted_after_three_names(self):
        watch = LossWatch()
        watch.add(["a", "b"], torch.tensor([math.nan, math.nan]))
        watch.add(["c", "d", "e"], torch.tensor([math.nan, math.inf, math.nan]))
        with pytest.raises(NonFiniteGradientError) as caught:
            watch.check(1, CPU)
        assert caught.value.what == "The loss of step 1 is not finite, because of a; b; c; and 2 more."

    def test_a_check_forgets_what_was_seen(self):
        watch = LossWatch()
        watch.add(["a"], torch.tensor([math.nan]))
        with pytest.raises(NonFiniteGradientError):
            watch.check(1, CPU)
        watch.check(2, CPU)

    def test_it_holds_no_graph(self):
        parameter = torch.ones(1, requires_grad=True)
        watch = LossWatch()
        watch.add(["a"], parameter * 2)
        ((_, is_finite),) = watch._seen
        assert not is_finite.requires_grad


@pytest.mark.parametrize(
    ("grad_norm", "loss_scale", "expected"),
    [
        (math.inf, 65536.0, True),
        (math.nan, 2.0, True),
        (math.inf, 1.0, False),
        (math.inf, None, False),
        (3.0, 65536.0, False),
        (None, 65536.0, False),
    ],
)
def test_a_gradient_that_is_not_finite_is_an_overflow_while_its_scale_can_be_halved(grad_norm, loss_scale, expected):
    assert is_overflow(grad_norm, loss_scale) is expected


class TestHighEntropy:
    @pytest.mark.parametrize("quantile", [0.0, 0.2, 0.5, 0.9, 1.0])
    def test_the_tokens_that_are_kept_are_those_of_trl(self, quantile):
        entropy = torch.rand(12, generator=torch.Generator().manual_seed(3))
        batches = micro_batches([rollout([1.0] * 5)], [rollout([-2.0] * 4, 1), rollout([0.5] * 3, 2)])
        before = advantages_of(batches)
        metrics = reduced(keep_high_entropy(batches, entropy.split([5, 7]), quantile))
        trainer = SimpleNamespace(accelerator=Accelerator(cpu=True))
        is_kept = GRPOTrainer.get_high_entropy_mask(trainer, entropy[None], torch.ones(1, 12), 1 - quantile)[0]
        expected = [value if kept else 0.0 for value, kept in zip(before, is_kept.tolist(), strict=True)]
        assert advantages_of(batches) == expected
        assert metrics["entropy_mask/threshold"] == pytest.approx(entropy[is_kept].min().item(), abs=0.2)
        assert metrics.keys() <= METRICS.keys()

    def test_a_micro_batch_without_a_trained_token_changes_nothing(self):
        batches = micro_batches([rollout([1.0, 1.0])], [rollout([], 1)])
        keep_high_entropy(batches, [torch.tensor([0.1, 0.2]), torch.zeros(0)], 0.5)
        assert advantages_of(batches) == [0.0, 1.0]
        assert keep_high_entropy([], [], 0.5) == {}
