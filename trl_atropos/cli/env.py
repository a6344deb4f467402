"""`trl-atropos env`: an unmodified Atropos environment file with the libraries of today."""

from __future__ import annotations

import importlib
import logging
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import PreflightError
from .env_shims import SHIMS, select_shims


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


def list_shims() -> None:
    """Print name and reason of every shim."""
    width = max(len(shim.name) for shim in SHIMS)
    for shim in SHIMS:
        print(f"{shim.name:{width}}  {shim.why}")
        print(f"{'':{width}}  {shim.upstream}")


def run_env(path: Path, arguments: Sequence[str], without: Sequence[str] = ()) -> int:
    """Run an environment file as `python FILE.py ARGUMENTS...` would, with shims.

    Args:
        path (`Path`):
            The environment file.
        arguments (`Sequence[str]`):
            What its own command line gets: `serve`, `process` or `evaluate`, and its options.
        without (`Sequence[str]`, *optional*):
            Names of shims to leave out.

    Returns:
        `int`: 0 when the file has run to its end. Another exit code of the file comes as `SystemExit`.

    Raises:
        [`~errors.PreflightError`]: If the file, atroposlib, a shim of that name, or a module that the file imports is
            not there.
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
    print("Loading atroposlib and transformers", file=sys.stderr, flush=True)
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
