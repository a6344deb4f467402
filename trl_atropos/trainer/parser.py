"""The parser of the training script: TRL's, with the keys of AtroposSFTTrainer files, and help for a misspelled name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.hf_argparser import DataClass
from trl import TrlParser

from ..data.options import DataOptions, check_source
from ..errors import PreflightError, did_you_mean
from .seed_options import translate_seed_options
from .yaml_file import read_yaml


STRATEGIES = {"eval_strategy", "logging_strategy", "save_strategy"}
"""Options that take the word `no`, which YAML reads as false where it is not quoted."""


class AtroposParser(TrlParser):
    """`TrlParser` for `--config FILE.yaml` and options on the command line, which win.

    Deviations: (1) keys of AtroposSFTTrainer files are translated ([`~trainer.seed_options.translate_seed_options`]) and what each
    became is printed by the first process; (2) a name that is no option is refused with the nearest one, in the file and on
    the command line.

    Takes the arguments of [`~trl.TrlParser`].

    Example:

    ```python
    training_args, model_args = AtroposParser((AtroposConfig, ModelConfig)).parse_args_and_config()
    ```
    """

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[DataClass, ...]:
        """Parse the command line, and the file that `--config` names.

        Args:
            args (`Iterable[str]`, *optional*):
                The arguments to parse; those of the process if not given.
            return_remaining_strings (`bool`, *optional*, defaults to `False`):
                Return names that are no option, with their values, as a list after the instances, instead of refusing them.
            fail_with_unknown_args (`bool`, *optional*, defaults to `True`):
                Only the default is supported.
            separate_remaining_strings (`bool`, *optional*, defaults to `False`):
                Only the default is supported.

        Returns:
            `tuple[DataClass, ...]`: one instance per dataclass.

        Raises:
            `SystemExit`: with status 2 and a message: the file cannot be read, a name is no option, options contradict each
                other, or nothing says where rollouts come from.
        """
        if separate_remaining_strings or not fail_with_unknown_args:
            raise NotImplementedError("AtroposParser refuses names that are no option, or returns all of them.")
        try:
            return self._parse(list(sys.argv[1:] if args is None else args), return_remaining_strings)
        except (PreflightError, ValueError) as exc:
            # As argparse ends for a value of the wrong type, but without the list of all options.
            self.exit(2, f"{type(exc).__name__}: {exc}\n")
            raise AssertionError("exit() does not return") from exc

    def _parse(self, args: list[str], returns_unknown: bool) -> tuple[Any, ...]:
        rest, path = _take_config(args)
        of_file = [] if path is None else self._set_defaults(path)
        if of_file and not returns_unknown:
            self._refuse(f"The configuration file {path}", of_file[0].removeprefix("--"))
        *parsed, unknown = self.parse_args_into_dataclasses(args=rest, return_remaining_strings=True)
        if returns_unknown:
            return (*parsed, of_file + unknown)
        if unknown:
            flags = [text for text in unknown if text.startswith("-")]
            self._refuse("The command line", (flags or unknown)[0].split("=")[0], prefix="--")
        for args_of_class in parsed:
            if isinstance(args_of_class, DataOptions):
                # Before a model is loaded for nothing.
                check_source(args_of_class)
        return tuple(parsed)

    def _set_defaults(self, path: str) -> list[str]:
        """Take the values of a file; return the names that are no option, each followed by its value."""
        config, lines = translate_seed_options(_read(path))
        os.environ.update({name: str(value) for name, value in config.pop("env", {}).items()})
        if lines and os.environ.get("RANK", "0") == "0":
            title = f"{path} has keys of an AtroposSFTTrainer file:"
            self._print_message("\n  ".join([title, *lines]) + "\n", sys.stderr)
        for name in STRATEGIES & config.keys():
            if config[name] is False:
                config[name] = "no"
        return self.set_defaults_with_config(**config)

    def _refuse(self, where: str, name: str, prefix: str = "") -> None:
        known = [prefix + action.dest for action in self._actions]
        raise PreflightError(
            f"{where} has `{name}`, which is no option.",
            "A misspelled option would be ignored otherwise.",
            f"{did_you_mean(prefix + name.lstrip('-'), known)} All options: docs/config.md, or --help.",
        )


def _take_config(args: list[str]) -> tuple[list[str], str | None]:
    """Return the other arguments, and what `--config` says."""
    for index, argument in enumerate(args):
        if argument.startswith("--config="):
            return args[:index] + args[index + 1 :], argument.removeprefix("--config=")
        if argument == "--config" and index + 1 < len(args):
            return args[:index] + args[index + 2 :], args[index + 1]
    return args, None


def _read(path: str) -> Mapping[str, Any]:
    config = read_yaml(
        Path(path),
        f"The configuration file {path}",
        "It holds the options of the run.",
        "Pass an existing YAML file with --config, for example examples/configs/quickstart.yaml.",
    )
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise PreflightError(
            f"The configuration file {path} holds a {type(config).__name__}, not a mapping of names to values.",
            "Each option is one `name: value`.",
            "Compare it with examples/configs/quickstart.yaml.",
        )
    if not isinstance(config.get("env", {}), dict):
        raise PreflightError(
            f"`env` in the configuration file {path} is a {type(config['env']).__name__}.",
            "It sets environment variables, one `NAME: value` each.",
            "Correct or remove it.",
        )
    return config
