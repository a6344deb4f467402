"""Tables of the documents, and the options of the commands that they describe."""

from __future__ import annotations

import re
from typing import Any

from trl_atropos.cli.main import make_parser


def rows(text: str, title: str) -> list[list[str]]:
    """The cells of the table in a section of a document, without its head."""
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|(.+)\|$", section, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def options_of(command: str) -> dict[str, Any]:
    """Options of a command and their defaults, in the order of its help."""
    (commands,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    assert isinstance(commands, dict)
    return {
        action.option_strings[0]: action.default
        for action in commands[command]._actions
        if action.option_strings and action.dest != "help"
    }


def documented_options(text: str) -> dict[str, str]:
    """Options and defaults of the section on options; a row may have several."""
    return {
        name: default
        for names, defaults, _ in rows(text, "Options")
        for name, default in zip(re.findall(r"--\w+", names), defaults.split(", "), strict=True)
    }
