"""`trl-atropos env`: an unmodified Atropos environment file with the libraries of today."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..envs.ecosystems import ECOSYSTEMS, find_ecosystem, is_ecosystem_name, open_source
from ..errors import PreflightError
from .env_delivery import Delivery, watch_environments
from .env_shims import SHIMS, select_shims
from .env_shims.shim import Shim
from .progress import say


logger = logging.getLogger(__name__)

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
        help="run an Atropos environment file, unmodified, or an environment of another ecosystem",
        usage="%(prog)s [--no-shim NAME]... FILE.py {serve,process,evaluate} [options of FILE.py]\n"
        "       %(prog)s [--no-shim NAME]... ECOSYSTEM:NAME [--args JSON] {serve,process,evaluate} [options of Atropos]\n"
        "       %(prog)s list [ECOSYSTEM]\n"
        "       %(prog)s --list-shims",
        description="Run FILE.py as `python FILE.py ...` would, after replacing what archived Atropos does wrong with "
        "transformers 5 and current servers. Each such shim says so in one line when it acts. docs/environments.md lists them "
        "and the files that were tried. ECOSYSTEM:NAME, such as reasoning-gym:chain_sum, is an environment of another "
        "ecosystem with the same options; --args are its own, as a JSON object.",
        epilog="What follows FILE.py is passed on untouched. Exit code: that of FILE.py; 1 if a module that it needs is missing.",
    )
    parser.add_argument(
        "--no-shim", action="append", default=[], metavar="NAME", help="leave out a shim; can be repeated"
    )
    parser.add_argument("--list-shims", action="store_true", help="print the shims and end")
    parser.add_argument(
        "file", nargs="?", metavar="FILE.py", help="the environment file, ECOSYSTEM:NAME, or the word list"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run the environment file with its own arguments, `rest` among them; return its exit code."""
    if args.list_shims:
        _list_shims()
        return 0
    if args.file is None:
        raise argparse.ArgumentError(None, "env: FILE.py is missing")
    arguments = [*args.arguments, *(["--", *rest] if rest else [])]
    if args.file == "list":
        return _list_environments(arguments)
    if is_ecosystem_name(args.file):
        return _run_name(args.file, arguments, args.no_shim)
    return _run_file(Path(args.file), arguments, args.no_shim)


def _list_environments(arguments: Sequence[str]) -> int:
    """Print the ecosystems, or the names of one of them."""
    if len(arguments) > 1:
        raise argparse.ArgumentError(None, f"env list: takes the name of one ecosystem, not {' '.join(arguments)}")
    if arguments:
        for name in find_ecosystem(arguments[0]).task_names():
            print(f"{arguments[0]}:{name}")
        return 0
    width = max(map(len, ECOSYSTEMS))
    for ecosystem in ECOSYSTEMS.values():
        state = "installed" if ecosystem.is_installed else f"not installed: {ecosystem.install_command}"
        print(f"{ecosystem.name:{width}}  {ecosystem.what}")
        print(f"{'':{width}}  {state}")
        if ecosystem.conflict and not ecosystem.is_installed:
            print(f"{'':{width}}  {ecosystem.conflict}")
    return 0


def _list_shims() -> None:
    width = max(len(shim.name) for shim in SHIMS)
    for shim in SHIMS:
        print(f"{shim.name:{width}}  {shim.why}")
        print(f"{'':{width}}  {shim.upstream}")


def _run_name(name: str, arguments: Sequence[str], without: Sequence[str]) -> int:
    """Run an environment of another ecosystem with the command line that Atropos gives to every environment."""
    shims = select_shims(without)
    options, arguments = _own_options(name, arguments)
    _log_to_standard_error()
    source = open_source(name, options)
    _prepare(shims)
    # It imports atroposlib, which is not needed for what can go wrong above.
    from ..envs.environment import make_environment

    sys.argv = [name, *arguments]
    return _until_interrupted(make_environment(name, source).cli)


def _own_options(name: str, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split `--args JSON` off, which stands directly behind the name."""
    first, *rest = arguments or [""]
    flag, has_value, value = first.partition("=")
    if flag != "--args":
        return {}, list(arguments)
    if not has_value:
        value, *rest = rest or [""]
    try:
        options = json.loads(value)
    except json.JSONDecodeError as exc:
        raise PreflightError(
            f"--args of {name} is no JSON: {exc}.",
            f"It is {value!r}.",
            """Pass an object in single quotes, such as --args '{"max_terms": 3}'.""",
        ) from exc
    if not isinstance(options, dict):
        raise PreflightError(
            f"--args of {name} is {value}, which is no JSON object.",
            "Each option of an environment has a name.",
            """Pass an object, such as --args '{"max_terms": 3}'.""",
        )
    return options, rest


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
    _log_to_standard_error()
    deliveries = _prepare(shims)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        status = _until_interrupted(lambda: runpy.run_path(str(path), run_name="__main__"))
    except ModuleNotFoundError as exc:
        raise _missing_module(path, exc) from exc
    if status == 0 and not deliveries:
        # `cli()` ends the process by itself, so that nothing was started here.
        logger.warning(
            "%s ended and made no environment, so that no group will come: it does not call the cli() of its class. "
            "Call it at the end of a file of your own that imports this one.",
            path,
        )
    return status


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_is_worth_a_line)
    logging.basicConfig(format="%(message)s", handlers=[handler])
    logging.getLogger("trl_atropos").setLevel(logging.INFO)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    # Atropos logs the API's status ten times a second, on a level that nobody sees who has not configured logging.
    return record.levelno >= logging.WARNING or not record.name.startswith("atroposlib.")


def _prepare(shims: Sequence[Shim]) -> list[Delivery]:
    """Make this process one of an environment; return what is noted of those that it makes, as soon as it does."""
    say("Loading atroposlib and transformers")
    _require_atroposlib()
    for shim in shims:
        shim.install()
    deliveries = watch_environments()
    # As without us: the environment, and the processes that it starts, end at once.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    return deliveries


def _until_interrupted(program: Callable[[], object]) -> int:
    try:
        program()
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
    if name != top and importlib.util.find_spec(top) is not None:
        return PreflightError(
            f"{path} imports {name}, which the installed {top} does not have.",
            "It was written for another version of it.",
            f"Look for the version of {top} that has it; a requirements.txt beside the file may name it.",
        )
    return PreflightError(
        f"{path} imports {name}, which is not installed.",
        "An environment may need packages of its own; a requirements.txt beside it lists them.",
        f"Run pip install {DISTRIBUTIONS.get(top, top.replace('_', '-'))}.",
    )
