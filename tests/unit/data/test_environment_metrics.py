"""Metrics of a step, whole and taken apart by environment."""

from __future__ import annotations

import math

import pytest
import torch

from trl_atropos.data.environment_metrics import EnvironmentMetrics, environment_name
from trl_atropos.data.rollout_metrics import are_truncated, dropped_metrics, rollout_metrics
from trl_atropos.errors import AtroposProtocolError
from trl_atropos.loss.metrics import Metric, MetricAccumulator
from trl_atropos.report.metric_help import ENVIRONMENT_METRICS, METRICS
from trl_atropos.types import RejectedGroup, Rollout, RolloutGroup


EOS = 9
EOS_IDS = frozenset({EOS})


def rollout(length: int = 3, *, reward: float = 0.0, last: int = EOS, version: int | None = None) -> Rollout:
    """One prompt token, then `length` trained ones."""
    ids = torch.tensor([1, *[5] * (length - 1), last])
    labels = ids.clone()
    labels[0] = -100
    return Rollout(ids, labels, reward, policy_version=version)


def group(env_id: int | None, *rewards: float, length: int = 3) -> RolloutGroup:
    return RolloutGroup(tuple(rollout(length, reward=reward) for reward in rewards), env_id)


def rejected(env_id: int | None, num_rollouts: int) -> RejectedGroup:
    return RejectedGroup(
        0, env_id, num_rollouts, AtroposProtocolError("It is bad.", "It cannot be trained.", "Mend it.")
    )


def values(*steps: dict[str, Metric]) -> dict[str, float]:
    accumulator = MetricAccumulator()
    for step in steps:
        accumulator.update(step)
    return accumulator.reduce()


def step(
    metrics: EnvironmentMetrics,
    *groups: RolloutGroup,
    refused: tuple[RejectedGroup, ...] = (),
    stale: tuple[RolloutGroup, ...] = (),
    policy_version: int = 0,
    eos_token_ids: frozenset[int] | None = EOS_IDS,
    fetched_ago_s: float | None = None,
) -> dict[str, Metric]:
    return metrics.of_step(
        groups,
        refused,
        stale,
        policy_version=policy_version,
        eos_token_ids=eos_token_ids,
        fetched_ago_s=fetched_ago_s,
    )


class TestNames:
    @pytest.mark.parametrize(
        ("env_id", "names", "expected"),
        [
            (0, ["math", "code"], "math"),
            (1, ["math", "code"], "code"),
            (2, ["math", "code"], "env_2"),
            (0, None, "env_0"),
            # Not the last of the list, as Python would have it.
            (-1, ["math", "code"], "env_-1"),
            (None, ["math"], "env_unknown"),
        ],
    )
    def test_an_environment_is_named_by_its_number(self, env_id, names, expected):
        assert environment_name(env_id, names) == expected


class TestOfStep:
    def test_each_environment_has_its_own_rewards_lengths_and_share(self):
        groups = [group(0, 0.0, 1.0, length=2), group(0, 2.0, 2.0, length=4), group(1, 5.0, 5.0, length=7)]
        found = values(step(EnvironmentMetrics(["math"]), *groups))
        # math: rewards 0 1 2 2, standard deviations sqrt(0.5) and 0, one tie of two groups, lengths 2 2 4 4, 4 of 6 rollouts.
        assert found["env/math/reward"] == 1.25
        assert found["env/math/reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
        assert found["env/math/frac_reward_zero_std"] == 0.5
        assert found["env/math/completions/mean_length"] == 3
        assert found["env/math/batch_frac"] == pytest.approx(4 / 6)
        assert found["env/env_1/reward"] == 5
        assert found["env/env_1/frac_reward_zero_std"] == 1
        assert found["env/env_1/completions/mean_length"] == 7
        assert found["env/env_1/batch_frac"] == pytest.approx(2 / 6)

    def test_the_names_behind_the_environment_are_those_of_the_table(self):
        groups = [RolloutGroup((rollout(version=1),), 0)]
        found = values(step(EnvironmentMetrics(None), *groups, policy_version=2, fetched_ago_s=1.0))
        assert {name.removeprefix("env/env_0/") for name in found} == set(ENVIRONMENT_METRICS)

    def test_a_step_of_one_environment_has_the_numbers_of_the_whole_step(self):
        groups = [
            RolloutGroup((rollout(2, reward=1.0, last=5, version=1), rollout(4, reward=3.0, version=2)), 0),
            RolloutGroup((rollout(5, reward=0.5), rollout(3, reward=0.5, last=5)), 0),
        ]
        whole = values(rollout_metrics(groups, 4, EOS_IDS))
        found = values(step(EnvironmentMetrics(["math"]), *groups, policy_version=4))
        names = (
            "reward",
            "reward_std",
            "frac_reward_zero_std",
            "completions/mean_length",
            "completions/clipped_ratio",
        )
        assert {name: found[f"env/math/{name}"] for name in names} == {name: whole[name] for name in names}
        # Versions 1 and 2 of 4: staleness 3 and 2; the other two are unknown.
        assert found["env/math/staleness"] == whole["staleness/mean"] == 2.5
        assert found["env/math/batch_frac"] == 1

    def test_the_share_of_truncated_rollouts_needs_the_tokens_that_end_a_completion(self):
        groups = [RolloutGroup((rollout(), rollout(last=5), rollout(last=6), rollout()), 0)]
        assert values(step(EnvironmentMetrics(None), *groups))["env/env_0/completions/clipped_ratio"] == 0.5
        unknown = values(step(EnvironmentMetrics(None), *groups, eos_token_ids=None))
        assert "env/env_0/completions/clipped_ratio" not in unknown

    def test_refused_and_stale_rollouts_count_for_their_environment(self):
        found = values(
            step(
                EnvironmentMetrics(["math", "code"]),
                group(0, 1.0, 2.0),
                refused=(rejected(1, 4), rejected(None, 3)),
                stale=(group(1, 0.0, 0.0), group(0, 1.0)),
            )
        )
        # code: 4 refused, 2 stale.
        assert found["env/math/num_dropped"] == 1
        assert found["env/code/num_dropped"] == 6
        assert found["env/env_unknown/num_dropped"] == 3

    def test_age_is_that_of_environments_with_groups_in_the_step(self):
        found = values(step(EnvironmentMetrics(["math", "code"]), group(1, 1.0), fetched_ago_s=2.5))
        assert found["env/code/age_s"] == 2.5
        assert "env/math/age_s" not in found

    def test_an_environment_whose_groups_are_all_dropped_has_a_share_of_0_and_no_reward(self):
        found = values(step(EnvironmentMetrics(None), group(0, 1.0), stale=(group(3, 5.0),)))
        assert found["env/env_3/batch_frac"] == 0
        assert found["env/env_3/num_dropped"] == 1
        assert "env/env_3/reward" not in found

    def test_two_environments_with_one_name_are_reported_together(self):
        found = values(step(EnvironmentMetrics(["math", "math"]), group(0, 1.0), group(1, 3.0), group(2, 9.0)))
        assert found["env/math/reward"] == 2
        assert found["env/math/batch_frac"] == pytest.approx(2 / 3)


class TestSeveralSteps:
    def test_a_silent_environment_keeps_counting(self):
        metrics = EnvironmentMetrics(None)
        both = step(metrics, group(0, 1.0), group(1, 3.0))
        one = step(metrics, group(0, 1.0), group(0, 1.0))
        # 1 of 2 rollouts, then 0 of 2.
        assert values(both, one)["env/env_1/batch_frac"] == 0.25
        assert values(both, one)["env/env_1/reward"] == 3

    def test_a_named_environment_that_never_sent_anything_shows(self):
        found = values(step(EnvironmentMetrics(["math", "code"]), group(0, 1.0)))
        assert {name: value for name, value in found.items() if name.startswith("env/code/")} == {
            "env/code/batch_frac": 0,
            "env/code/num_dropped": 0,
        }

    def test_dropped_rollouts_are_a_mean_over_steps_those_without_included(self):
        metrics = EnvironmentMetrics(["math"])
        steps = [step(metrics, group(0, 1.0), refused=(rejected(0, 4),)), step(metrics, group(0, 1.0))]
        assert values(*steps)["env/math/num_dropped"] == 2

    def test_means_weigh_rollouts_not_steps(self):
        metrics = EnvironmentMetrics(None)
        steps = [step(metrics, group(0, 0.0, 0.0, 0.0)), step(metrics, group(0, 4.0))]
        # (0 + 0 + 0 + 4) / 4; the mean of the means would be 2
        assert values(*steps)["env/env_0/reward"] == 1


class TestOverall:
    def test_names_are_those_of_the_table(self):
        metrics = rollout_metrics([group(0, 1.0)], 0, EOS_IDS) | dropped_metrics([group(0, 1.0)])
        assert metrics.keys() <= METRICS.keys()

    def test_no_groups_are_no_data(self):
        assert values(rollout_metrics([], 3, EOS_IDS)) == {}

    def test_equal_rewards_are_a_tie_whatever_their_standard_deviation_rounds_to(self):
        # 0.1 + 0.1 + 0.1 is not 0.3 in binary: the mean of three 0.1 is not 0.1, and the deviation not 0.
        assert values(rollout_metrics([group(0, 0.1, 0.1, 0.1)], 0, None))["frac_reward_zero_std"] == 1

    def test_staleness_is_a_distance_and_the_unknown_does_not_dilute_it(self):
        # After a resume rollouts may come from a later policy than the trainer's: 5 - 2 and 7 - 5.
        rollouts = (rollout(version=2), rollout(version=7), rollout(version=None))
        found = values(rollout_metrics([RolloutGroup(rollouts)], 5, None))
        assert (found["staleness/mean"], found["staleness/max"]) == (2.5, 3)
        assert found["staleness/unknown_frac"] == pytest.approx(1 / 3)

    def test_the_length_of_dropped_rollouts_is_reported(self):
        found = values(dropped_metrics([group(0, 1.0, 1.0, length=8), group(1, 1.0, length=2)]))
        assert found == {"staleness/num_dropped": 3, "staleness/dropped_mean_length": 6}

    def test_nothing_dropped_has_no_length(self):
        assert values(dropped_metrics([])) == {"staleness/num_dropped": 0}


class TestTruncated:
    def test_a_last_trained_token_that_ends_nothing_is_truncation(self):
        untrained = rollout()
        untrained.labels[-1] = -100
        rollouts = [rollout(), rollout(last=8), rollout(last=7), untrained]
        # 8 ends a completion, too; the last rollout ends with a turn of the environment.
        assert are_truncated(rollouts, frozenset({EOS, 8})).tolist() == [False, False, True, False]

    def test_no_rollouts(self):
        assert are_truncated([], EOS_IDS).tolist() == []
