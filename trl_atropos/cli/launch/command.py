"""The command `trl-atropos launch`: its arguments, which win over the launch file."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "launch",
        help="run API, inference server, environments and trainer on this machine",
        usage="%(prog)s -c LAUNCH.YAML [options] [-- ENV COMMAND...]",
        description="Start the Atropos API, the inference server (vLLM or SGLang), environments and the trainer in this order, each when it can be "
        "used, and end together what was started. docs/launch.md explains the file.",
        epilog="What follows `--` is the command of one environment, which replaces those of the launch file and their prompts. "
        "Exit code: 0 when the trainer has ended well, 1 after an error, 128 + n when ended by signal n.",
    )
    parser.add_argument("-c", "--config", type=Path, required=True, help="the launch file (YAML)")
    parser.add_argument("--run_dir", help="directory for logs, model and summary")
    parser.add_argument("--model_name_or_path", help="hub id or directory of the model")
    parser.add_argument("--trainer_args", help="further arguments of the trainer, as one string")
    parser.add_argument("--api_url", help="root of an Atropos API that runs already; none is started then")
    parser.add_argument(
        "--vllm_url",
        help="root of an inference server that runs already, or several with commas between them; none is started then",
    )
    parser.add_argument(
        "--show_all_logs",
        action="store_true",
        help="show the output of all processes instead of the trainer's; logs/combined.log of the run has it in any case",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run the launch file; `rest` is the command of one environment, which replaces those of the file."""
    from .config import load_launch_config
    from .run import run_launch

    overrides = {
        "run_dir": args.run_dir,
        "model_name_or_path": args.model_name_or_path,
        "trainer_args": args.trainer_args,
        "api_url": args.api_url,
        "vllm_url": args.vllm_url,
        "show_all_logs": args.show_all_logs or None,
        "environments": {"env": {"command": shlex.join(rest)}} if rest else None,
        # Those of the file are questions of its own environments.
        "prompts": [] if rest else None,
    }
    run_launch(load_launch_config(args.config, overrides))
    return 0
