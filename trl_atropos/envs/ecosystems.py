"""The ecosystems by name, and the way from `ECOSYSTEM:NAME` to a source that is known to work."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import EpisodeError, PreflightError, did_you_mean
from . import gem, openenv, reasoning_core, reasoning_gym, textarena, verifiers
from .source import EnvironmentSource


@dataclass(frozen=True)
class Ecosystem:
    """One row of `trl-atropos env list`.

    Args:
        name (`str`):
            What stands before the colon; also the extra of the distribution that installs it.
        module (`str`):
            What has to be importable.
        what (`str`):
            What its names are, and what some of them need, in one line.
        task_names (`Callable[[], list[str]]`):
            All names that are known.
        make (`Callable[[str, dict[str, Any]], EnvironmentSource]`):
            Source of a name and the options of `--args`.
        is_name (`Callable[[str], bool]`, *optional*):
            Whether something may stand behind the colon that is not among `task_names`; by default it may not.
        conflict (`str`):
            Why it does not fit beside the pinned packages of the trainer and the server, where it does not: it is installed
            in a virtual environment of its own.
    """

    name: str
    module: str
    what: str
    task_names: Callable[[], list[str]]
    make: Callable[[str, dict[str, Any]], EnvironmentSource]
    is_name: Callable[[str], bool] = lambda name: False
    conflict: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether its package is there. It is not imported."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def install_command(self) -> str:
        """What installs it."""
        if not self.conflict:
            return f"pip install 'trl-atropos[{self.name}]'"
        directory = f".venv-{self.name}"
        return f"python -m venv {directory} && {directory}/bin/pip install 'trl-atropos[atropos,{self.name}]'"


ECOSYSTEMS = {
    ecosystem.name: ecosystem
    for ecosystem in (
        Ecosystem(
            "reasoning-gym",
            "reasoning_gym",
            "procedural tasks with one answer",
            reasoning_gym.task_names,
            reasoning_gym.ReasoningGym,
        ),
        Ecosystem(
            "reasoning-core",
            "reasoning_core",
            "symbolic tasks with one answer; some need data of a hub",
            reasoning_core.task_names,
            reasoning_core.ReasoningCore,
        ),
        Ecosystem(
            "textarena",
            "textarena",
            "games in text for one player; games with words need the NLTK data `words`",
            textarena.task_names,
            textarena.TextArena,
        ),
        Ecosystem(
            "gem",
            "gem",
            "games, puzzles and questions of gem-llm; most of math:, code: and qa: need data of a hub",
            gem.task_names,
            gem.Gem,
            conflict="gem-llm 0.1.0 needs nltk 3.9.1, msgspec 0.19.0 and reasoning-gym 0.1.23, and the pinned packages are newer",
        ),
        Ecosystem(
            "openenv",
            "websockets",
            "a URL of a server of OpenEnv, or the directory of an environment, whose server is started with the interpreter "
            "that --args names",
            openenv.task_names,
            openenv.OpenEnv,
            openenv.is_name,
        ),
        Ecosystem(
            "verifiers",
            "verifiers",
            "tasksets of verifiers 0.4 and of packages made for it, with their tools and turns",
            verifiers.task_names,
            verifiers.Verifiers,
            verifiers.is_name,
            "verifiers 0.4.0 needs mcp 2.0.0 and openai before 3, and the pinned packages are mcp 2.3.0 and openai 3.54.0",
        ),
    )
}
"""Name -> ecosystem."""

OPEN_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What an environment raises whose data, key, package or options are missing or wrong."""


COLOUR = re.compile(r"\x1b\[[\d;]*m")

INSTALL = re.compile(r"\b(install|installed)\b", re.IGNORECASE)
"""What an error says that names what to install, whatever its type."""

MAX_ERROR_CHARACTERS = 300
"""So much of what an environment's own error says is repeated."""


def is_ecosystem_name(name: str) -> bool:
    """Whether it has the form `ECOSYSTEM:NAME`, and is no path."""
    ecosystem, colon, _ = name.partition(":")
    return bool(colon) and "/" not in ecosystem and "." not in ecosystem


def find_ecosystem(name: str) -> Ecosystem:
    """Return the ecosystem of a name, with its package installed.

    Raises:
        PreflightError: There is none of this name, or it is not installed.
    """
    if name not in ECOSYSTEMS:
        raise PreflightError(
            f"There is no ecosystem {name!r}.",
            f"Known are: {', '.join(ECOSYSTEMS)}.",
            f"{did_you_mean(name, ECOSYSTEMS)} `trl-atropos env list` shows what is installed.",
        )
    ecosystem = ECOSYSTEMS[name]
    if not ecosystem.is_installed:
        raise PreflightError(
            f"The package of {name} is not installed: there is no module {ecosystem.module}.",
            f"It goes into a virtual environment of its own: {ecosystem.conflict}."
            if ecosystem.conflict
            else "Environments of other ecosystems come from their own packages.",
            f"Run {ecosystem.install_command}"
            + (f", and then .venv-{name}/bin/trl-atropos env." if ecosystem.conflict else "."),
        )
    return ecosystem


def open_source(name: str, options: dict[str, Any]) -> EnvironmentSource:
    """Return the source of `ECOSYSTEM:NAME`, after its first task was opened once.

    Args:
        name (`str`):
            Such as `reasoning-gym:chain_sum`.
        options (`dict[str, Any]`):
            Of the environment itself, as its ecosystem names them.

    Raises:
        PreflightError: The ecosystem or the name is unknown, its package is not installed, it does not take these options,
            or it lacks data, a key, the network or a further package.
    """
    prefix, _, task_name = name.partition(":")
    ecosystem = find_ecosystem(prefix)
    names = ecosystem.task_names()
    if task_name not in names and not ecosystem.is_name(task_name):
        raise PreflightError(
            f"{prefix} has no environment {task_name!r} for one policy.",
            f"It has {len(names)} that can be trained on." if names else f"It takes {ecosystem.what}.",
            f"{did_you_mean(task_name, names)} `trl-atropos env list {prefix}` shows all."
            if names
            else "Correct the URL, or name a directory with server/app.py.",
        )
    try:
        source = ecosystem.make(task_name, options)
        source.open(source.make_task(0)).close()
    except EpisodeError as exc:
        raise PreflightError(f"{name} cannot be opened. {exc.what}", exc.why, exc.fix) from exc
    except OPEN_FAULTS as exc:
        raise _explained(name, options, exc) from exc
    return source


def _explained(name: str, options: dict[str, Any], exc: Exception) -> PreflightError:
    """The error for an environment that could not be opened: what it lacks, as far as its own error says."""
    text = " ".join(word for word in COLOUR.sub("", str(exc)).split() if word.strip("*"))
    what = f"{name} cannot be opened: {type(exc).__name__}: {text[:MAX_ERROR_CHARACTERS].rstrip('.')}."
    if isinstance(exc, LookupError) and "nltk" in text.lower():
        return PreflightError(
            what,
            "It needs data of NLTK, which is downloaded once.",
            "Run python -m nltk.downloader words averaged_perceptron_tagger_eng where there is a network, and set "
            "NLTK_DATA to that directory.",
        )
    if "api" in text.lower() and "key" in text.lower():
        return PreflightError(
            what,
            "A part of it is played or judged by the model of a service.",
            "Set the key in the variable that its error names, or choose another of `trl-atropos env list`.",
        )
    says_what_to_install = INSTALL.search(text) is not None
    if isinstance(exc, ImportError) or says_what_to_install:
        module = exc.name if isinstance(exc, ImportError) and not says_what_to_install else None
        fix = f"Run pip install {module.partition('.')[0]}." if module else "Install what its error names."
        return PreflightError(what, "It needs a further package.", fix)
    if isinstance(exc, OSError) and not isinstance(exc, FileNotFoundError):
        return PreflightError(
            what, "It reads data from the network.", "Open it once where there is one, or choose another environment."
        )
    if options or "validation error" in text:
        return PreflightError(
            what,
            f"Its options are missing or wrong: it was given {options or 'none'}.",
            f"Correct --args; the options are those of {name.partition(':')[0]}.",
        )
    return PreflightError(
        what,
        "This version of its package does not run here.",
        "Choose another of `trl-atropos env list`, or install the version that it was written for.",
    )
