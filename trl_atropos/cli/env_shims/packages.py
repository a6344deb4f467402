"""A shim for files that are part of a package."""

from __future__ import annotations

import ast
import runpy
import sys
import types
from pathlib import Path
from typing import Any

from .shim import Shim


PACKAGE = "_environment_directory"


class RelativeImport(Shim):
    """`from .module import name` in a file that is run."""

    name = "relative_import"
    why = "A file with relative imports cannot be run by its path: Python does not know of which package it is a part."
    upstream = "environments/infinimath/infinimath_env.py and others: from .module import name"

    def install(self) -> None:
        """Run a file with relative imports as a module of a package that its directory makes."""
        original = runpy.run_path

        def run_path(
            path_name: str, init_globals: dict[str, Any] | None = None, run_name: str | None = None
        ) -> dict[str, Any]:
            file = Path(path_name).resolve()
            if not _needs_package(file):
                return original(path_name, init_globals, run_name)
            self.acts(f"{file.name} runs as a part of its directory, {file.parent.name}")
            package = types.ModuleType(PACKAGE)
            package.__path__ = [str(file.parent)]
            sys.modules[PACKAGE] = package
            return runpy.run_module(f"{PACKAGE}.{file.stem}", init_globals, run_name)

        runpy.run_path = run_path


def _needs_package(file: Path) -> bool:
    """Whether a file imports from its own directory by a dot, and does not do without where that fails."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        # What it is run with says what is wrong with it.
        return False
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    # More dots lead out of the directory.
    return any(isinstance(node, ast.ImportFrom) and node.level == 1 for node in ast.walk(tree) if node not in guarded)
