"""Entry point of the `trl-atropos` command: every subcommand is one module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from ..errors import TrlAtroposError
from . import api, doctor, env, gateway, model, preflight, push, report
from .launch import command as launch


COMMANDS = (model, doctor, launch, preflight, env, report, push, api, gateway)
"""In the order of `--help`. Importing them loads nothing heavy; each loads what it needs when it runs."""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line; `run` of what it returns is the function of the subcommand."""
    parser = argparse.ArgumentParser(prog="trl-atropos", description="Train on Atropos environments with TRL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_arguments(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand with these arguments, by default those of the process.

    Returns the exit code: 0, 1 after an error of trl_atropos or one that a check found, 128 + n when ended by signal
    n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Everything after `--` belongs to the environment's command; argparse would swallow its flags.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = make_parser()
    args = parser.parse_args(arguments[:split])
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As an exception, so that every `with` block ends what it started.
        signal.signal(number, _exit_on_signal)
    try:
        return args.run(args, arguments[split + 1 :])
    except argparse.ArgumentError as exc:
        parser.error(str(exc))
    except TrlAtroposError as exc:
        print(f"\n{type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; all processes of the run have been ended.", file=sys.stderr)
        return 128 + signal.SIGINT


def _exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
