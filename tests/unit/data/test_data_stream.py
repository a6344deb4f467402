"""Advantages, dealing and metrics of rollouts. The stream over the real API: tests/protocol/test_stream.py."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import streams
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.data.micro_batches import MicroBatch
from trl_atropos.data.sources import FetchedBatch
from trl_atropos.data.steps import with_advantages
from trl_atropos.data.stream import RolloutStream
from trl_atropos.errors import AtroposProtocolError
from trl_atropos.loss.metrics import MetricAccumulator
from trl_atropos.report.metric_help import METRICS
from trl_atropos.types import Position, Rollout, RolloutGroup, ServedCall
from trl_atropos.wire.journal import Journal
from trl_atropos.wire.rollout_key import rollout_key


def rollout(length: int = 4, reward: float = 0.0, first_id: int = 10, **fields: Any) -> Rollout:
    """Tokens first_id, first_id + 1, ...; the first half is prompt."""
    input_ids = torch.arange(first_id, first_id + length)
    labels = input_ids.masked_fill(torch.arange(length) < length // 2, -100)
    return Rollout(input_ids=input_ids, labels=labels, reward=reward, **fields)


def wire_group(lengths: list[int], first_id: int = 10, **fields: Any) -> dict[str, Any]:
    tokens = [list(range(first_id, first_id + length)) for length in lengths]
    return {
        "tokens": tokens,
        "masks": [[-100, *ids[1:]] for ids in tokens],
        "scores": [float(i) for i in range(len(lengths))],
        "inference_logprobs": [[1.0, *[-0.5] * (len(ids) - 1)] for ids in tokens],
        **fields,
    }


def make_stream(batches: Iterable[list[dict]], **options: Any) -> RolloutStream:
    """The stream over batches that have arrived."""
    return streams.make_stream(
        lambda: (
            FetchedBatch(Position(number, 0), raw_groups, Position(number + 1, 0))
            for number, raw_groups in enumerate(batches)
        ),
        **options,
    )


def take_step(stream: RolloutStream) -> list[MicroBatch]:
    """This rank's micro-batches of the first step, without a token budget: each is an item of the stream."""
    dealer = stream.dealer
    per_rank = dealer.batch_size // dealer.micro_batch_size // dealer.world_size
    iterator = iter(stream)
    items = [next(iterator) for _ in range(per_rank)]
    assert [len(item) for item in items] == [1] * per_rank
    return [item[0] for item in items]


def reported(stream: RolloutStream) -> dict[str, float]:
    accumulator = MetricAccumulator()
    accumulator.update(stream.pop_metrics())
    return accumulator.reduce()


class TestWithAdvantages:
    def test_rewards_become_advantages_at_trained_tokens_only(self):
        group = RolloutGroup((rollout(4, reward=1.0), rollout(6, reward=4.0)))
        # mean (1 + 4) / 2 = 2.5; scale none: 1 - 2.5 and 4 - 2.5
        first, second = with_advantages([group], "none")
        assert first.advantages.tolist() == [0.0, 0.0, -1.5, -1.5]
        assert second.advantages.tolist() == [0.0, 0.0, 0.0, 1.5, 1.5, 1.5]

    def test_scale_group_divides_by_the_unbiased_standard_deviation_of_each_group(self):
        groups = [
            RolloutGroup((rollout(2, reward=1.0), rollout(2, reward=4.0))),
            RolloutGroup((rollout(2, reward=10.0), rollout(2, reward=20.0))),
        ]
        advantages = [r.advantages[1].item() for r in with_advantages(groups, "group")]
        # std of (1, 4) = sqrt(((-1.5)^2 + 1.5^2) / 1) = sqrt(4.5), of (10, 20) = sqrt(50); plus 1e-4 as in TRL
        narrow, wide = 1.5 / (math.sqrt(4.5) + 1e-4), 5 / (math.sqrt(50) + 1e-4)
        assert advantages == pytest.approx([-narrow, narrow, -wide, wide], rel=1e-6)

    def test_scale_batch_centres_in_the_group_and_divides_by_the_standard_deviation_of_all_rewards(self):
        groups = [
            RolloutGroup((rollout(2, reward=0.0), rollout(2, reward=2.0))),
            RolloutGroup((rollout(2, reward=4.0), rollout(2, reward=10.0))),
        ]
        advantages = [r.advantages[1].item() for r in with_advantages(groups, "batch")]
        # Group means 1 and 7. All rewards: mean 4, squared deviations 16 + 4 + 0 + 36 = 56, std sqrt(56 / 3).
        divisor = math.sqrt(56 / 3) + 1e-4
        assert advantages == pytest.approx([-1 / divisor, 1 / divisor, -3 / divisor, 3 / divisor], rel=1e-6)

    def test_scale_batch_counts_the_rewards_of_rollouts_that_brought_advantages(self):
        sent = torch.tensor([0.0, 0.0, 7.0, -3.0])
        group = RolloutGroup((rollout(reward=9.0, advantages=sent), rollout(reward=1.0)))
        first, second = with_advantages([group], "batch")
        assert first.advantages is sent
        # mean 5; std of (9, 1) = sqrt(16 + 16)
        assert second.advantages[2].item() == pytest.approx(-4 / (math.sqrt(32) + 1e-4), rel=1e-6)

    def test_scale_batch_of_a_single_rollout_and_of_equal_rewards_is_0(self):
        assert with_advantages([RolloutGroup((rollout(reward=5.0),))], "batch")[0].advantages.tolist() == [0.0] * 4
        equal = RolloutGroup((rollout(reward=0.1), rollout(reward=0.1), rollout(reward=0.1)))
        assert not any(r.advantages.any() for r in with_advantages([equal, equal], "batch"))

    def test_advantages_of_the_wire_win_and_count_no_reward(self):
        sent = torch.tensor([0.0, 0.0, 7.0, -3.0])
        group = RolloutGroup((rollout(reward=9.0, advantages=sent), rollout(reward=1.0)))
        first, second = with_advantages([group], "none")
        assert first.advantages is sent
        # Its reward still counts in the mean of its group: (9 + 1) / 2 = 5, and 1 - 5 = -4.
        assert second.advantages.tolist() == [0.0, 0.0, -4.0, -4.0]

    def test_set_advantage_to_zero_counts_in_the_mean_of_its_group(self):
        group = RolloutGroup((rollout(reward=8.0, set_advantage_to_zero=True), rollout(reward=0.0)))
        # The step sets it to 0 after normalisation; here the rollout still has the advantage 8 - 4.
        first, second = with_advantages([group], "none")
        assert first.set_advantage_to_zero
        assert first.advantages.tolist() == [0.0, 0.0, 4.0, 4.0]
        assert second.advantages.tolist() == [0.0, 0.0, -4.0, -4.0]

    def test_a_group_of_one_pushes_nowhere(self):
        (only,) = with_advantages([RolloutGroup((rollout(reward=5.0),))], "group")
        assert only.advantages.tolist() == [0.0] * 4

    def test_with_the_baseline_of_the_batch_groups_of_one_are_compared_with_each_other(self):
        groups = [RolloutGroup((rollout(reward=reward),)) for reward in (1.0, 2.0, 6.0)]
        # mean 3; deviations -2, -1, 3; unbiased variance 7
        expected = [value / (7**0.5 + 1e-4) for value in (-2.0, -1.0, 3.0)]
        found = [r.advantages[-1].item() for r in with_advantages(groups, "batch", "batch")]
        assert found == pytest.approx(expected)

    def test_rollouts_come_group_after_group(self):
        groups = [RolloutGroup((rollout(2), rollout(3))), RolloutGroup((rollout(5), rollout(4), rollout(6)))]
        assert [r.num_tokens for r in with_advantages(groups, "group")] == [2, 3, 5, 4, 6]


class TestDealing:
    def test_groups_stay_together_longest_first_and_neighbours_on_different_ranks(self):
        batches = [[wire_group([3, 9, 5, 2]), wire_group([8, 4, 7, 6], first_id=40)]]
        dealt = [take_step(make_stream(batches, batch_size=8, rank=rank, world_size=2)) for rank in range(2)]
        # 9 5 | 3 2 of the first group, then 8 7 | 6 4; micro-batches go to ranks 0 1 0 1.
        assert [[[r.num_tokens for r in batch] for batch in batches_of_rank] for batches_of_rank in dealt] == [
            [[9, 5], [8, 7]],
            [[3, 2], [6, 4]],
        ]

    @settings(max_examples=50, deadline=None)
    @given(
        lengths=st.lists(st.integers(2, 20), min_size=1, max_size=24),
        world_size=st.integers(1, 3),
        micro_batch_size=st.integers(1, 4),
        data=st.data(),
    )
    def test_every_rollout_exactly_once_and_equally_many_micro_batches(
        self, lengths, world_size, micro_batch_size, data
    ):
        slots = world_size * micro_batch_size
        accumulation = data.draw(st.integers(-(-len(lengths) // slots), 1 + -(-len(lengths) // slots)))
        # Ids tell the rollouts apart.
        group = wire_group(lengths)
        group["tokens"] = [[i, *ids[1:]] for i, ids in enumerate(group["tokens"])]
        group["masks"] = [[-100, *ids[1:]] for ids in group["tokens"]]
        changes = {"batch_size": slots * accumulation, "micro_batch_size": micro_batch_size, "world_size": world_size}
        dealt = [take_step(make_stream([[group]], rank=rank, **changes)) for rank in range(world_size)]

        assert {len(batches) for batches in dealt} == {accumulation}
        assert all(len(batch) <= micro_batch_size for batches in dealt for batch in batches)
        seen = [r.input_ids[0].item() for batches in dealt for batch in batches for r in batch]
        assert sorted(seen) == list(range(len(lengths)))

    def test_fewer_rollouts_than_slots_leave_the_last_micro_batches_short_or_empty(self):
        first, second = take_step(make_stream([[wire_group([5])]]))
        assert [len(first), len(second)] == [1, 0]

    def test_the_next_step_follows_on_the_last_micro_batch(self):
        stream = make_stream([[wire_group([4, 3, 3, 2])], [wire_group([9, 8, 7, 6])]])
        iterator = iter(stream)
        lengths = [[[r.num_tokens for r in micro_batch] for micro_batch in next(iterator)] for _ in range(4)]
        assert lengths == [[[4, 3]], [[3, 2]], [[9, 8]], [[7, 6]]]
        # 4 + 3 + 3 + 2 + 9 + 8 + 7 + 6 tokens
        assert (stream.num_tokens, stream.num_rollouts_trained, stream.num_rollouts_dropped) == (42, 8, 0)

    def test_with_a_token_budget_an_item_is_the_whole_step(self):
        stream = make_stream(
            [[wire_group([9, 8, 7, 6])], [wire_group([5, 4, 3, 2])]],
            layout=lambda: "packed",
            max_tokens_per_micro_batch=16,
        )
        iterator = iter(stream)
        first, second = next(iterator), next(iterator)
        # 9 + 8 + 7 + 6 = 30 > 16, so two forward passes of 15: 9 + 6 and 8 + 7. 5 + 4 + 3 + 2 = 14 fits into one.
        assert [sorted(r.num_tokens for r in micro_batch) for micro_batch in first] == [[6, 9], [7, 8]]
        assert [[r.num_tokens for r in micro_batch] for micro_batch in second] == [[5, 4, 3, 2]]
        assert (stream.num_tokens, stream.num_rollouts_trained) == (44, 8)

    def test_every_rank_gets_as_many_micro_batches_under_a_token_budget(self):
        batches = [[wire_group([20, 2, 2, 2])]]
        options = {"layout": lambda: "packed", "max_tokens_per_micro_batch": 20, "world_size": 2}
        dealt = [next(iter(make_stream(batches, rank=rank, **options))) for rank in range(2)]
        assert [[[r.num_tokens for r in batch] for batch in batches] for batches in dealt] == [[[20]], [[2, 2, 2]]]

    @pytest.mark.parametrize(("layout", "num_micro_batches"), [("tree", 1), ("packed", 4), ("padded", 4)])
    def test_the_layout_decides_what_a_group_costs_of_the_budget(self, layout, num_micro_batches):
        # One chain: each rollout is a prefix of the longest, 10 positions in a tree, 10 + 9 + 8 + 7 otherwise.
        stream = make_stream([[wire_group([10, 9, 8, 7])]], layout=lambda: layout, max_tokens_per_micro_batch=10)
        assert len(next(iter(stream))) == num_micro_batches

    def test_the_layout_is_asked_when_a_batch_is_dealt_not_before(self):
        asked: list[str] = []

        def layout() -> str:
            asked.append("tree")
            return "tree"

        iterator = iter(make_stream([[wire_group([4, 3])]] * 2, layout=layout, max_tokens_per_micro_batch=10))
        assert asked == []
        next(iterator)
        assert asked == ["tree"]


class TestMetrics:
    def test_reward_length_and_logprob_metrics(self):
        # Rewards 0, 1 | 2, 2: mean 5/4; std sqrt(0.5) and 0, mean sqrt(0.5)/2; one of two groups is a tie.
        tied = wire_group([5, 3], scores=[2.0, 2.0], inference_logprobs=None)
        stream = make_stream([[wire_group([2, 4]), tied]])
        take_step(stream)
        metrics = reported(stream)
        assert {name for name in metrics if not name.startswith("env/")} <= METRICS.keys()
        assert metrics["reward"] == 1.25
        assert metrics["reward_std"] == pytest.approx(math.sqrt(0.5) / 2)
        assert metrics["frac_reward_zero_std"] == 0.5
        # All but the first token are trained: 1, 3, 4, 2.
        assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (1, 4)
        assert metrics["completions/mean_length"] == 2.5
        assert metrics["inference_logprobs/missing_frac"] == 0.5

    def test_metrics_are_handed_out_once_and_on_rank_0_only(self):
        stream = make_stream([[wire_group([2, 2, 2, 2])]])
        take_step(stream)
        assert reported(stream)["reward"] == 1.5
        assert reported(stream) == {}
        other = make_stream([[wire_group([2, 2, 2, 2])]], rank=1, world_size=2)
        take_step(other)
        assert reported(other) == {}

    def test_staleness_is_measured_when_the_batch_is_used(self):
        versions = {(10, 11): 3, (10, 11, 12): 5}
        table = {rollout_key(ids, 1): ServedCall(version) for ids, version in versions.items()}
        stream = make_stream(
            [[wire_group([2, 3])]], lookup=lambda keys: [table.get(key) for key in keys], policy_version=6
        )
        dealt = take_step(stream)
        # Longest first: 3 tokens sampled by version 5, then 2 tokens by version 3. Staleness 1 and 3.
        assert [r.policy_version for r in dealt[0]] == [5, 3]
        metrics = reported(stream)
        assert (metrics["staleness/mean"], metrics["staleness/max"], metrics["staleness/unknown_frac"]) == (2, 3, 0)

    def test_unknown_staleness_is_not_0_and_does_not_dilute_the_known(self):
        stream = make_stream([[wire_group([3, 2])]], lookup=lambda keys: [None, ServedCall(4)], policy_version=6)
        take_step(stream)
        metrics = reported(stream)
        assert (metrics["staleness/mean"], metrics["staleness/max"], metrics["staleness/unknown_frac"]) == (2, 2, 0.5)

    def test_environments_that_sample_from_another_distribution_are_named_once_each(self, caplog):
        def batches() -> Any:
            for env_id in (3, 3, 4):
                yield [wire_group([3, 2], env_id=env_id)]

        nucleus = [ServedCall(6, ("top_p",)), ServedCall(6)]
        progress = streams.Trainer(lambda: 6)
        stream = make_stream(batches(), lookup=lambda keys: nucleus, progress=progress, batch_size=2)
        with caplog.at_level(logging.WARNING):
            fractions = [reported(stream)["sampling/other_distribution_frac"] for _ in stream]
        assert fractions == [0.5, 0.5, 0.5]
        told = [message for message in caplog.messages if "another distribution" in message]
        assert ["environment 4" in message for message in told] == [False, True]
        assert all("environment 3 with top_p" in message for message in told)

    def test_a_server_that_knows_no_versions_reports_no_staleness(self):
        stream = make_stream([[wire_group([3, 2])]], policy_version=6)
        dealt = take_step(stream)
        metrics = reported(stream)
        assert dealt[0][0].policy_version is None
        assert metrics["staleness/unknown_frac"] == 1
        assert not {"staleness/mean", "staleness/max"} & metrics.keys()


class TestMissingLogprobs:
    BATCH = (wire_group([2, 2]), wire_group([2, 3], env_id=7, inference_logprobs=[[1.0, -0.5], [1.0, -0.5, 1.0]]))

    def test_the_error_names_group_environment_and_rollout_and_the_ways_out(self):
        stream = make_stream([list(self.BATCH)], required_logprobs=("inference_logprobs",))
        with pytest.raises(AtroposProtocolError) as caught:
            take_step(stream)
        assert caught.value.what == (
            "The rollout of environment 7, group 1, rollout 1 has no complete `inference_logprobs`."
        )
        assert "every trained token" in caught.value.why
        for way_out in ("ManagedServer", "--inference_logprobs use", "--loss_type weighted_sft"):
            assert way_out in caught.value.fix

    def test_without_the_requirement_the_batch_is_trained(self):
        first, _ = take_step(make_stream([list(self.BATCH)]))
        assert first[0].inference_logprobs is None
        assert first[0].num_tokens == 3

    def test_required_ref_logprobs_are_asked_for_after_the_inference_logprobs_of_all_groups(self):
        stream = make_stream(
            [[wire_group([2, 3], env_id=4)]], required_logprobs=("inference_logprobs", "ref_logprobs")
        )
        with pytest.raises(AtroposProtocolError) as caught:
            take_step(stream)
        assert caught.value.what == "The rollout of environment 4, group 0, rollout 0 has no complete `ref_logprobs`."
        assert "ref_logprobs=require" in caught.value.why
        assert "--ref_logprobs recompute" in caught.value.fix

    def test_ref_logprobs_of_the_wire_satisfy_the_requirement(self):
        group = wire_group([2, 3], ref_logprobs=[[0.0, -1.0], [0.0, -2.0, -3.0]])
        first, _ = take_step(make_stream([[group]], required_logprobs=("ref_logprobs",)))
        assert [r.ref_logprobs[1:].tolist() for r in first] == [[-2.0, -3.0], [-1.0]]


class TestTruncatedCompletions:
    # Tokens 10, 11, ...: a rollout of 4 ends with 13, one of 5 with 14.
    WARNING = "no rollout of this batch ends with an end-of-sequence token"

    def test_rollouts_that_end_without_eos_are_not_trained(self, caplog):
        stream = make_stream(
            [[wire_group([4, 5, 6, 3])]], eos_token_ids=frozenset({13, 12}), mask_truncated_completions=True
        )
        dealt = {r.num_tokens: r for micro_batch in take_step(stream) for r in micro_batch}
        assert {length: r.num_trained_tokens for length, r in dealt.items()} == {6: 0, 5: 0, 4: 3, 3: 2}
        assert dealt[5].labels.tolist() == [-100] * 5
        assert dealt[4].labels.tolist() == [-100, 11, 12, 13]
        assert reported(stream)["completions/clipped_ratio"] == 0.5
        assert self.WARNING not in caplog.text

    def test_their_reward_still_counts_in_the_mean_of_the_group(self):
        stream = make_stream(
            [[wire_group([4, 5], scores=[0.0, 8.0])]], eos_token_ids=frozenset({13}), mask_truncated_completions=True
        )
        dealt = {r.num_tokens: r for micro_batch in take_step(stream) for r in micro_batch}
        # 0 - (0 + 8) / 2
        assert dealt[4].advantages.tolist() == [0.0, -4.0, -4.0, -4.0]

    def test_a_rollout_that_ends_with_an_untrained_turn_is_not_truncated(self):
        group = wire_group([4, 4])
        group["masks"] = [[-100, 11, 12, -100], [-100, 11, 12, 13]]
        stream = make_stream([[group]], eos_token_ids=frozenset({99}), mask_truncated_completions=True)
        trained = sorted(r.num_trained_tokens for micro_batch in take_step(stream) for r in micro_batch)
        assert trained == [0, 2]
        assert reported(stream)["completions/clipped_ratio"] == 0.5

    def test_a_batch_of_truncated_rollouts_only_says_what_the_usual_cause_is(self, caplog):
        stream = make_stream([[wire_group([4, 5])]], eos_token_ids=frozenset({2}), mask_truncated_completions=True)
        with caplog.at_level(logging.WARNING):
            dealt = take_step(stream)
        assert [r.num_trained_tokens for micro_batch in dealt for r in micro_batch] == [0, 0]
        assert self.WARNING in caplog.text
        assert "--mask_truncated_completions false" in caplog.text
        assert reported(stream)["completions/clipped_ratio"] == 1.0

    def test_without_the_option_all_are_trained_and_the_share_is_reported(self):
        stream = make_stream([[wire_group([4, 5])]], eos_token_ids=frozenset({13}))
        assert [r.num_trained_tokens for micro_batch in take_step(stream) for r in micro_batch] == [4, 3]
        assert reported(stream)["completions/clipped_ratio"] == 0.5

    def test_without_known_ends_nothing_is_reported(self):
        stream = make_stream([[wire_group([4, 5])]])
        take_step(stream)
        assert "completions/clipped_ratio" not in reported(stream)


class TestStaleness:
    """Groups of two rollouts: their ids begin with 10, 40, ...; the table says which policy sampled them."""

    @staticmethod
    def lookup_by_first_id(table: dict[int, int], groups: list[dict]) -> Any:
        calls = {
            rollout_key(ids, 1): ServedCall(table[ids[0]]) if ids[0] in table else None
            for group in groups
            for ids in group["tokens"]
        }
        return lambda keys: [calls[key] for key in keys]

    def stream(self, groups: list[dict], table: dict[int, int], **changes: Any) -> RolloutStream:
        return make_stream([groups], lookup=self.lookup_by_first_id(table, groups), policy_version=6, **changes)

    def test_groups_above_the_limit_are_dropped_whole_and_reported_with_their_lengths(self, tmp_path: Path):
        groups = [wire_group([3, 4]), wire_group([6, 8], first_id=40)]
        journal = Journal(tmp_path / "journal")
        stream = self.stream(groups, {10: 5, 40: 3}, max_staleness=2, journal=journal)
        dealt = take_step(stream)
        assert [r.num_tokens for micro_batch in dealt for r in micro_batch] == [4, 3]
        assert [(mark["batch"], mark["groups"], mark["reason"]) for mark in journal.marks("dropped")] == [
            (0, [1], "stale")
        ]
        assert (stream.num_rollouts_trained, stream.num_rollouts_dropped) == (2, 2)
        metrics = reported(stream)
        # 5 and 7 trained tokens
        assert (metrics["staleness/num_dropped"], metrics["staleness/dropped_mean_length"]) == (2, 6)
        assert metrics["staleness/max"] == 1

    def test_a_group_is_as_stale_as_its_stalest_rollout(self):
        group = wire_group([3, 4])
        group["tokens"][1][0] = 50
        stream = self.stream([group, wire_group([2, 2], first_id=70)], {10: 6, 50: 3, 70: 6}, max_staleness=2)
        assert [r.input_ids[0].item() for micro_batch in take_step(stream) for r in micro_batch] == [70, 70]

    def test_down_weighted_groups_are_trained_with_less(self):
        groups = [wire_group([3, 4]), wire_group([6, 8], first_id=40)]
        stream = self.stream(groups, {10: 5, 40: 1}, max_staleness=1, stale_rollouts="downweight")
        scales = {r.num_tokens: r.advantage_scale for micro_batch in take_step(stream) for r in micro_batch}
        # (1 + 1) / (5 + 1) for staleness 5
        assert scales == {3: 1.0, 4: 1.0, 6: pytest.approx(1 / 3), 8: pytest.approx(1 / 3)}
        assert reported(stream)["staleness/downweighted_frac"] == 0.5

    def test_a_batch_that_is_dropped_as_a_whole_is_followed_by_the_next_one(self):
        batches = [[wire_group([3, 3])], [wire_group([5, 5], first_id=40)]]
        progress = streams.Trainer(lambda: 6)
        stream = make_stream(
            batches,
            lookup=self.lookup_by_first_id({10: 1, 40: 6}, [group for batch in batches for group in batch]),
            progress=progress,
            max_staleness=2,
        )
        assert [r.num_tokens for micro_batch in take_step(stream) for r in micro_batch] == [5, 5]
        progress.global_step = 1
        assert stream.position == Position(2, 0)
        assert (stream.num_rollouts_trained, stream.num_rollouts_dropped) == (2, 2)

    def test_what_was_fetched_ahead_is_judged_by_the_policy_that_trains_it(self):
        version = [0]
        batches = [[wire_group([2, 2])], [wire_group([3, 3])]]
        stream = make_stream(
            batches,
            policy_version=lambda: version[0],
            max_staleness=1,
            num_prefetched_batches=1,
            batch_size=2,
            num_steps=2,
        )
        iterator = iter(stream)
        next(iterator)
        assert wait_for(lambda: stream._steps._prefetcher._pending.done())
        # Two publishes later: the versions are unknown, but not later than that of the fetch, 0.
        version[0] = 2
        with pytest.raises(StopIteration):
            next(iterator)
        assert stream.num_rollouts_dropped == 0  # the data ended before the step

    def test_without_a_limit_everything_is_trained(self):
        stream = self.stream([wire_group([3, 4])], {10: 0})
        assert [r.advantage_scale for r in take_step(stream)[0]] == [1.0, 1.0]
        assert reported(stream)["staleness/max"] == 6


class TestPrefetching:
    def batches(self, taken: list[int]) -> Any:
        for number in range(5):
            taken.append(number)
            yield [wire_group([2, 2, 2, 2])]

    def test_the_next_batch_is_fetched_while_this_one_is_trained_and_none_beyond_the_last_step(self):
        taken: list[int] = []
        stream = make_stream(self.batches(taken), num_prefetched_batches=1, num_steps=2, micro_batch_size=4)
        iterator = iter(stream)
        next(iterator)
        assert wait_for(lambda: taken == [0, 1])
        next(iterator)
        time.sleep(0.1)
        assert taken == [0, 1]

    def test_nothing_is_fetched_ahead_if_not_asked_for(self):
        taken: list[int] = []
        iterator = iter(make_stream(self.batches(taken), micro_batch_size=4))
        next(iterator)
        time.sleep(0.1)
        assert taken == [0]

    def test_an_error_of_the_source_is_raised_by_the_step_that_needs_the_batch(self):
        def batches() -> Any:
            yield [wire_group([2, 2, 2, 2])]
            raise AtroposProtocolError("The wire broke.", "It does.", "Mend it.")

        stream = make_stream(batches(), num_prefetched_batches=1, micro_batch_size=4)
        iterator = iter(stream)
        assert len(next(iterator)[0]) == 4
        with pytest.raises(AtroposProtocolError, match="The wire broke"):
            next(iterator)


def test_the_stream_ends_with_its_data():
    progress = streams.Trainer()
    stream = make_stream([[wire_group([2, 2, 2, 2])]], micro_batch_size=4, progress=progress)
    iterator = iter(stream)
    next(iterator)
    progress.global_step = 1
    assert list(iterator) == []
    assert stream.position == Position(1, 0)


def test_a_checkpoint_holds_what_was_trained_and_not_what_was_handed_out():
    batches = [[wire_group([2, 2, 2, 2])], [wire_group([3, 3]), wire_group([3, 3], scores=[None, 1.0])]]
    progress = streams.Trainer()
    stream = make_stream(batches, micro_batch_size=4, progress=progress, max_dropped_fraction=0.5)
    states = []
    for _ in stream:
        # As for a checkpoint that a signal asks for before the optimizer's step.
        states.append(stream.state_dict())
        progress.global_step += 1
        states.append(stream.state_dict())
    keys = ("next_batch", "num_rollouts_trained", "num_rollouts_dropped", "num_quarantined")
    found = [tuple(state.get(key, 0) for key in keys) for state in states]
    assert found == [(0, 0, 0, 0), (1, 4, 0, 0), (1, 4, 0, 0), (2, 6, 2, 1)]


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()
