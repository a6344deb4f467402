"""`trl-atropos push`: the model of a run to the Hub, after the run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .progress import shown


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "push",
        help="upload the model of a run to the Hub",
        description="Upload the newest model of a run that is finished or was killed: weights or adapter, tokenizer, model card "
        "with the plot of the reward, and training_config.yaml. Optimizer, data and logs stay here. docs/hub.md says what is in the card.",
        epilog="The token is that of `hf auth login`, or HF_TOKEN. Exit code: 0, or 1 with what to mend.",
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="--output_dir of a run, the run directory of `launch`, or a checkpoint",
    )
    parser.add_argument(
        "--hub_model_id", help="repository, NAMESPACE/NAME (default: the name of the directory, in your namespace)"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to; made if there is none (default: main)")
    parser.add_argument(
        "--merged", action="store_true", help="upload an adapter merged into its base model as well, to NAME-merged"
    )
    parser.add_argument("--dry_run", action="store_true", help="show the files and their sizes, and upload nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """Upload the model and print the URLs of the commits."""
    with shown("Loading the libraries of the Hub and of models"):
        from .push_run import Push, run_push

    for url in run_push(Push(args.run_dir, args.hub_model_id, args.private, args.revision, args.merged, args.dry_run)):
        print(url)
    return 0
