"""`trl-atropos report`: the HTML page of a run, and its plots as PNG."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import PreflightError
from .progress import shown


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "report",
        help="write one HTML page about a run",
        description="Write a page with the metrics, refused groups, completions and configuration of a run that is finished, "
        "going on, or was killed. The page needs no other file and makes no request.",
        epilog="Changes nothing else in the run. Exit code: 0, or 1 if there is nothing to report.",
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="--output_dir of a run, or the run directory of `launch`"
    )
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the directory of the trainer)")
    parser.add_argument("--png_dir", type=Path, help="directory that also gets every plot as a PNG")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, _rest: Sequence[str]) -> int:
    """Write the page and print its path."""
    with shown("Loading the libraries that draw"):
        from ..report.page import REPORT_FILE, write_report
        from ..report.run_files import read_run_files

    run_files = read_run_files(args.run_dir)
    path = args.output or run_files.output_dir / REPORT_FILE
    try:
        write_report(run_files, path, args.png_dir)
    except OSError as exc:
        raise PreflightError(
            f"The report cannot be written: {exc}.",
            "The directory may be read-only, or the disk full.",
            "Name another place with `--output`, and with `--png_dir` if you gave it.",
        ) from exc
    print(path)
    return 0
