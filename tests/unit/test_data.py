"""Advantages, dealing, metrics and collation of rollouts. The stream over the real API: tests/protocol/test_stream.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.data import RolloutCollator, RolloutStream, StreamSettings, with_advantages
from trl_atropos.errors import AtroposProtocolError
from trl_atropos.metrics import METRICS, MetricAccumulator
from trl_atropos.rollout_key import rollout_key
from trl_atropos.types import Rollout, RolloutGroup
from trl_atropos.validation import WireLimits


SETTINGS = StreamSettings(
    batch_size=4,
    micro_batch_size=2,
    rank=0,
    world_size=1,
    limits=WireLimits(vocab_size=100, max_length=32),
    scale_rewards="none",
    needs_inference_logprobs=False,
    max_dropped_fraction=0.0,
    batch_timeout_s=1.0,
    refresh_interval_s=0.1,
)


def rollout(length: int = 4, reward: float = 0.0, first_id: int = 10, **fields: Any) -> Rollout:
    """Tokens first_id, first_id + 1, ...; the first half is prompt."""
    input_ids = torch.arange(first_id, first_id + length)
    labels = input_ids.masked_fill(torch.arange(length) < length // 2, -100)
    return Rollout(input_ids=input_ids, labels=labels, reward=reward, **fields)


class FetchedBatches:
    """Plays the wire: batches that have arrived. Everything behind it is the real stream."""

    def __init__(self, batches: list[list[dict]]):
        self.batches = iter(batches)

    def wait_for_batch(self, timeout_s: float, **kwargs: Any) -> list[dict]:
        return next(self.batches)


def wire_group(lengths: list[int], first_id: int = 10, **fields: Any) -> dict[str, Any]:
    tokens = [list(range(first_id, first_id + length)) for length in lengths]
    return {
        "tokens": tokens,
        "masks": [[-100, *ids[1:]] for ids in tokens],
        "scores": [float(i) for i in range(len(lengths))],
        "inference_logprobs": [[1.0, *[-0.5] * (len(ids) - 1)] for ids in tokens],
        **fields,
    }


def make_stream(batches: list[list[dict]], lookup: Any = None, policy_version: int = 0, **changes: Any):
    return RolloutStream(
        client=FetchedBatches(batches),
        journal=None,
        settings=replace(SETTINGS, **changes),
        register=lambda: None,
        policy_version=lambda: policy_version,
        lookup_policy_versions=lookup,
    )


def take_step(stream: RolloutStream) -> list[list[Rollout]]:
    """This rank's micro-batches of the first step."""
    settings = stream.settings
    per_rank = settings.batch_size // settings.micro_batch_size // settings.world_size
    iterator = iter(stream)
    return [next(iterator) for _ in range(per_rank)]


def reported(stream: RolloutStream) -> dict[str, float]:
    accumulator = MetricAccumulator()
    accumulator.update(stream.pop_metrics())
    return accumulator.reduce()


class TestWithAdvantages:
    def test_rewards_become_advantages_at_trained_tokens_only(self):
        group = RolloutGroup((rollout(4, reward=1.0), rollout(6, reward=4.0)))
        # mean (1 + 4) / 2 = 2.5; scale none: 1 - 2.5 and 4 - 2.5
        first, second = with_advantages(group, "none")
        assert first.advantages.tolist() == [0.0, 0.0, -1.5, -1.5]
        assert second.advantages.tolist() == [0.0, 0.0, 0.0, 1.5, 1.5, 1.5]

    def test_scale_group_divides_by_the_unbiased_standard_deviation(self):
        group = RolloutGroup((rollout(2, reward=1.0), rollout(2, reward=4.0)))
        # std of (1, 4) = sqrt(((-1.5)^2 + 1.5^2) / 1) = sqrt(4.5), plus 1e-4 as in TRL
        first, second = with_advantages(group, "group")
        expected = 1.5 / (math.sqrt(4.5) + 1e-4)
        assert first.advantages[1].item() == pytest.approx(-expected, rel=1e-6)
        assert second.advantages[1].item() == pytest.approx(expected, rel=1e-6)

    def test_advantages_of_the_wire_win_and_count_no_reward(self):
        sent = torch.tensor([0.0, 0.0, 7.0, -3.0])
        group = RolloutGroup((rollout(reward=9.0, advantages=sent), rollout(reward=1.0)))
        first, second = with_advantages(group, "none")
        assert first.advantages is sent
        # Its reward still counts in the mean of its group: (9 + 1) / 2 = 5, and 1 - 5 = -4.
        assert second.advantages.tolist() == [0.0, 0.0, -4.0, -4.0]

    def test_set_advantage_to_zero_counts_in_the_mean_of_its_group(self):
        group = RolloutGroup((rollout(reward=8.0, set_advantage_to_zero=True), rollout(reward=0.0)))
        # The collator hands the flag on; here the rollout still has the advantage 8 - 4.
        first, second = with_advantages(group, "none")
        assert first.set_advantage_to_zero
        assert first.advantages.tolist() == [0.0, 0.0, 4.0, 4.0]
        assert second.advantages.tolist() == [0.0, 0.0, -4.0, -4.0]

    def test_a_group_of_one_pushes_nowhere(self):
        (only,) = with_advantages(RolloutGroup((rollout(reward=5.0),)), "group")
        assert only.advantages.tolist() == [0.0] * 4


class TestRolloutCollator:
    collate = RolloutCollator(pad_token_id=3, temperature=0.7)

    def test_shapes_dtypes_and_padding_on_the_right(self):
        first = rollout(2, advantages=torch.tensor([0.0, 2.0]), inference_logprobs=torch.tensor([math.nan, -0.5]))
        second = rollout(4, first_id=50, advantages=torch.tensor([0.0, 0.0, -1.0, -1.0]))
        batch = self.collate([first, second])

        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
            "input_ids": ((2, 4), torch.int64),
            "attention_mask": ((2, 4), torch.int64),
            "labels": ((2, 4), torch.int64),
            "advantages": ((2, 4), torch.float32),
            "inference_logprobs": ((2, 4), torch.float32),
            "temperature": ((2,), torch.float32),
            "zero_advantage": ((2,), torch.bool),
        }
        assert batch["input_ids"].tolist() == [[10, 11, 3, 3], [50, 51, 52, 53]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
        assert batch["labels"].tolist() == [[-100, 11, -100, -100], [-100, -100, 52, 53]]
        assert batch["advantages"].tolist() == [[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, -1.0, -1.0]]

    def test_unknown_inference_logprobs_are_nan_and_not_a_number(self):
        known = rollout(2, advantages=torch.zeros(2), inference_logprobs=torch.tensor([math.nan, -0.5]))
        unknown = rollout(3, advantages=torch.zeros(3))
        logprobs = self.collate([known, unknown])["inference_logprobs"]
        assert logprobs[0, 1].item() == -0.5
        assert logprobs.isnan().tolist() == [[True, False, True], [True, True, True]]

    def test_temperature_of_the_wire_wins_over_the_configured_one(self):
        batch = self.collate([rollout(advantages=torch.zeros(4), temperature=1.3), rollout(advantages=torch.zeros(4))])
        assert batch["temperature"].tolist() == pytest.approx([1.3, 0.7])

    def test_zero_advantage_is_handed_on_and_not_yet_applied(self):
        ones = torch.tensor([0.0, 0.0, 1.0, 1.0])
        batch = self.collate([rollout(advantages=ones, set_advantage_to_zero=True), rollout(advantages=ones)])
        assert batch["zero_advantage"].tolist() == [True, False]
        assert batch["advantages"].tolist() == [ones.tolist()] * 2

    def test_an_empty_micro_batch_trains_nothing_but_can_be_forwarded(self):
        batch = self.collate([])
        assert batch["input_ids"].tolist() == [[3, 3]]
        # A row that attends to nothing makes NaN in a softmax.
        assert batch["attention_mask"].tolist() == [[1, 1]]
        assert batch["labels"].tolist() == [[-100, -100]]
        assert batch["advantages"].tolist() == [[0.0, 0.0]]
        assert batch["temperature"].item() == pytest.approx(0.7)
        assert batch["zero_advantage"].tolist() == [False]

    def test_the_pad_token_may_be_a_trained_token(self):
        # Padding is known by the attention mask, never by its id: many models pad with EOS.
        eos = torch.tensor([3, 3])
        batch = self.collate(
            [
                Rollout(input_ids=eos, labels=torch.tensor([-100, 3]), reward=0.0, advantages=torch.ones(2)),
                rollout(3, advantages=torch.zeros(3)),
            ]
        )
        assert batch["labels"][0].tolist() == [-100, 3, -100]
        assert batch["attention_mask"][0].tolist() == [1, 1, 0]


class TestDealing:
    def test_longest_first_and_neighbours_on_different_ranks(self):
        lengths = [3, 9, 5, 2, 8, 4, 7, 6]
        batches = [[wire_group(lengths[:4]), wire_group(lengths[4:], first_id=40)]]
        dealt = [take_step(make_stream(batches, batch_size=8, rank=rank, world_size=2)) for rank in range(2)]
        # Sorted: 9 8 | 7 6 | 5 4 | 3 2; micro-batches go to ranks 0 1 0 1, so both work on like lengths together.
        assert [[[r.num_tokens for r in batch] for batch in batches_of_rank] for batches_of_rank in dealt] == [
            [[9, 8], [5, 4]],
            [[7, 6], [3, 2]],
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
        assert [[r.num_tokens for r in next(iterator)] for _ in range(4)] == [[4, 3], [3, 2], [9, 8], [7, 6]]
        # 4 + 3 + 3 + 2 + 9 + 8 + 7 + 6 tokens
        assert (stream.num_tokens, stream.num_rollouts_trained, stream.num_rollouts_dropped) == (42, 8, 0)


class TestMetrics:
    def test_reward_length_and_logprob_metrics(self):
        # Rewards 0, 1 | 2, 2: mean 5/4; std sqrt(0.5) and 0, mean sqrt(0.5)/2; one of two groups is a tie.
        tied = wire_group([5, 3], scores=[2.0, 2.0], inference_logprobs=None)
        stream = make_stream([[wire_group([2, 4]), tied]])
        take_step(stream)
        metrics = reported(stream)
        assert metrics.keys() <= METRICS.keys()
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
        table = {rollout_key(ids): version for ids, version in versions.items()}
        stream = make_stream(
            [[wire_group([2, 3])]], lookup=lambda keys: [table.get(key) for key in keys], policy_version=6
        )
        dealt = take_step(stream)
        # Longest first: 3 tokens sampled by version 5, then 2 tokens by version 3. Staleness 1 and 3.
        assert [r.policy_version for r in dealt[0]] == [5, 3]
        metrics = reported(stream)
        assert (metrics["staleness/mean"], metrics["staleness/max"], metrics["staleness/unknown_frac"]) == (2, 3, 0)

    def test_unknown_staleness_is_not_0_and_does_not_dilute_the_known(self):
        stream = make_stream([[wire_group([3, 2])]], lookup=lambda keys: [None, 4], policy_version=6)
        take_step(stream)
        metrics = reported(stream)
        assert (metrics["staleness/mean"], metrics["staleness/max"], metrics["staleness/unknown_frac"]) == (2, 2, 0.5)

    def test_a_server_that_knows_no_versions_reports_no_staleness(self):
        stream = make_stream([[wire_group([3, 2])]], policy_version=6)
        dealt = take_step(stream)
        metrics = reported(stream)
        assert dealt[0][0].policy_version is None
        assert metrics["staleness/unknown_frac"] == 1
        assert not {"staleness/mean", "staleness/max"} & metrics.keys()


class TestMissingInferenceLogprobs:
    BATCH = (wire_group([2, 2]), wire_group([2, 3], env_id=7, inference_logprobs=[[1.0, -0.5], [1.0, -0.5, 1.0]]))

    def test_the_error_names_group_environment_and_rollout_and_the_ways_out(self):
        stream = make_stream([list(self.BATCH)], needs_inference_logprobs=True)
        with pytest.raises(AtroposProtocolError) as caught:
            take_step(stream)
        assert caught.value.what == (
            "Group 1 (environment 7), rollout 1: `inference_logprobs` is missing or incomplete."
        )
        assert "every trained token" in caught.value.why
        for way_out in ("ManagedServer", "--inference_logprobs use", "--loss_type weighted_sft"):
            assert way_out in caught.value.fix

    def test_without_the_requirement_the_batch_is_trained(self):
        first, _ = take_step(make_stream([list(self.BATCH)]))
        assert first[0].inference_logprobs is None
        assert first[0].num_tokens == 3
