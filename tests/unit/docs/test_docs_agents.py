"""docs/agents.md against the command and the tables of what agents may ask for."""

from __future__ import annotations

import re
from pathlib import Path

from trl_atropos.cli.main import make_parser
from trl_atropos.gateway.chat import NEUTRAL, REFUSED


TEXT = (Path(__file__).resolve().parents[3] / "docs" / "agents.md").read_text()


def rows(title: str) -> list[list[str]]:
    section = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|(.+)\|$", section, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def test_every_option_has_a_row_with_its_default():
    (commands,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    assert isinstance(commands, dict)
    options = {
        action.option_strings[0]: action.default
        for action in commands["gateway"]._actions
        if action.option_strings and action.dest != "help"
    }
    documented = {
        name: default
        for names, defaults, _ in rows("Options")
        for name, default in zip(re.findall(r"--\w+", names), defaults.split(", "), strict=True)
    }
    assert documented.keys() == options.keys()
    for name, default in options.items():
        assert documented[name] == str(default) or (default is None and documented[name] in ("required", "none"))


def test_what_is_said_of_sampling_is_what_is_done():
    asked = {row[0] for row in rows("Sampling is plain")}
    names = {name for cell in asked for name in re.findall(r"`(\w+)`", cell)}
    assert {"temperature", "top_p", "top_k", "min_p"} <= names & NEUTRAL.keys()
    assert {"logit_bias", "min_tokens", "bad_words"} <= names & REFUSED.keys()
