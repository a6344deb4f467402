"""From finished sessions to groups of the wire."""

from __future__ import annotations

import pytest

from trl_atropos.gateway.groups import FinishedSession, GroupMaker, SessionRollout
from trl_atropos.loss.advantages import group_advantages


def rollout(*trained: int, version: int | None = 1) -> SessionRollout:
    return SessionRollout([5, *trained], [-100, *trained], [1.0, *(-0.5 for _ in trained)], version, [])


def session(reward: float, *rollouts: SessionRollout) -> FinishedSession:
    return FinishedSession(list(rollouts), reward)


def test_sessions_without_branches_are_one_group_whose_advantages_the_trainer_makes():
    maker = GroupMaker(2, 0.7)
    (group,) = maker.add([session(1.0, rollout(7)), session(0.0, rollout(8, 9, version=None))])
    assert group == {
        "tokens": [[5, 7], [5, 8, 9]],
        "masks": [[-100, 7], [-100, 8, 9]],
        "scores": [1.0, 0.0],
        "inference_logprobs": [[1.0, -0.5], [1.0, -0.5, -0.5]],
        "messages": [[], []],
        "generation_params": {"temperature": 0.7},
        "group_overrides": {"policy_version": [1, None]},
    }


@pytest.mark.parametrize(("scales", "name"), [(True, "group"), (False, "none")])
def test_rollouts_of_sessions_that_branched_carry_the_advantage_of_their_session(scales: bool, name: str):
    import torch

    maker = GroupMaker(3, 1.0, scales)
    rewards = [1.0, 0.0, 0.25]
    groups = maker.add(
        [
            session(rewards[0], rollout(7), rollout(8), rollout(9)),
            session(rewards[1], rollout(7)),
            session(rewards[2], rollout(7), rollout(8)),
        ]
    )
    # Six rollouts of three sessions: the mean is that of the sessions.
    expected = group_advantages(torch.tensor(rewards), name).tolist()
    assert [group["scores"] for group in groups] == [[1.0] * 3, [0.0, 0.25, 0.25]]
    found = [advantages for group in groups for advantages in group["advantages"]]
    of_rollouts = [expected[index] for index in (0, 0, 0, 1, 2, 2)]
    assert [row[0] for row in found] == [0.0] * 6
    assert [row[1] for row in found] == pytest.approx(of_rollouts, abs=1e-6)
    assert maker.num_waiting_rollouts == 0


def test_what_is_too_little_for_a_group_waits_for_the_next():
    maker = GroupMaker(2, 1.0)
    (first,) = maker.add([session(1.0, rollout(7), rollout(8)), session(0.0, rollout(9))])
    assert (first["tokens"], maker.num_waiting_rollouts) == ([[5, 7], [5, 8]], 1)
    # A session of which nothing is trained counts in the mean.
    (second,) = maker.add([session(1.0, rollout(10)), session(0.0)])
    assert second["tokens"] == [[5, 9], [5, 10]]
    assert second["advantages"][1][1] > 0
    assert maker.num_waiting_rollouts == 0
