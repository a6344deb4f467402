"""Entry point of the `trl-atropos` command."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from ..errors import TrlAtroposError
from .arguments import make_parser
from .model import fetch_smollm2
from .progress import shown


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments without the program's name. Defaults to those of the process.

    Returns:
        `int`: The exit code: 0, 1 after an error of trl_atropos or one that a check found, 128 + n when ended by
        signal n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Everything after `--` belongs to the environment's command; argparse would swallow its flags.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = make_parser().parse_args(arguments[:split])
    for number in (signal.SIGTERM, signal.SIGHUP):
        # As an exception, so that every `with` block ends what it started.
        signal.signal(number, _exit_on_signal)
    try:
        return _RUNNERS[args.command](args, arguments[split + 1 :])
    except TrlAtroposError as exc:
        print(f"\n{type(exc).__name__}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; all processes of the run have been ended.", file=sys.stderr)
        return 128 + signal.SIGINT


def _exit_on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


# Each runner imports its command when it runs, so that `--help` and `model` need neither requests nor rich.


def _run_model(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    print(fetch_smollm2(args.output_dir))
    return 0


def _run_launch(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from .launch.config import load_launch_config
    from .launch.run import run_launch

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


def _run_doctor(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    from .doctor import run_doctor

    findings = run_doctor(
        args.api_url,
        vllm_url=args.vllm_url,
        batch_size=args.batch_size,
        max_length=args.max_length,
        watch_s=args.watch_s,
    )
    return int(any(finding.level == "error" for finding in findings))


def _run_preflight(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    with shown("Loading the libraries of the trainer"):
        from .preflight import Preflight, run_preflight

    told = Preflight(args.launch_config, args.config, args.api_url, args.vllm_url, args.model)
    return int(any(finding.level == "error" for finding in run_preflight(told, args.json)))


def _run_env(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from .env import list_shims, run_env

    if args.list_shims:
        list_shims()
        return 0
    if args.file is None:
        make_parser().error("env: FILE.py is missing")
    return run_env(args.file, [*args.arguments, *(["--", *rest] if rest else [])], args.no_shim)


def _run_report(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    with shown("Loading the libraries that draw"):
        from .report import run_report

    print(run_report(args.run_dir, args.output, args.png_dir))
    return 0


def _run_push(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    with shown("Loading the libraries of the Hub and of models"):
        from .push import Push, run_push

    for url in run_push(Push(args.run_dir, args.hub_model_id, args.private, args.revision, args.merged, args.dry_run)):
        print(url)
    return 0


_RUNNERS: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "model": _run_model,
    "launch": _run_launch,
    "doctor": _run_doctor,
    "preflight": _run_preflight,
    "env": _run_env,
    "report": _run_report,
    "push": _run_push,
}


if __name__ == "__main__":
    sys.exit(main())
