"""From finished sessions to groups of the wire."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_atropos.api.refusals import RequestRefused
from trl_atropos.errors import EpisodeError
from trl_atropos.gateway.gateway import GatewaySession
from trl_atropos.gateway.groups import FinishedSession, GroupMaker, SessionRollout, turn_advantages
from trl_atropos.gateway.sessions import Session
from trl_atropos.gateway.turns import Turn
from trl_atropos.loss.advantages import group_advantages
from trl_atropos.wire.parse import WireLimits, parse_group


def rollout(*trained: int, version: int | None = 1, turn: int = 0) -> SessionRollout:
    size = len(trained)
    return SessionRollout([5, *trained], [-100, *trained], [1.0, *[-0.5] * size], [-1, *[turn] * size], version, [])


def session(reward: float, *rollouts: SessionRollout) -> FinishedSession:
    return FinishedSession(list(rollouts), [reward])


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


def test_rewards_that_are_equal_give_exactly_nothing():
    # The mean of three times 0.1 as floats are added is not 0.1.
    equal = [session(0.1, rollout(7), rollout(8)) for _ in range(3)]
    assert turn_advantages(equal) == [[0.0]] * 3


def test_the_advantage_of_a_turn_is_the_sum_of_the_normalised_rewards_from_it_on():
    # Rewards of turns: (1, -, 3) and (0, 4); those of the sessions, 0 and -2, are parts of the last: (1, -, 3) and (0, 2).
    # Mean 6/4 = 1.5, deviations -0.5, 1.5, -1.5, 0.5, unbiased variance (0.25 + 2.25 + 2.25 + 0.25) / 3 = 5/3.
    # From each turn on: 1.0, 1.5, 1.5 and -1.0, 0.5, in units of sqrt(5/3) + 1e-4.
    first = FinishedSession([rollout(7), rollout(8, turn=1), rollout(9, turn=2)], [1.0, None, 3.0])
    second = FinishedSession([rollout(7), rollout(8, turn=1)], [0.0, 2.0])
    expected = [1.0, 1.5, 1.5, -1.0, 0.5]
    for scales, unit in ((True, math.sqrt(5 / 3) + 1e-4), (False, 1.0)):
        (group,) = GroupMaker(5, 1.0, scales).add([first, second])
        assert [row[0] for row in group["advantages"]] == [0.0] * 5
        assert [row[1] * unit for row in group["advantages"]] == pytest.approx(expected)
        # What people see as the reward of a rollout is what its session got in all.
        assert group["scores"] == [4.0, 4.0, 4.0, 2.0, 2.0]


def test_a_reward_of_the_last_turn_is_one_of_the_session():
    rewarded = [FinishedSession([rollout(7)], [None, reward]) for reward in (1.0, 0.0)]
    assert GroupMaker(2, 1.0).add(rewarded) == GroupMaker(2, 1.0).add(
        [session(1.0, rollout(7)), session(0.0, rollout(7))]
    )


@dataclass(frozen=True)
class Attempt:
    """A session: the turn that each turn continues (-1: none), tokens that each sampled, which of them are masked."""

    parents: list[int]
    num_sampled: list[int]
    masked: list[bool]
    rewards: list[float | None]
    reward: float | None


@st.composite
def attempts(draw: st.DrawFn) -> Attempt:
    num_turns = draw(st.integers(1, 5))
    rewards = st.one_of(st.none(), st.integers(-3, 3).map(lambda number: number / 2))
    of_turns = draw(st.lists(rewards, min_size=num_turns, max_size=num_turns))
    of_session = draw(rewards)
    if of_session is None and not any(reward is not None for reward in of_turns):
        of_session = 0.5
    return Attempt(
        [draw(st.integers(-1, index - 1)) for index in range(num_turns)],
        draw(st.lists(st.integers(1, 3), min_size=num_turns, max_size=num_turns)),
        draw(st.lists(st.booleans(), min_size=num_turns, max_size=num_turns)),
        of_turns,
        of_session,
    )


def held(attempt: Attempt, first_token: int) -> tuple[Session, dict[int, int]]:
    """The session, whose sampled tokens are all different, and the turn of each of them that is trained."""
    recorded, turn_of = Session(), {}
    for index, (parent, size) in enumerate(zip(attempt.parents, attempt.num_sampled, strict=True)):
        sampled = array("i", range(first_token, first_token + size))
        first_token += size
        turn = Turn(
            parent=recorded.turns[parent] if parent >= 0 else None,
            added=array("i", [1]),
            sampled=sampled,
            logprobs=array("f", [-0.5] * size),
            policy_version=1,
            message={"role": "assistant", "content": ""},
            finish_reason="stop",
            messages=[],
            num_messages=0,
            num_closed=0,
            closed_digest=b"",
            why_masked="grammar" if attempt.masked[index] else "",
        )
        recorded.add(turn)
        if not attempt.masked[index]:
            turn_of |= dict.fromkeys(sampled, index)
    for index, reward in enumerate(attempt.rewards):
        if reward is not None:
            recorded.give_reward(reward, index if index % 2 else f"resp_{recorded.turns[index].id}")
    if attempt.reward is not None:
        recorded.give_reward(attempt.reward)
    return recorded, turn_of


def expected_advantages(group: list[Attempt]) -> list[list[float]]:
    """By the formula of the paper, in another way than the code."""
    rewards = [list(attempt.rewards) for attempt in group]
    for attempt, of_turns in zip(group, rewards, strict=True):
        if attempt.reward is not None:
            of_turns[-1] = attempt.reward + (of_turns[-1] or 0.0)
    given = torch.tensor([reward for of_turns in rewards for reward in of_turns if reward is not None])
    normalized = iter(group_advantages(given, "group").tolist())
    of_sessions = [[0.0 if reward is None else next(normalized) for reward in of_turns] for of_turns in rewards]
    return [[sum(values[index:]) for index in range(len(values))] for values in of_sessions]


@given(st.lists(attempts(), min_size=2, max_size=4))
def test_every_sampled_token_is_trained_once_with_the_advantage_of_its_turn(group: list[Attempt]):
    turn_of: dict[int, tuple[int, int]] = {}
    finished, first_token = [], 100
    for number, attempt in enumerate(group):
        recorded, turns = held(attempt, first_token)
        first_token += sum(attempt.num_sampled)
        turn_of |= {token: (number, turn) for token, turn in turns.items()}
        finished.append(GatewaySession(recorded, "").finished())
    # Groups of one, so that nothing waits.
    made = GroupMaker(1, 1.0).add(finished)
    expected = expected_advantages(group)
    trained: list[int] = []
    for wire in made:
        if "advantages" not in wire:
            continue
        parsed = parse_group(wire, WireLimits(vocab_size=1000, max_length=1000))
        for rolled in parsed.rollouts:
            is_trained = rolled.labels != -100
            assert rolled.advantages is not None
            assert rolled.advantages[~is_trained].abs().sum() == 0
            for token, advantage in zip(rolled.labels[is_trained], rolled.advantages[is_trained], strict=True):
                number, turn = turn_of[int(token)]
                assert advantage.item() == pytest.approx(expected[number][turn], abs=1e-4)
                trained.append(int(token))
    if any("advantages" in wire for wire in made):
        assert sorted(trained) == sorted(turn_of)


class TestWhatIsRefused:
    @pytest.mark.parametrize("turn", [1, -1, True, "resp_0", "nothing", 0.0, [0]])
    def test_a_turn_that_is_none(self, turn: Any):
        recorded, _ = held(Attempt([-1], [1], [False], [None], 1.0), 100)
        with pytest.raises(RequestRefused, match=r"`turn` is .*, and the session has 1 turns") as caught:
            recorded.give_reward(1.0, turn)
        assert (caught.value.field, recorded.turn_rewards) == ("turn", {})

    @pytest.mark.parametrize("value", [math.nan, math.inf, "high", None, True])
    def test_a_reward_that_is_none(self, value: Any):
        recorded, _ = held(Attempt([-1], [1], [False], [None], 1.0), 100)
        for turn in (None, 0):
            with pytest.raises(RequestRefused, match="`reward` is"):
                recorded.give_reward(value, turn)
        assert (recorded.reward, recorded.turn_rewards) == (1.0, {})

    def test_a_reward_that_comes_too_late_or_not_at_all(self):
        recorded, _ = held(Attempt([-1], [1], [False], [0.5], None), 100)
        opened = GatewaySession(recorded, "")
        assert opened.finished().rewards == [0.5]
        with pytest.raises(EpisodeError, match="before the session is finished"):
            opened.reward = 1.0
        with pytest.raises(EpisodeError, match="is finished"):
            opened.reward_turn(0, 1.0)
        recorded, _ = held(Attempt([-1], [1], [False], [None], None), 100)
        with pytest.raises(EpisodeError, match="no reward"):
            GatewaySession(recorded, "").finished()
