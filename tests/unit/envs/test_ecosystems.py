"""Names of ecosystems: what is there, what is not, and what the person reads who asks for something else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import trl_atropos
from trl_atropos.envs import ecosystems
from trl_atropos.envs.ecosystems import ECOSYSTEMS, Ecosystem, is_ecosystem_name, open_source
from trl_atropos.errors import PreflightError


SETUP = (Path(trl_atropos.__file__).parent.parent / "setup.py").read_text()
MAX_SOURCE_LINES = 150


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("reasoning-gym:chain_sum", True),
        ("unknown:x", True),
        ("env.py", False),
        ("dir/env.py", False),
        ("./odd:name.py", False),
    ],
)
def test_a_name_is_no_path(name, is_one):
    assert is_ecosystem_name(name) is is_one


def test_every_ecosystem_has_an_extra_and_a_small_file():
    for ecosystem in ECOSYSTEMS.values():
        assert f'"{ecosystem.name}": [' in SETUP
        lines = Path(sys.modules[ecosystem.make.__module__].__file__).read_text().splitlines()
        assert len(lines) <= MAX_SOURCE_LINES


def test_names_are_those_that_can_be_trained_on():
    assert "chain_sum" in ECOSYSTEMS["reasoning-gym"].task_names()
    games = ECOSYSTEMS["textarena"].task_names()
    assert {"Sudoku-v0", "GuessTheNumber-v0"} <= set(games)
    # Two players; a variant of a game.
    assert not {"TicTacToe-v0", "Sudoku-v0-raw"} & set(games)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resoning-gym:chain_sum", "reasoning-gym"),
        ("reasoning-gym:chainsum", "chain_sum"),
        ("textarena:Sudoku", "Sudoku-v0"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(PreflightError, match=f"Did you mean `{nearest}`"):
        open_source(name, {})


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr(Ecosystem, "is_installed", False)
    with pytest.raises(PreflightError, match=r"Run pip install 'trl-atropos\[reasoning-gym\]'\."):
        open_source("reasoning-gym:chain_sum", {})


def test_an_option_that_a_task_does_not_have():
    with pytest.raises(PreflightError, match=r"min_trms.*Correct --args"):
        open_source("reasoning-gym:chain_sum", {"min_trms": 2})


@pytest.mark.parametrize("name", ["textarena:TwentyQuestions-v0", "textarena:GuessWho-v0"])
def test_a_game_with_a_paid_opponent_names_the_key(name, monkeypatch):
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(PreflightError, match=r"OPENROUTER_API_KEY.*Set the key"):
        open_source(name, {})


@pytest.mark.parametrize(
    ("fault", "fix"),
    [
        (LookupError("***\nResource 'words' not found. Please use the NLTK Downloader"), "nltk.downloader words"),
        (ModuleNotFoundError("No module named 'anytree'", name="anytree.node"), "Run pip install anytree."),
        (ModuleNotFoundError("Needs pip install 'core[gen]'", name="pyggp"), "Install what its error names."),
        (RuntimeError("It requires a CLI. Install it with: `uv sync`"), "It needs a further package."),
        (ConnectionError("Name or service not known"), "from the network"),
        (SyntaxError("f-string: unmatched '['"), "does not run here"),
    ],
)
def test_what_an_environment_lacks_is_said(monkeypatch, fault, fix):
    def fail(name, options):
        raise fault

    row = Ecosystem("reasoning-gym", "reasoning_gym", "tasks", lambda: ["x"], fail)
    monkeypatch.setitem(ecosystems.ECOSYSTEMS, "reasoning-gym", row)
    with pytest.raises(PreflightError) as caught:
        open_source("reasoning-gym:x", {})
    assert fix in str(caught.value)
    assert "***" not in str(caught.value)
    assert caught.value.__cause__ is fault
