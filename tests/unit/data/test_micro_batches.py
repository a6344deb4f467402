"""Dealing rollouts into micro-batches, and the tensors of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.data.micro_batches import MicroBatch, RolloutCollator, deal_by_count, deal_by_tokens
from trl_atropos.policy.layouts import LAYOUTS, num_computed_tokens
from trl_atropos.types import NO_TOKEN, Rollout, RolloutOrigin


def rollout(
    tokens: Sequence[int], group: int = 0, number: int = 0, trained: str | None = None, **fields: Any
) -> Rollout:
    """`trained` has one letter per token: x where it is trained. By default all but the first are."""
    input_ids = torch.tensor(tokens)
    trained = "." + "x" * (len(tokens) - 1) if trained is None else trained
    labels = torch.where(torch.tensor([letter == "x" for letter in trained]), input_ids, -100)
    defaults = {"reward": 0.0, "advantages": torch.zeros(len(tokens)), "origin": RolloutOrigin(0, group, number)}
    return Rollout(input_ids=input_ids, labels=labels, **{**defaults, **fields})


def of_lengths(*groups: Sequence[int]) -> list[Rollout]:
    """Rollouts that share nothing, except that a group's tokens all begin with the group's number."""
    return [
        rollout([group] + [1000 * group + 100 * number + t for t in range(1, length)], group, number)
        for group, lengths in enumerate(groups)
        for number, length in enumerate(lengths)
    ]


def lengths_of(dealt: Sequence[Sequence[MicroBatch]]) -> list[list[list[int]]]:
    return [[[r.num_tokens for r in micro_batch] for micro_batch in rank] for rank in dealt]


def identities(rollouts: Sequence[Rollout]) -> list[tuple[int, int]]:
    return sorted((r.origin.group, r.origin.rollout) for r in rollouts if r.origin is not None)


def computed_tokens(micro_batch: MicroBatch, layout: str) -> int:
    groups: dict[int, list[torch.Tensor]] = {}
    for r in micro_batch:
        assert r.origin is not None
        groups.setdefault(r.origin.group, []).append(r.input_ids)
    return num_computed_tokens(list(groups.values()), layout)


@st.composite
def steps(draw: st.DrawFn) -> list[Rollout]:
    """Groups of rollouts over few tokens that share prefixes of any length."""
    rollouts = []
    for group in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
        for number in range(draw(st.integers(1, 6))):
            completion = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
            rollouts.append(rollout(prompt + completion, group, number))
    return rollouts


class TestDealByCount:
    def test_groups_stay_together_those_with_the_longest_rollouts_first(self):
        rollouts = of_lengths([3, 5], [9, 2], [4, 8])
        dealt = deal_by_count(rollouts, micro_batch_size=2, num_micro_batches=3, world_size=1)
        assert lengths_of(dealt) == [[[9, 2], [8, 4], [5, 3]]]

    def test_neighbours_go_to_different_ranks(self):
        rollouts = of_lengths([9, 9], [8, 8], [3, 3], [2, 2])
        dealt = deal_by_count(rollouts, micro_batch_size=2, num_micro_batches=2, world_size=2)
        assert lengths_of(dealt) == [[[9, 9], [3, 3]], [[8, 8], [2, 2]]]

    def test_a_size_that_is_no_multiple_of_the_group_cuts_groups(self):
        dealt = deal_by_count(of_lengths([5, 4, 3], [2, 2, 2]), micro_batch_size=2, num_micro_batches=3, world_size=1)
        assert lengths_of(dealt) == [[[5, 4], [3, 2], [2, 2]]]

    def test_after_a_dropped_group_the_last_micro_batches_are_short_or_empty(self):
        dealt = deal_by_count(of_lengths([5, 4, 3]), micro_batch_size=2, num_micro_batches=2, world_size=2)
        assert lengths_of(dealt) == [[[5, 4], []], [[3], []]]

    @settings(max_examples=50, deadline=None)
    @given(rollouts=steps(), world_size=st.integers(1, 3), size=st.integers(1, 4), spare=st.integers(0, 1))
    def test_every_rollout_once_and_as_many_micro_batches_for_every_rank(self, rollouts, world_size, size, spare):
        number = -(-len(rollouts) // (size * world_size)) + spare
        dealt = deal_by_count(rollouts, micro_batch_size=size, num_micro_batches=number, world_size=world_size)
        assert [len(rank) for rank in dealt] == [number] * world_size
        assert all(len(micro_batch) <= size for rank in dealt for micro_batch in rank)
        assert identities([r for rank in dealt for micro_batch in rank for r in micro_batch]) == identities(rollouts)


class TestDealByTokens:
    @settings(max_examples=100, deadline=None)
    @given(
        rollouts=steps(), layout=st.sampled_from(LAYOUTS), world_size=st.integers(1, 3), max_tokens=st.integers(1, 80)
    )
    def test_every_rollout_once_within_the_budget_and_equally_many_for_every_rank(
        self, rollouts, layout, world_size, max_tokens
    ):
        dealt = deal_by_tokens(rollouts, max_tokens=max_tokens, layout=layout, world_size=world_size)
        assert len(dealt) == world_size
        assert len({len(rank) for rank in dealt}) == 1
        micro_batches = [micro_batch for rank in dealt for micro_batch in rank]
        assert identities([r for micro_batch in micro_batches for r in micro_batch]) == identities(rollouts)
        for micro_batch in micro_batches:
            if len(micro_batch) > 1:
                assert computed_tokens(micro_batch, layout) <= max_tokens

    @settings(max_examples=100, deadline=None)
    @given(rollouts=steps(), world_size=st.integers(1, 3), max_tokens=st.integers(24, 80))
    def test_packed_the_costliest_is_above_the_mean_by_one_rollout_at_most(self, rollouts, world_size, max_tokens):
        dealt = deal_by_tokens(rollouts, max_tokens=max_tokens, layout="packed", world_size=world_size)
        costs = [computed_tokens(micro_batch, "packed") for rank in dealt for micro_batch in rank]
        # Graham 1969: when the last item was added to the fullest bin, that bin had the least, at most the mean.
        assert max(costs) <= sum(costs) / len(costs) + max(r.num_tokens for r in rollouts)

    @settings(max_examples=100, deadline=None)
    @given(rollouts=steps(), world_size=st.integers(1, 3), slack=st.integers(0, 40))
    def test_trees_that_fit_are_whole_and_balanced(self, rollouts, world_size, slack):
        groups = {r.origin.group: [s for s in rollouts if s.origin.group == r.origin.group] for r in rollouts}
        sizes = {group: computed_tokens(members, "tree") for group, members in groups.items()}
        max_tokens = max(sizes.values()) + slack
        dealt = deal_by_tokens(rollouts, max_tokens=max_tokens, layout="tree", world_size=world_size)
        micro_batches = [micro_batch for rank in dealt for micro_batch in rank]
        for group, members in groups.items():
            holding = [
                micro_batch for micro_batch in micro_batches if any(r.origin.group == group for r in micro_batch)
            ]
            assert len(holding) == 1
            assert len([r for r in holding[0] if r.origin.group == group]) == len(members)
        costs = [computed_tokens(micro_batch, "tree") for micro_batch in micro_batches]
        assert max(costs) <= sum(costs) / len(costs) + max(sizes.values())

    @pytest.mark.parametrize(("max_tokens", "number"), [(20, 1), (19, 2), (11, 2), (9, 3), (7, 3)])
    def test_a_larger_budget_makes_fewer_forward_passes(self, max_tokens, number):
        # 20 tokens. In two: 6 + 3 + 2 and 5 + 4. In three: 6, 5 + 2 and 4 + 3.
        (dealt,) = deal_by_tokens(of_lengths([6, 5, 4, 3, 2]), max_tokens=max_tokens, layout="packed", world_size=1)
        assert len(dealt) == number

    def test_a_shared_prompt_costs_once_in_a_tree(self):
        prompt = list(range(20))
        rollouts = [rollout([*prompt, 30 + number, 40], 0, number) for number in range(5)]
        # 20 + 5 x 2 = 30 positions; without sharing 5 x 22 = 110.
        assert [len(d) for d in deal_by_tokens(rollouts, max_tokens=30, layout="tree", world_size=1)] == [1]
        assert [len(d) for d in deal_by_tokens(rollouts, max_tokens=30, layout="packed", world_size=1)] == [5]

    def test_a_group_above_the_budget_is_cut_where_little_is_shared(self):
        # Two families of two: inside of each 9 of 10 tokens are shared, between them nothing.
        left, right = list(range(9)), list(range(50, 59))
        families = [[*left, 20], [*right, 21], [*left, 22], [*right, 23]]
        rollouts = [rollout(tokens, 0, number) for number, tokens in enumerate(families)]
        (dealt,) = deal_by_tokens(rollouts, max_tokens=11, layout="tree", world_size=1)
        assert sorted(identities(micro_batch) for micro_batch in dealt) == [[(0, 0), (0, 2)], [(0, 1), (0, 3)]]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_rollout_above_the_budget_is_alone(self, layout):
        (dealt,) = deal_by_tokens(of_lengths([30, 4], [5]), max_tokens=10, layout=layout, world_size=1)
        assert [r.num_tokens for r in dealt[0]] == [30]
        assert sum(len(micro_batch) for micro_batch in dealt) == 3

    def test_the_costliest_micro_batches_run_at_the_same_time_on_all_ranks(self):
        dealt = deal_by_tokens(of_lengths([9, 9, 2, 2]), max_tokens=9, layout="packed", world_size=2)
        assert lengths_of(dealt) == [[[9], [2]], [[9], [2]]]

    def test_a_rank_without_rollouts_gets_empty_micro_batches(self):
        dealt = deal_by_tokens(of_lengths([4]), max_tokens=10, layout="tree", world_size=3)
        assert lengths_of(dealt) == [[[4]], [[]], [[]]]

    def test_padded_counts_what_is_padded(self):
        # 10 and three of 2: padded together 4 x 10.
        (dealt,) = deal_by_tokens(of_lengths([10, 2, 2, 2]), max_tokens=20, layout="padded", world_size=1)
        assert all(len(micro_batch) * max(r.num_tokens for r in micro_batch) <= 20 for micro_batch in dealt)


def read(batch: dict[str, Any], values: torch.Tensor) -> list[float]:
    """Per trained token what was made per scored position."""
    return values[batch["token_index"]].tolist()


class TestRolloutCollator:
    # Two turns: 11 and 13, 14 are trained, 12 is a tool's answer, 15 ends the sequence untrained.
    HOLES = rollout(
        [10, 11, 12, 13, 14, 15],
        trained=".x.xx.",
        advantages=torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0]),
        inference_logprobs=torch.tensor([math.nan, -0.1, math.nan, -0.3, -0.4, math.nan]),
        ref_logprobs=torch.tensor([9.0, -1.1, 9.0, -1.3, -1.4, 9.0]),
    )
    # The label of token 0 is trained on the wire, but nothing predicts it.
    FIRST = rollout([20, 21, 22], group=1, number=2, trained="xx.", advantages=torch.tensor([5.0, 6.0, 0.0]))

    @staticmethod
    def collate(layout: str, rollouts: Sequence[Rollout], **options: Any) -> dict[str, Any]:
        return RolloutCollator(**{"layout": layout, "temperature": 0.7, "pad_token_id": 3, **options})(rollouts)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_flat_columns_belong_together_with_holes_and_a_trained_first_token(self, layout):
        batch = self.collate(layout, [self.HOLES, self.FIRST])
        # 11, 13, 14 of the first rollout and 21 of the second, each predicted by the token before it.
        assert read(batch, batch["targets"]) == [11, 13, 14, 21]
        assert read(batch, batch["input_ids"].flatten()[batch["prediction_index"]]) == [10, 12, 13, 20]
        assert batch["advantages"].tolist() == [1.0, 3.0, 4.0, 6.0]
        assert batch["inference_logprobs"][:3].tolist() == pytest.approx([-0.1, -0.3, -0.4])
        assert batch["ref_logprobs"][:3].tolist() == pytest.approx([-1.1, -1.3, -1.4])
        assert batch["rollout_index"].tolist() == [0, 0, 0, 1]
        assert batch["num_rollout_tokens"].tolist() == [3, 1]
        assert batch["advantage_scale"].tolist() == [1.0, 1.0]
        assert batch["names"] == ["environment 0, group 0, rollout 0", "environment 0, group 1, rollout 2"]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_dtypes(self, layout):
        batch = self.collate(layout, [self.HOLES, self.FIRST])
        tensors = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
        floats = ("temperature", "advantages", "inference_logprobs", "ref_logprobs")
        expected = {**dict.fromkeys(tensors, torch.int64), **dict.fromkeys(floats, torch.float32)}
        assert tensors == {**expected, "advantage_scale": torch.float32}

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_unknown_logprobs_are_nan(self, layout):
        batch = self.collate(layout, [self.HOLES, self.FIRST])
        assert batch["inference_logprobs"].isnan().tolist() == [False, False, False, True]
        assert batch["ref_logprobs"].isnan().tolist() == [False, False, False, True]

    @pytest.mark.parametrize(
        ("layout", "input_ids"),
        # 10 to 13 predict up to 14, and 20 predicts 21: tokens behind are not computed.
        [("packed", [[10, 11, 12, 13, 20]]), ("padded", [[10, 11, 12, 13], [20, 3, 3, 3]]),
         ("tree", [[10, 11, 12, 13], [20, 3, 3, 3]])],
    )  # fmt: skip
    def test_nothing_behind_the_last_prediction_is_computed(self, layout, input_ids):
        batch = self.collate(layout, [self.HOLES, self.FIRST])
        assert batch["input_ids"].tolist() == input_ids
        assert batch["num_sequence_tokens"] == 5

    def test_what_each_layout_hands_to_the_model(self):
        padded, packed, tree = (self.collate(name, [self.HOLES, self.FIRST]) for name in ("padded", "packed", "tree"))
        assert padded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
        assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 0]]
        # Every token of a chain is attended to up to its end; padding attends to itself.
        assert tree["subtree_end"].tolist() == [[4, 4, 4, 4], [1, 2, 3, 4]]
        assert tree["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
        of_layout = {"attention_mask", "position_ids", "subtree_end"}
        assert [of_layout & batch.keys() for batch in (padded, packed, tree)] == [
            {"attention_mask"}, {"position_ids"}, {"position_ids", "subtree_end"},
        ]  # fmt: skip

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_rollouts_of_a_group_become_neighbours_and_columns_follow(self, layout):
        mixed = [
            rollout([20, 21], group=1, number=0, advantages=torch.tensor([0.0, 1.0])),
            rollout([30, 31], group=2, number=0, advantages=torch.tensor([0.0, 2.0])),
            rollout([20, 22], group=1, number=1, advantages=torch.tensor([0.0, 3.0]), set_advantage_to_zero=True),
        ]
        batch = self.collate(layout, mixed)
        assert read(batch, batch["targets"]) == [21, 22, 31]
        assert read(batch, batch["input_ids"].flatten()[batch["prediction_index"]]) == [20, 20, 30]
        assert batch["advantages"].tolist() == [1.0, 3.0, 2.0]
        assert batch["advantage_scale"].tolist() == [1.0, 0.0, 1.0]
        assert batch["names"] == [
            "environment 0, group 1, rollout 0",
            "environment 0, group 1, rollout 1",
            "environment 0, group 2, rollout 0",
        ]

    def test_equal_tokens_of_a_tree_are_scored_once(self):
        # Both train 11 after 10; then they part.
        left = rollout([10, 11, 12], number=0, advantages=torch.tensor([0.0, 1.0, 2.0]))
        right = rollout([10, 11, 13], number=1, advantages=torch.tensor([0.0, 3.0, 4.0]))
        batch = self.collate("tree", [left, right])
        assert batch["input_ids"].tolist() == [[10, 11]]
        scored = sorted(zip(batch["prediction_index"].tolist(), batch["targets"].tolist(), strict=True))
        assert scored == [(0, 11), (1, 12), (1, 13)]
        assert read(batch, batch["targets"]) == [11, 12, 11, 13]
        assert read(batch, batch["prediction_index"]) == [0, 1, 0, 1]
        # Advantages are those of the rollouts, not of the scored position.
        assert batch["advantages"].tolist() == [1.0, 2.0, 3.0, 4.0]
        assert batch["num_sequence_tokens"] == 4

    @pytest.mark.parametrize("layout", ["packed", "padded"])
    def test_the_other_layouts_compute_equal_tokens_for_each_rollout(self, layout):
        twins = [rollout([10, 11], number=number) for number in range(2)]
        batch = self.collate(layout, twins)
        assert batch["prediction_index"].numel() == 2

    def test_equal_tokens_of_different_groups_are_not_merged(self):
        batch = self.collate("tree", [rollout([10, 11], group=0), rollout([10, 11], group=1)])
        assert batch["prediction_index"].numel() == 2

    def test_groups_that_share_are_one_row_and_keep_their_columns(self):
        # A system prompt 10, 11; prompts 12 and 13. The third group has nothing of it.
        mixed = [
            rollout([10, 11, 12, 20, 21], group=0, number=0, trained="...xx"),
            rollout([10, 11, 13, 20, 22], group=1, number=0, trained="...xx"),
            rollout([10, 11, 12, 23], group=0, number=1, trained="...x"),
            rollout([30, 31], group=2, number=0),
        ]
        batch = self.collate("tree", mixed, shares_between_groups=True)
        assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 13, 20, 30]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 0]]
        assert batch["subtree_end"].tolist() == [[6, 6, 4, 4, 6, 6, 7]]
        assert read(batch, batch["targets"]) == [20, 21, 23, 20, 22, 31]
        assert read(batch, batch["prediction_index"]) == [2, 3, 2, 4, 5, 6]
        assert batch["names"] == [
            "environment 0, group 0, rollout 0",
            "environment 0, group 0, rollout 1",
            "environment 0, group 1, rollout 0",
            "environment 0, group 2, rollout 0",
        ]
        assert batch["num_sequence_tokens"] == 12

    def test_nothing_trained_is_laid_out_where_groups_share_too(self):
        batch = self.collate("tree", [], shares_between_groups=True)
        assert batch["input_ids"].tolist() == [[3, 3]]

    def test_equal_tokens_at_different_temperatures_are_scored_each_at_its_own(self):
        twins = [rollout([10, 11], number=0), rollout([10, 11], number=1, temperature=1.3)]
        batch = self.collate("tree", twins)
        assert batch["input_ids"].tolist() == [[10]]
        assert read(batch, batch["temperature"]) == pytest.approx([0.7, 1.3])
        # A server that reports raw logprobs: the temperature plays no role, and they are equal again.
        raw = self.collate("tree", twins, applies_temperature=False)
        assert raw["temperature"].tolist() == [1.0]
        assert raw["token_index"].tolist() == [0, 0]

    def test_a_whole_number_as_temperature_is_a_float_column(self):
        # What YAML makes of `temperature: 1`.
        batch = self.collate("padded", [rollout([10, 11])], temperature=1)
        assert batch["temperature"].dtype == torch.float32

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_rollouts_without_trained_tokens_are_counted_and_not_computed(self, layout):
        untrained = rollout([40, 41, 42], group=0, number=1, trained="x..")
        batch = self.collate(layout, [untrained, self.FIRST, untrained])
        assert batch["num_rollouts"] == 3
        assert batch["num_rollout_tokens"].tolist() == [1]
        assert batch["names"] == ["environment 0, group 1, rollout 2"]
        assert batch["advantage_scale"].shape == (1,)
        assert batch["input_ids"].tolist() == [[20]]

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("rollouts", [[], [rollout([40, 41], trained="..")]], ids=["empty", "untrained"])
    def test_a_micro_batch_that_trains_nothing_can_still_be_forwarded(self, layout, rollouts):
        batch = self.collate(layout, rollouts)
        assert batch["input_ids"].tolist() == [[3, 3]]
        for name in ("prediction_index", "targets", "temperature", "token_index", "advantages", "inference_logprobs",
                     "ref_logprobs", "rollout_index", "num_rollout_tokens", "advantage_scale"):  # fmt: skip
            assert batch[name].shape == (0,), name
        assert batch["names"] == []
        assert (batch["num_rollouts"], batch["num_sequence_tokens"]) == (len(rollouts), 0)
        # A row that attends to nothing makes NaN in a softmax.
        assert batch.get("attention_mask", torch.ones(1)).all()

    def test_the_pad_token_may_be_a_trained_token(self):
        # Padding is known by position, never by its id: many models pad with EOS.
        batch = self.collate("padded", [rollout([3, 3, 3]), rollout([10, 11], group=1)])
        assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
        assert read(batch, batch["targets"]) == [3, 3, 11]

    def test_without_origins_rollouts_are_one_group(self):
        nameless = [replace(rollout([10, 11, 12 + number]), origin=None) for number in range(2)]
        batch = self.collate("tree", nameless)
        assert batch["input_ids"].tolist() == [[10, 11]]
        assert read(batch, batch["targets"]) == [11, 12, 11, 13]


class TestTeacherColumns:
    @staticmethod
    def taught(tokens: Sequence[int], ids: Sequence[Sequence[int]], **options: Any) -> Rollout:
        teacher_token_ids = torch.tensor(ids)
        # -0.25 for token id 4, -0.5 for 8 and so on: each logprob tells its id.
        logprobs = torch.where(teacher_token_ids == NO_TOKEN, -torch.inf, -teacher_token_ids / 16)
        return rollout(tokens, teacher_token_ids=teacher_token_ids, teacher_logprobs=logprobs, **options)

    def test_they_are_those_of_the_predicted_token(self):
        ids = [[1, 2], [4, 8], [16, NO_TOKEN], [32, 33]]
        batch = RolloutCollator("padded", 1.0)([self.taught([10, 11, 12, 13], ids, trained=".xx.")])
        # Of tokens 11 and 12; where there is none, an id that exists and a probability of 0.
        assert batch["teacher_token_ids"].tolist() == [[4, 8], [16, 0]]
        assert batch["teacher_logprobs"].tolist() == [[-0.25, -0.5], [-1.0, -math.inf]]
        assert batch["teacher_logprobs"].dtype == torch.float32

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_rollouts_with_fewer_names_or_no_teacher_are_filled_up(self, layout):
        wide = self.taught([10, 11], [[1, 2, 3], [4, 8, 12]], number=0)
        narrow = self.taught([10, 12], [[5], [16]], number=1)
        batch = RolloutCollator(layout, 1.0)([wide, narrow, rollout([10, 13], number=2)])
        assert batch["teacher_token_ids"].tolist() == [[4, 8, 12], [16, 0, 0], [0, 0, 0]]
        assert batch["teacher_logprobs"].tolist() == [
            [-0.25, -0.5, -0.75], [-1.0, -math.inf, -math.inf], [-math.inf] * 3,
        ]  # fmt: skip

    def test_with_a_teacher_equal_tokens_are_scored_for_each_rollout(self):
        # Their teachers may name other tokens.
        twins = [self.taught([10, 11], [[1], [4 * (number + 1)]], number=number) for number in range(2)]
        batch = RolloutCollator("tree", 1.0)(twins)
        assert batch["prediction_index"].tolist() == [0, 0]
        assert batch["token_index"].tolist() == [0, 1]
        assert batch["teacher_token_ids"].tolist() == [[4], [8]]

    def test_without_a_teacher_there_are_no_columns(self):
        batch = RolloutCollator("tree", 1.0)([rollout([10, 11])])
        assert not {"teacher_token_ids", "teacher_logprobs"} & batch.keys()

    def test_a_teacher_of_an_untrained_rollout_is_not_looked_at(self):
        untrained = self.taught([10, 11], [[1], [4]], trained="..")
        assert "teacher_logprobs" not in RolloutCollator("tree", 1.0)([untrained, rollout([10, 12], number=1)])
