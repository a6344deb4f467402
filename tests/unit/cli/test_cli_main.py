"""The command line as a whole: every command registers itself, and what becomes of errors."""

from __future__ import annotations

import pytest

from trl_atropos.cli.main import COMMANDS, main, make_parser


def test_every_command_registers_itself_and_its_function() -> None:
    (names,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    assert isinstance(names, dict)
    assert list(names) == [command.__name__.removeprefix("trl_atropos.cli.").partition(".")[0] for command in COMMANDS]
    assert [parser.get_default("run") for parser in names.values()] == [command.run for command in COMMANDS]


def test_arguments_that_a_command_refuses_end_as_those_that_the_parser_refuses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["env", "--no-shim", "wandb"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "usage: trl-atropos [-h] COMMAND ...",
        "trl-atropos: error: env: FILE.py is missing",
    ]
