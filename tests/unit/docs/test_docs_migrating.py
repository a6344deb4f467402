"""docs/migrating.md against the options of both sides, as far as the other side is installed."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib.metadata import files
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from trl import GRPOConfig, ModelConfig

from trl_atropos import AtroposConfig


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "migrating.md").read_text()
SECTIONS = {section.splitlines()[0]: section for section in PAGE.split("\n## ")[1:]}
OURS = {f"--{field.name}" for cls in (AtroposConfig, ModelConfig) for field in fields(cls)} | {"--config"}
LAUNCHER = set(launch_command_parser()._option_string_actions)
FLAG = re.compile(r"--[a-z][\w-]*")


def rows(section: str) -> list[list[str]]:
    """The columns of every line of a table, without its head."""
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_option_of_ours_exists(name):
    table = rows(SECTIONS[name])
    assert len(table) >= 6
    for _, ours, *_ in table:
        # Those of the server are vLLM's.
        if "of the server" not in ours:
            known = OURS | LAUNCHER if "accelerate launch" in ours else OURS
            assert set(FLAG.findall(ours)) <= known, ours


def test_the_flags_of_example_trainer_exist():
    (path,) = [path for path in files("atroposlib") or [] if str(path) == "example_trainer/cli.py"]
    known = set(re.findall(r'"(--[\w-]+)"', path.read_text()))
    (section,) = [text for name, text in SECTIONS.items() if "example_trainer" in name]
    flags = {flag for theirs, *_ in rows(section) for flag in FLAG.findall(theirs)}
    assert flags
    assert flags <= known


def test_the_names_that_are_said_to_be_those_of_trl_are():
    (section,) = [text for name, text in SECTIONS.items() if "GRPOTrainer" in name]
    names = re.findall(r"`(\w+)`", section.split("uses TRL's names:")[1].split("\n\n")[0])
    assert names
    assert set(names) <= {field.name for field in fields(GRPOConfig)} & {field.name for field in fields(AtroposConfig)}
