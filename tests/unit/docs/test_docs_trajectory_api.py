"""docs/trajectory_api.md against the command and the metrics of the API."""

from __future__ import annotations

import re
from pathlib import Path

from trl_atropos.api.metrics import METRICS
from trl_atropos.cli.main import make_parser


TEXT = (Path(__file__).resolve().parents[3] / "docs" / "trajectory_api.md").read_text()


def rows(title: str) -> list[list[str]]:
    section = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|(.+)\|$", section, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def test_every_option_has_a_row_with_its_default():
    (commands,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    assert isinstance(commands, dict)
    options = {
        action.option_strings[0]: action.default
        for action in commands["api"]._actions
        if action.option_strings and action.dest != "help"
    }
    documented = {
        name: default
        for names, defaults, _ in rows("Options")
        for name, default in zip(re.findall(r"--\w+", names), defaults.split(", "), strict=True)
    }
    assert list(documented) == list(options)
    for name, default in options.items():
        if default is None:
            assert documented[name] in ("required", "all", "none")
        else:
            assert documented[name] == str(default)


def test_every_metric_has_a_row_with_its_meaning():
    documented = {name.strip("`"): meaning for name, meaning in rows("Watching it")}
    assert documented == {name: meaning for name, (_, meaning) in METRICS.items()}
