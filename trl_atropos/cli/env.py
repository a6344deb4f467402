"""`trl-atropos env`: an unmodified Atropos environment file with the libraries of today."""

from __future__ import annotations

import argparse
import importlib
import logging
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import PreflightError
from .env_shims import SHIMS, select_shims
from .progress import say


DISTRIBUTIONS = {
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "dotenv": "python-dotenv",
    "mem0": "mem0ai",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "tavily": "tavily-python",
    "yaml": "pyyaml",
}
"""Module -> package of PyPI, where the names differ by more than `_` and `-`."""


def add_arguments(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "env",
        help="run an Atropos environment file, unmodified, with today's libraries",
        usage="%(prog)s [--no-shim NAME]... FILE.py {serve,process,evaluate} [options of FILE.py]\n"
        "       %(prog)s --list-shims",
        description="Run FILE.py as `python FILE.py ...` would, after replacing what archived Atropos does wrong with "
        "transformers 5 and current servers. Each such shim says so in one line when it acts. docs/environments.md lists them "
        "and the files that were tried.",
        epilog="What follows FILE.py is passed on untouched. Exit code: that of FILE.py; 1 if a module that it needs is missing.",
    )
    parser.add_argument(
        "--no-shim", action="append", default=[], metavar="NAME", help="leave out a shim; can be repeated"
    )
    parser.add_argument("--list-shims", action="store_true", help="print the shims and end")
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE.py", help="the environment file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run the environment file with its own arguments, `rest` among them; return its exit code."""
    if args.list_shims:
        _list_shims()
        return 0
    if args.file is None:
        raise argparse.ArgumentError(None, "env: FILE.py is missing")
    return _run_file(args.file, [*args.arguments, *(["--", *rest] if rest else [])], args.no_shim)


def _list_shims() -> None:
    width = max(len(shim.name) for shim in SHIMS)
    for shim in SHIMS:
        print(f"{shim.name:{width}}  {shim.why}")
        print(f"{'':{width}}  {shim.upstream}")


def _run_file(path: Path, arguments: Sequence[str], without: Sequence[str]) -> int:
    """Run an environment file as `python FILE.py ARGUMENTS...` would, with all shims but those named in `without`.

    Another exit code than 0 or 130 (Ctrl-C) leaves as the file's own `SystemExit`.
    """
    shims = select_shims(without)
    if not path.is_file():
        raise PreflightError(
            f"There is no file {path}.",
            f"It was looked for from {Path.cwd()}.",
            "Pass the path of an environment file: trl-atropos env FILE.py serve ...",
        )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_atropos").setLevel(logging.INFO)
    say("Loading atroposlib and transformers")
    _require_atroposlib()
    for shim in shims:
        shim.install()
    # As without us: the environment, and the processes that it starts, end at once.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as exc:
        raise _missing_module(path, exc) from exc
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _require_atroposlib() -> None:
    try:
        importlib.import_module("atroposlib.envs.base")
    except ModuleNotFoundError as exc:
        raise PreflightError(
            f"atroposlib cannot be imported: {exc}.",
            "Every Atropos environment is built on it; the trainer alone does not need it.",
            "Run pip install 'trl-atropos[atropos]'.",
        ) from exc


def _missing_module(path: Path, exc: ModuleNotFoundError) -> PreflightError:
    name = exc.name or ""
    top = name.partition(".")[0]
    for parent in path.resolve().parents:
        if (parent / top).is_dir() or (parent / f"{top}.py").is_file():
            return PreflightError(
                f"{path} imports {name}, which is not found.",
                f"{top} lies in {parent}, which is not on Python's path.",
                f"Run it with PYTHONPATH={parent}.",
            )
    return PreflightError(
        f"{path} imports {name}, which is not installed.",
        "An environment may need packages of its own; a requirements.txt beside it lists them.",
        f"Run pip install {DISTRIBUTIONS.get(top, top.replace('_', '-'))}.",
    )
