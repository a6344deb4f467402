"""Which policy sampled a rollout: the oldest of all of its turns, and unknown rather than guessed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from trl_atropos.data.policy_versions import trained_spans, with_policy_versions
from trl_atropos.types import Rollout, RolloutGroup, ServedCall
from trl_atropos.wire.rollout_key import rollout_key


def rollout(trained: str, first_id: int = 10, policy_version: int | None = None) -> Rollout:
    """Tokens first_id, first_id + 1, ...; `x` where a token is trained, `.` where not."""
    input_ids = torch.arange(first_id, first_id + len(trained))
    labels = torch.tensor([int(i) if mark == "x" else -100 for i, mark in zip(input_ids, trained, strict=True)])
    return Rollout(input_ids=input_ids, labels=labels, reward=0.0, policy_version=policy_version)


class Table:
    """What the server remembers: by first id, number of prompt tokens and of all tokens of a call, who sampled it."""

    def __init__(self, versions: dict[tuple[int, int, int], int]):
        self.versions = {
            rollout_key(range(first, first + end), start): version for (first, start, end), version in versions.items()
        }
        self.requests: list[list[str]] = []

    def __call__(self, keys: Sequence[str]) -> list[ServedCall | None]:
        self.requests.append(list(keys))
        versions = [self.versions.get(key) for key in keys]
        return [None if version is None else ServedCall(version, ("top_p",) * (version > 8)) for version in versions]


def versions_of(rollouts: list[Rollout], table: Table) -> list[int | None]:
    (group,) = with_policy_versions([RolloutGroup(tuple(rollouts))], table)
    return [found.policy_version for found in group.rollouts]


@pytest.mark.parametrize(
    ("trained", "spans"),
    [
        ("..xx", [(2, 4)]),
        ("..xx.x", [(2, 4), (5, 6)]),
        ("..xx..xx..", [(2, 4), (6, 8)]),
        ("x.x", [(0, 1), (2, 3)]),
        ("xxx", [(0, 3)]),
        ("...", []),
    ],
)
def test_a_call_sampled_a_run_of_trained_tokens(trained, spans):
    assert trained_spans(rollout(trained)) == spans


def test_the_oldest_policy_of_all_turns_counts():
    table = Table({(10, 2, 4): 7, (10, 6, 8): 5, (10, 10, 12): 9})
    assert versions_of([rollout("..xx..xx..xx")], table) == [5]


def test_parameters_of_any_turn_count():
    table = Table({(10, 2, 4): 7, (10, 6, 8): 9, (20, 2, 4): 7})
    (group,) = with_policy_versions([RolloutGroup((rollout("..xx..xx"), rollout("..xx", 20)))], table)
    assert [found.sampling_parameters for found in group.rollouts] == [("top_p",), ()]


def test_one_turn_that_nobody_knows_makes_the_rollout_unknown():
    table = Table({(10, 2, 4): 7, (10, 10, 12): 9})
    assert versions_of([rollout("..xx..xx..xx")], table) == [None]


@pytest.mark.parametrize(
    "versions",
    [
        # Two calls of two tokens each, without a masked token between them: the second is not the older one's version.
        {(10, 2, 4): 3, (10, 4, 6): 5},
        # The environment trains two tokens of its own before the completion, after it, or masks the completion's first.
        {(10, 4, 6): 5},
        {(10, 2, 4): 5},
        {(10, 1, 6): 5},
    ],
)
def test_a_run_of_trained_tokens_that_is_not_one_completion_is_unknown(versions):
    assert versions_of([rollout("..xxxx")], Table(versions)) == [None]


def test_all_rollouts_of_a_batch_are_asked_for_at_once():
    table = Table({(10, 2, 4): 1, (20, 1, 3): 2, (20, 4, 5): 3})
    groups = [RolloutGroup((rollout("..xx"),)), RolloutGroup((rollout(".xx.x", 20),))]
    found = with_policy_versions(groups, table)
    assert [group.rollouts[0].policy_version for group in found] == [1, 2]
    assert [len(request) for request in table.requests] == [3]


def test_what_the_environment_said_is_kept_and_not_asked_for():
    table = Table({(10, 2, 4): 7, (20, 2, 4): 8})
    assert versions_of([rollout("..xx", policy_version=3), rollout("..xx", 20)], table) == [3, 8]
    assert [len(request) for request in table.requests] == [1]


def test_equal_rollouts_of_a_group_get_the_same_version():
    twin = rollout("..xx")
    assert versions_of([twin, twin, rollout("..xx")], Table({(10, 2, 4): 6})) == [6, 6, 6]
