"""Each source: tasks that repeat, a split of its own for the evaluation, and the rewards of its ecosystem."""

from __future__ import annotations

import json
import logging
import random
import re

import pytest

from trl_atropos.envs import graded
from trl_atropos.envs.ecosystems import ECOSYSTEMS, open_source
from trl_atropos.envs.graded import GradedEpisode, find_answer


def needs(name: str) -> object:
    installed = ECOSYSTEMS[name.partition(":")[0]].is_installed
    return pytest.param(name, marks=pytest.mark.skipif(not installed, reason=f"{name}: not installed"))


ALL = pytest.mark.parametrize(
    "name",
    [
        "reasoning-gym:chain_sum",
        "textarena:GuessTheNumber-v0",
        "textarena:Sudoku-v0",
        needs("reasoning-core:arithmetics"),
        needs("gem:game:GuessTheNumber-v0-easy"),
        needs("gem:rg:chain_sum"),
    ],
)


NOT_AGAIN = {"reasoning-core:arithmetics"}
"""Draws other problems with the same seed."""


@ALL
def test_a_task_is_the_same_in_every_episode_of_its_group(name):
    source = open_source(name, {})
    again = open_source(name, {})
    for number in range(3):
        task = source.make_task(number)
        assert json.loads(json.dumps(task)) == task == again.make_task(number)
        first = source.open(task).messages
        assert first == source.open(task).messages
        # Another process, or a second run, asks the same where the source can.
        assert (first == again.open(task).messages) or name in NOT_AGAIN
        assert first[-1]["role"] == "user"
        assert first[-1]["content"].strip()


@ALL
def test_the_evaluation_has_tasks_of_its_own(name):
    source = open_source(name, {})
    assert source.has_eval_split is (name not in NOT_AGAIN)
    if not source.has_eval_split:
        return
    trained = {source.make_task(number) for number in range(100)}
    assert trained.isdisjoint(source.make_task(number, is_eval=True) for number in range(100))


@ALL
def test_the_random_numbers_of_the_process_stay_as_they_were(name):
    source = open_source(name, {})
    random.seed(5)
    expected = random.Random(5).random()
    episode = source.open(source.make_task(3))
    episode.step("[1]")
    assert random.random() == expected


def test_a_sum_is_graded():
    source = open_source("reasoning-gym:chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    assert source.is_single_turn
    for number in range(5):
        episode = source.open(source.make_task(number))
        question = episode.messages[0]["content"]
        a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", question).groups()
        answer = int(a) + int(f"{sign}{b}")
        assert episode.step(f"Let us see.\n{a} {sign} {b} = {answer}").reward == 1.0
        step = episode.step(f"The answer is {answer + 1}")
        assert (step.observation, step.reward < 0.1) == (None, True)


def test_options_of_a_task_reach_it():
    source = open_source("textarena:GuessTheNumber-v0", {"max_number": 1000})
    assert "between 1 and 1000" in source.open(0).messages[0]["content"]


def test_a_game_is_played_to_its_end():
    # By halves: 20 numbers need 5 guesses at most.
    source = open_source("textarena:GuessTheNumber-v0", {})
    assert not source.is_single_turn
    for number in range(5):
        episode = source.open(source.make_task(number))
        low, high = 1, 20
        for _ in range(5):
            guess = (low + high) // 2
            step = episode.step(f"I say [{guess}]")
            if step.observation is None:
                break
            # What is new, without what the policy said.
            assert step.observation.startswith("The target number is")
            low, high = (guess + 1, high) if "higher" in step.observation else (low, guess - 1)
            assert step.reward == 0.0
        assert (step.observation, step.reward) == (None, 1.0)


def test_episodes_that_run_at_once_do_not_share_their_random_numbers():
    source = open_source("textarena:Blackjack-v0", {})

    def play(moves, *others):
        episode = source.open(7)
        told = []
        for _ in range(moves):
            for other in others:
                other.step("[hit]")
            told.append(episode.step("[hit]"))
        return told

    assert play(4) == play(4, source.open(8), source.open(9))


def test_a_move_against_the_rules_is_no_exception():
    episode = open_source("textarena:GuessTheNumber-v0", {}).open(0)
    assert episode.step("no number").observation
    assert episode.step("still none").observation is None


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("<answer>1</answer> no, <answer> 2 </answer>", "2"),
        ("<answer>7", "7"),
        ("3 + 4 = 7", "7"),
        ("First.\nThe answer: 7.\n", "7"),
        ("7", "7"),
        ("", ""),
    ],
)
def test_an_answer_is_found(completion, answer):
    assert find_answer(completion) == answer


def test_a_grader_that_fails_on_an_answer_gives_nothing_and_is_told_of_once(caplog, monkeypatch):
    monkeypatch.setattr(graded, "_told", [])
    episode = GradedEpisode("1 + 1?", float)
    assert episode.step("2").reward == 2.0
    assert [episode.step("two").reward for _ in range(2)] == [0.0, 0.0]
    (record,) = caplog.records
    assert "'two'" in record.message
    assert record.exc_info
    assert record.levelno == logging.WARNING


@pytest.mark.skipif(not ECOSYSTEMS["gem"].is_installed, reason="gem-llm is not installed")
def test_a_game_of_gem_gives_its_own_rewards():
    source = open_source("gem:game:GuessTheNumber-v0-easy", {"max_number": 7})
    assert not source.is_single_turn
    episode = source.open(source.make_task(0))
    assert "between 1 and 7" in episode.messages[0]["content"]
    low, high = 1, 7
    for _ in range(3):
        guess = (low + high) // 2
        step = episode.step(f"I say \\boxed{{{guess}}}")
        if step.observation is None:
            break
        assert step.observation.endswith("Enter your next guess.")
        low, high = (guess + 1, high) if "higher" in step.observation else (low, guess - 1)
    assert (step.observation, step.reward) == (None, 1.0)
    assert episode.messages[0]["role"] == "user"


@pytest.mark.skipif(not ECOSYSTEMS["gem"].is_installed, reason="gem-llm is not installed")
def test_a_question_of_gem_says_where_the_answer_goes():
    source = open_source("gem:rg:chain_sum", {})
    episode = source.open(source.make_task(0))
    numbers = re.search(r"([\d +-]+) =", episode.messages[0]["content"]).group(1)
    assert episode.messages[0]["content"].endswith("Put your answer within \\boxed{}.")
    total = sum(int(term.replace(" ", "")) for term in re.findall(r"[+-]?\s*\d+", numbers))
    assert episode.step(f"It is \\boxed{{{total}}}.").reward == 1.0


def test_a_game_that_gives_its_reason_for_a_reward_gives_none():
    episode = open_source("textarena:Countdown-v0", {}).open(0)
    steps = [episode.step("no move") for _ in range(3)]
    assert any(step.observation is None for step in steps)
    assert next(step.reward for step in steps if step.observation is None) == 0.0
