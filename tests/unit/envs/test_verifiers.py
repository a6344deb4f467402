"""Tasksets of verifiers: its own rewards, turns, stop rules and tools. Where verifiers is installed, which is not beside vLLM:
`make test-environments`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trl_atropos.envs.ecosystems import ECOSYSTEMS, open_source
from trl_atropos.errors import PreflightError


installed = pytest.mark.skipif(not ECOSYSTEMS["verifiers"].is_installed, reason="verifiers is not installed")

TASKS = Path(__file__).parents[2] / "verifiers_tasks"


@pytest.fixture(autouse=True)
def tasks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(TASKS))
    # Its tools are servers in processes of their own.
    monkeypatch.setenv("PYTHONPATH", f"{TASKS}:{TASKS.parents[1]}")


def play(name, number, *texts, options=None):
    source = open_source(f"verifiers:{name}", options or {})
    episode = source.open(source.make_task(number))
    steps = [episode.step(text) for text in texts]
    episode.close()
    return episode.messages, steps


@installed
def test_its_rewards_are_added_up_with_their_weights():
    source = open_source("verifiers:sums_for_verifiers", {})
    episode = source.open(source.make_task(0))
    a, b = (int(word) for word in episode.messages[0]["content"].removesuffix("?").split() if word.isdigit())
    step = episode.step(f"{a + b}")
    assert step.observation is None
    assert step.reward == 1.0 + 0.5 / (1 + len(f"{a + b}"))


@installed
def test_it_plays_the_user_and_ends_by_its_own_rules():
    messages, steps = play("guesses_for_verifiers", 0, "1", "9", "7")
    assert messages == [
        {"role": "system", "content": "Numbers alone."},
        {"role": "user", "content": "Guess my number from 1 to 20."},
    ]
    assert [step.observation for step in steps] == ["higher", "lower", None]
    assert [step.reward for step in steps] == [0.0, 0.0, 1.0]


@installed
def test_its_options_are_those_of_verifiers():
    _, steps = play("guesses_for_verifiers", 0, "1", options={"player": {"max_turns": 1}})
    assert (steps[0].observation, steps[0].reward) == (None, 0.7)
    with pytest.raises(PreflightError, match=r"plyer.*Correct --args"):
        open_source("verifiers:guesses_for_verifiers", {"plyer": {}})


@installed
def test_a_tool_is_called_and_answers():
    call = '<tool_call>\n{"name": "calculator_toolset_add", "arguments": {"a": 2, "b": 4}}\n</tool_call>'
    messages, steps = play("tools_for_verifiers", 0, f"I add. {call}", "It is 6.")
    assert messages[0]["role"] == "system"
    assert "calculator_toolset_add" in messages[0]["content"]
    assert steps[0].observation == "<tool_response>\n6\n</tool_response>"
    assert (steps[1].observation, steps[1].reward) == (None, 1.0)


@installed
def test_every_second_task_is_for_the_evaluation():
    source = open_source("verifiers:guesses_for_verifiers", {})
    assert [source.make_task(number) for number in range(5)] == [0, 2, 0, 2, 0]
    assert [source.make_task(number, is_eval=True) for number in range(3)] == [1, 3, 1]


@installed
def test_names_are_those_of_packages():
    assert "textarena" in ECOSYSTEMS["verifiers"].task_names()
    with pytest.raises(PreflightError, match=r"no environment 'textarna'.*Did you mean `textarena`"):
        open_source("verifiers:textarna", {})
    with pytest.raises(PreflightError, match=r"textarena requires|game"):
        open_source("verifiers:textarena", {})


@installed
def test_a_call_that_is_no_json_is_a_part_of_the_text():
    from trl_atropos.envs.verifiers_program import read_message

    body = {"messages": [], "tools": [{}]}
    for text in ("<tool_call>{a}</tool_call>", "<tool_call>{}</tool_call>", '{"name": "add"}'):
        assert read_message(text, body) == {"role": "assistant", "content": text}
    called = read_message('So: <tool_call>{"name": "add"}</tool_call>', body)
    assert called["content"] == "So: "
    assert called["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}
    assert "tool_calls" not in read_message('<tool_call>{"name": "add"}</tool_call>', {"messages": []})


@installed
def test_no_module_of_ours_shadows_its_own():
    assert "verifiers.v1" in sys.modules
    assert "site-packages" in sys.modules["verifiers"].__file__
