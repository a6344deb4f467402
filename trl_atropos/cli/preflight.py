"""`trl-atropos preflight`: whether all parts of a run fit together, asked before it starts. Changes nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .progress import shown


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "preflight",
        help="check that all parts of a run fit together before it starts",
        usage="%(prog)s [-c LAUNCH.YAML | --config TRAINER.YAML] [options]",
        description="Check versions, options, model, tokenizers, ports, GPUs, shared memory and disk, and the servers that run "
        "already. Every check has a line: ok, warning, error, or unknown where something could not be looked at. The trainer "
        "runs the same checks at its start. docs/troubleshooting.md explains each name.",
        epilog="Starts nothing and changes nothing. An API key of the vLLM server is read from VLLM_API_KEY. Exit code: 1 if "
        "there is an error, 0 otherwise, also with warnings.",
    )
    files = parser.add_mutually_exclusive_group()
    files.add_argument(
        "-c", dest="launch_config", metavar="LAUNCH.YAML", type=Path, help="file of `trl-atropos launch`"
    )
    files.add_argument("--config", metavar="TRAINER.YAML", type=Path, help="file of the training script's --config")
    parser.add_argument("--api_url", help="root of an Atropos API that runs already")
    parser.add_argument(
        "--vllm_url", help="root of a vLLM or SGLang server that runs already; several separated by commas"
    )
    parser.add_argument("--model", help="path or Hub id of the trainer's model, if the file names none")
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """Check what can be checked; 1 if there is an error."""
    with shown("Loading the libraries of the trainer"):
        from .findings import exit_code
        from .preflight_run import Preflight, run_preflight

    told = Preflight(args.launch_config, args.config, args.api_url, args.vllm_url, args.model)
    return exit_code(run_preflight(told, args.json))
