"""Which policy sampled a rollout: the oldest of all of its turns, and unknown rather than guessed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_atropos.policy_versions import span_ends, with_policy_versions
from trl_atropos.rollout_key import prefix_keys, rollout_key
from trl_atropos.types import Rollout, RolloutGroup


def rollout(trained: str, first_id: int = 10, policy_version: int | None = None) -> Rollout:
    """Tokens first_id, first_id + 1, ...; `x` where a token is trained, `.` where not."""
    input_ids = torch.arange(first_id, first_id + len(trained))
    labels = torch.tensor([int(i) if mark == "x" else -100 for i, mark in zip(input_ids, trained, strict=True)])
    return Rollout(input_ids=input_ids, labels=labels, reward=0.0, policy_version=policy_version)


class Table:
    """What the server remembers: sequences, by their first id and length, and who sampled them."""

    def __init__(self, versions: dict[tuple[int, int], int]):
        self.versions = {rollout_key(range(first, first + length)): v for (first, length), v in versions.items()}
        self.requests: list[list[str]] = []

    def __call__(self, keys: Sequence[str]) -> list[int | None]:
        self.requests.append(list(keys))
        return [self.versions.get(key) for key in keys]


def versions_of(rollouts: list[Rollout], table: Table) -> list[int | None]:
    (group,) = with_policy_versions([RolloutGroup(tuple(rollouts))], table)
    return [found.policy_version for found in group.rollouts]


@pytest.mark.parametrize(
    ("trained", "ends"),
    [
        ("..xx", [4]),
        ("..xx.x", [4, 6]),
        ("..xx..xx..", [4, 8]),
        ("x.x", [1, 3]),
        ("xxx", [3]),
        ("...", []),
    ],
)
def test_a_call_ends_where_a_run_of_trained_tokens_ends(trained, ends):
    assert span_ends(rollout(trained)) == ends


def test_the_oldest_policy_of_all_turns_counts():
    table = Table({(10, 4): 7, (10, 8): 5, (10, 12): 9})
    assert versions_of([rollout("..xx..xx..xx")], table) == [5]


def test_one_turn_that_nobody_knows_makes_the_rollout_unknown():
    table = Table({(10, 4): 7, (10, 12): 9})
    assert versions_of([rollout("..xx..xx..xx")], table) == [None]


def test_all_rollouts_of_a_batch_are_asked_for_at_once():
    table = Table({(10, 4): 1, (20, 3): 2, (20, 5): 3})
    groups = [RolloutGroup((rollout("..xx"),)), RolloutGroup((rollout(".xx.x", 20),))]
    found = with_policy_versions(groups, table)
    assert [group.rollouts[0].policy_version for group in found] == [1, 2]
    assert [len(request) for request in table.requests] == [3]


def test_what_the_environment_said_is_kept_and_not_asked_for():
    table = Table({(10, 4): 7, (20, 4): 8})
    assert versions_of([rollout("..xx", policy_version=3), rollout("..xx", 20)], table) == [3, 8]
    assert [len(request) for request in table.requests] == [1]


def test_equal_rollouts_of_a_group_get_the_same_version():
    twin = rollout("..xx")
    assert versions_of([twin, twin, rollout("..xx")], Table({(10, 4): 6})) == [6, 6, 6]


@given(ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=30), data=st.data())
def test_the_key_of_a_prefix_is_that_of_the_sequence(ids, data):
    lengths = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    assert prefix_keys(ids, lengths) == [rollout_key(ids[:length]) for length in lengths]
