"""Group advantages, their statistics, normalisation and clipping, in one process."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.loss.advantages import (
    AdvantageStatistics,
    advantage_statistics,
    clip_advantages,
    group_advantages,
    normalize_advantages,
    standardize_advantages,
    validate_clipping,
)


def all_true(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor, dtype=torch.bool)


class TestGroupAdvantages:
    def test_group_divides_by_unbiased_std_plus_1e_4(self):
        # mean 1; deviations -1, 0, 1; unbiased variance (1 + 0 + 1) / 2 = 1; divisor 1 + 1e-4
        expected = torch.tensor([-1 / 1.0001, 0.0, 1 / 1.0001])
        torch.testing.assert_close(group_advantages(torch.tensor([0.0, 1.0, 2.0]), "group"), expected)

    def test_none_only_centres(self):
        # mean 2
        advantages = group_advantages(torch.tensor([0.0, 1.0, 5.0]), "none")
        assert advantages.tolist() == [-2.0, -1.0, 3.0]

    def test_batch_centres_in_the_group_and_divides_by_the_std_of_the_batch_plus_1e_4(self):
        # mean 2; the std is that of the caller, whatever the group's own is
        expected = torch.tensor([-2.0, -1.0, 3.0]) / 4.0001
        torch.testing.assert_close(group_advantages(torch.tensor([0.0, 1.0, 5.0]), "batch", 4.0), expected)

    def test_batch_without_spread_gives_zero_not_nan(self):
        assert group_advantages(torch.tensor([0.1, 0.1, 0.1]), "batch", 0.0).tolist() == [0.0] * 3

    def test_batch_needs_the_std_of_the_batch(self):
        with pytest.raises(ValueError, match="scale_rewards is 'batch' and batch_std is None"):
            group_advantages(torch.tensor([0.0, 1.0]), "batch")

    @pytest.mark.parametrize("scale_rewards", ["group", "none"])
    def test_the_std_of_the_batch_plays_no_role_otherwise(self, scale_rewards):
        rewards = torch.tensor([0.0, 1.0, 5.0])
        assert torch.equal(group_advantages(rewards, scale_rewards, 9.0), group_advantages(rewards, scale_rewards))

    @pytest.mark.parametrize(("scale_rewards", "batch_std"), [("group", None), ("batch", 3.0), ("none", None)])
    def test_single_rollout_gives_zero(self, scale_rewards, batch_std):
        assert group_advantages(torch.tensor([7.0]), scale_rewards, batch_std).tolist() == [0.0]

    @pytest.mark.parametrize("num_rollouts", [2, 3, 7, 16])
    def test_equal_rewards_give_exactly_zero(self, num_rollouts):
        # 0.1 is not a binary fraction: a float32 mean of copies may be one ulp off, and the divisor 1e-4 shows it.
        advantages = group_advantages(torch.full((num_rollouts,), 0.1, dtype=torch.float64), "group")
        assert advantages.tolist() == [0.0] * num_rollouts

    def test_integer_rewards_give_float32(self):
        advantages = group_advantages(torch.tensor([0, 1]), "none")
        assert advantages.dtype == torch.float32
        assert advantages.tolist() == [-0.5, 0.5]

    def test_leave_one_out_compares_with_the_others(self):
        # 0 - mean(1, 5), 1 - mean(0, 5), 5 - mean(0, 1)
        advantages = group_advantages(torch.tensor([0.0, 1.0, 5.0]), "none", baseline="leave_one_out")
        torch.testing.assert_close(advantages, torch.tensor([-3.0, -1.5, 4.5]))
        equal = group_advantages(torch.full((3,), 0.1), "group", baseline="leave_one_out")
        assert equal.tolist() == [0.0] * 3

    def test_the_baseline_of_the_batch_trains_groups_of_one(self):
        advantages = group_advantages(torch.tensor([5.0]), "batch", 2.0, baseline="batch", batch_mean=1.0)
        torch.testing.assert_close(advantages, torch.tensor([4.0 / 2.0001]))
        assert group_advantages(torch.tensor([5.0, 1.0]), "none", baseline="batch", batch_mean=2.0).tolist() == [3, -1]
        with pytest.raises(ValueError, match="baseline is 'batch' and batch_mean is None"):
            group_advantages(torch.tensor([5.0]), "none", baseline="batch")

    def test_unknown_baseline_lists_choices(self):
        with pytest.raises(ValueError, match=r"'mean'.*--advantage_baseline.*group, leave_one_out, batch"):
            group_advantages(torch.tensor([0.0, 1.0]), "none", baseline="mean")

    def test_unknown_scale_lists_choices(self):
        with pytest.raises(ValueError, match=r"'global'.*--scale_rewards.*group, batch, none"):
            group_advantages(torch.tensor([0.0, 1.0]), "global")

    def test_matrix_is_refused(self):
        with pytest.raises(ValueError, match=r"\(2, 3\), expected \(G,\)"):
            group_advantages(torch.zeros(2, 3), "group")


class TestAdvantageStatistics:
    def test_is_over_all_micro_batches_not_over_their_statistics(self):
        # 0, 2 | 10 -> mean 4; squared deviations 16 + 4 + 36 = 56; variance 56 / 2 = 28
        micro_batches = [torch.tensor([[0.0, 2.0]]), torch.tensor([[10.0]])]
        statistics = advantage_statistics(micro_batches, [all_true(tensor) for tensor in micro_batches])
        assert statistics == AdvantageStatistics(mean=4.0, std=math.sqrt(28), num_trained_tokens=3)

    def test_untrained_positions_do_not_count_even_if_nan(self):
        # 1, 3 -> mean 2; variance (1 + 1) / 1 = 2
        advantages = torch.tensor([[1.0, math.nan], [math.inf, 3.0]])
        loss_mask = torch.tensor([[True, False], [False, True]])
        statistics = advantage_statistics([advantages], [loss_mask])
        assert statistics == AdvantageStatistics(mean=2.0, std=math.sqrt(2), num_trained_tokens=2)

    def test_seed_bug_6_std_of_one_token_is_not_nan(self):
        statistics = advantage_statistics([torch.tensor([3.0])], [torch.tensor([True])])
        assert statistics == AdvantageStatistics(mean=0.0, std=1.0, num_trained_tokens=1)

    def test_no_data_at_all(self):
        assert advantage_statistics([], []) == AdvantageStatistics(mean=0.0, std=1.0, num_trained_tokens=0)
        nothing_trained = advantage_statistics([torch.ones(2, 3)], [torch.zeros(2, 3, dtype=torch.bool)])
        assert nothing_trained == AdvantageStatistics(mean=0.0, std=1.0, num_trained_tokens=0)

    def test_small_spread_on_large_mean_survives(self):
        # 5 - 1e-3 and 5 + 1e-3 alternating, n = 200000: variance = n * d^2 / (n - 1), d the float32 distance from the
        # mean. In float32, E[x^2] - E[x]^2 of these numbers is off by more than its own size.
        num_tokens = 200_000
        low, high = torch.tensor(5 - 1e-3), torch.tensor(5 + 1e-3)
        half_distance = (high.double() - low.double()).item() / 2
        advantages = torch.stack([low, high]).repeat(num_tokens // 2)
        statistics = advantage_statistics([advantages], [all_true(advantages)])
        expected = half_distance * math.sqrt(num_tokens / (num_tokens - 1))
        assert statistics.std == pytest.approx(expected, rel=1e-6)

    def test_shape_mismatch_names_both(self):
        with pytest.raises(ValueError, match=r"\(2, 3\), loss_mask has shape \(2, 1\)"):
            advantage_statistics([torch.zeros(2, 3)], [torch.ones(2, 1, dtype=torch.bool)])

    def test_integer_mask_is_refused(self):
        with pytest.raises(ValueError, match=r"torch.int64, expected torch.bool"):
            advantage_statistics([torch.zeros(3)], [torch.ones(3, dtype=torch.int64)])

    def test_number_of_masks_must_match(self):
        with pytest.raises(ValueError, match="2 advantage tensors and 1 loss masks"):
            advantage_statistics([torch.zeros(1), torch.zeros(1)], [torch.ones(1, dtype=torch.bool)])


class TestNormalizeAdvantages:
    def test_seed_example_whole_and_in_halves(self):
        # Seed bug 3, the reason for statistics of a whole step. Whole: mean 1, deviations 0, 0, -4, 4, variance 32/3,
        # 4 / sqrt(32 / 3) = sqrt(1.5) = 1.2247. The half [-3, 5]: mean 1, variance 32, 4 / sqrt(32) = 0.7071.
        advantages = torch.tensor([1.0, 1.0, -3.0, 5.0])
        whole = normalize_advantages(advantages, all_true(advantages), "batch")
        torch.testing.assert_close(whole, torch.tensor([0.0, 0.0, -math.sqrt(1.5), math.sqrt(1.5)]))
        half = normalize_advantages(advantages[2:], all_true(advantages[2:]), "batch")
        torch.testing.assert_close(half, torch.tensor([-math.sqrt(0.5), math.sqrt(0.5)]))

    def test_seed_bug_2_statistics_of_the_step_differ_from_those_of_a_micro_batch(self):
        # Same numbers as above: with the statistics of both halves the second half is +-1.2247, not +-0.7071.
        halves = list(torch.tensor([1.0, 1.0, -3.0, 5.0]).split(2))
        masks = [all_true(half) for half in halves]
        standardized = standardize_advantages(halves[1], masks[1], advantage_statistics(halves, masks))
        torch.testing.assert_close(standardized, torch.tensor([-math.sqrt(1.5), math.sqrt(1.5)]))

    def test_global_in_one_process_is_batch(self):
        advantages = torch.tensor([1.0, 2.0, 4.0])
        mask = all_true(advantages)
        expected = normalize_advantages(advantages, mask, "batch")
        assert normalize_advantages(advantages, mask, "global").tolist() == expected.tolist()

    def test_seed_bug_6_single_trained_token_is_left_as_it_is(self):
        advantages = torch.tensor([[9.0, 0.3, 9.0]])
        loss_mask = torch.tensor([[False, True, False]])
        assert normalize_advantages(advantages, loss_mask, "batch").tolist() == torch.tensor([[0, 0.3, 0]]).tolist()

    @pytest.mark.parametrize("mode", ["none", "batch", "global"])
    def test_untrained_nan_becomes_zero(self, mode):
        normalized = normalize_advantages(torch.tensor([1.0, math.nan, -1.0]), torch.tensor([True, False, True]), mode)
        assert normalized[1].item() == 0.0
        assert normalized.isfinite().all()

    def test_none_keeps_trained_values(self):
        normalized = normalize_advantages(torch.tensor([0.1, 7.0]), torch.tensor([True, False]), "none")
        assert normalized.tolist() == torch.tensor([0.1, 0.0]).tolist()

    @pytest.mark.parametrize("num_tokens", [2, 3, 1000])
    def test_equal_advantages_give_exactly_zero(self, num_tokens):
        advantages = torch.full((num_tokens,), 0.1)
        normalized = normalize_advantages(advantages, all_true(advantages), "batch")
        assert normalized.abs().max().item() == 0.0

    @pytest.mark.parametrize("mode", ["none", "batch", "global"])
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_trained_advantage_that_is_not_finite_is_refused(self, mode, value):
        with pytest.raises(ValueError, match="1 of 2 trained advantages are not finite"):
            normalize_advantages(torch.tensor([1.0, value]), torch.tensor([True, True]), mode)

    def test_unknown_mode_lists_choices(self):
        with pytest.raises(ValueError, match=r"'group'.*none, batch, global"):
            normalize_advantages(torch.zeros(1), torch.ones(1, dtype=torch.bool), "group")

    def test_shape_mismatch_names_both(self):
        with pytest.raises(ValueError, match=r"\(2, 1\), loss_mask has shape \(2, 3\)"):
            normalize_advantages(torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool), "none")

    def test_input_is_not_modified(self):
        advantages = torch.tensor([1.0, 2.0, math.nan])
        before = advantages.clone()
        normalize_advantages(advantages, torch.tensor([True, True, False]), "batch")
        torch.testing.assert_close(advantages, before, equal_nan=True)

    @settings(deadline=None, max_examples=50)
    @given(
        # 1/64 apart and above: a std that 1e-8 cannot shift by 1e-6
        values=st.lists(st.integers(-6400, 6400).map(lambda n: n / 64), min_size=2, max_size=40),
        offset=st.floats(-100, 100, width=32),
        seed=st.integers(0, 2**16),
    )
    def test_trained_tokens_have_mean_0_and_std_1(self, values, offset, seed):
        trained = torch.tensor(values) + offset
        if trained.unique().numel() < 2:
            trained[0] += 1
        positions = torch.randperm(2 * trained.numel(), generator=torch.Generator().manual_seed(seed))
        advantages = torch.full((2 * trained.numel(),), math.nan)
        advantages[positions[: trained.numel()]] = trained
        loss_mask = advantages.isfinite()
        normalized = normalize_advantages(advantages, loss_mask, "batch")
        assert normalized[loss_mask].double().mean().item() == pytest.approx(0, abs=1e-6)
        assert normalized[loss_mask].double().std().item() == pytest.approx(1, abs=1e-5)
        assert normalized[~loss_mask].abs().max().item() == 0.0


class TestClipAdvantages:
    def test_clamps_both_sides(self):
        clipped = clip_advantages(torch.tensor([-9.0, -1.0, 0.0, 2.0, 9.0]), [-1.5, 2.5])
        assert clipped.tolist() == [-1.5, -1.0, 0.0, 2.0, 2.5]

    def test_none_keeps_values(self):
        assert clip_advantages(torch.tensor([-9.0, 9.0]), None).tolist() == [-9.0, 9.0]

    def test_bounds_are_in_units_of_the_normalised_advantages(self):
        # normalise, then clip: [1, 1, -3, 5] -> +-1.2247 (derived above) -> +-1. The other order gives +-1 from
        # [1, 1, -1, 1]: mean 0.5, variance 1, so -1.5 and 0.5.
        advantages = torch.tensor([1.0, 1.0, -3.0, 5.0])
        clipped = clip_advantages(normalize_advantages(advantages, all_true(advantages), "batch"), [-1.0, 1.0])
        torch.testing.assert_close(clipped, torch.tensor([0.0, 0.0, -1.0, 1.0]))

    @pytest.mark.parametrize("clipping", [[1.0], [], [-1.0, 0.0, 1.0], [1.0, -1.0], [2.0, 2.0], [-math.inf, 1.0],
                                          [math.nan, 1.0], ["-1", "1"], "-1"])  # fmt: skip
    def test_bad_bounds_are_refused(self, clipping):
        with pytest.raises(ValueError, match=r"two finite numbers.*--advantage_clipping"):
            validate_clipping(clipping)

    @pytest.mark.parametrize("clipping", [None, [-5.0, 5.0], (0, 1), [-3, -1.5]])
    def test_good_bounds_pass(self, clipping):
        validate_clipping(clipping)
