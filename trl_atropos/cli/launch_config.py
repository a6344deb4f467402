"""The file of `trl-atropos launch`, and the four command lines that follow from it."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import PreflightError


HOST = "127.0.0.1"
"""Everything is bound to the loopback address: neither the Atropos API nor vLLM's weight routes ask who calls."""


@dataclass(frozen=True)
class LaunchConfig:
    """What one launch runs. The meaning of each key is commented in `examples/configs/quickstart_launch.yaml`.

    Args:
        model_name_or_path (`str`):
            Hub id or directory of the checkpoint that is served and trained.
        run_dir (`str`):
            Directory of the logs, the trained model and the summary.
        env_command (`str`):
            Command line of the environment, without addresses and model.
        trainer_command (`str`):
            Command line of the trainer, without addresses, model and output directory.
        trainer_args (`str`, *optional*, defaults to `""`):
            Further arguments of the trainer, after all others.
        vllm_args (`dict`, *optional*):
            Arguments of `trl vllm-serve`; a mapping is passed as JSON, `None` makes a flag without a value.
        vllm_env, env_env, trainer_env (`dict[str, str]`, *optional*):
            Environment variables of the inference server, the environment, the trainer.
        startup_timeout_s (`float`, *optional*, defaults to `600.0`):
            How long the API and the inference server may take to be ready.
        prompts (`list[str]`, *optional*):
            Texts that the server continues before and after training.
        completion_args (`dict`, *optional*):
            Further fields of those requests to `/v1/completions`.
    """

    model_name_or_path: str
    run_dir: str
    env_command: str
    trainer_command: str
    trainer_args: str = ""
    vllm_args: dict[str, Any] = field(default_factory=dict)
    vllm_env: dict[str, str] = field(default_factory=dict)
    env_env: dict[str, str] = field(default_factory=dict)
    trainer_env: dict[str, str] = field(default_factory=dict)
    startup_timeout_s: float = 600.0
    prompts: list[str] = field(default_factory=list)
    completion_args: dict[str, Any] = field(default_factory=dict)

    @property
    def trainer_output_dir(self) -> Path:
        """Where the trainer saves the model and its state."""
        return Path(self.run_dir) / "model"

    @property
    def is_local_model(self) -> bool:
        """Whether the model is a directory of this machine."""
        return Path(self.model_name_or_path).is_dir()


_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "float": (int, float), "list[str]": (list,)}


def load_launch_config(path: Path, overrides: Mapping[str, Any]) -> LaunchConfig:
    """Read a launch file.

    Args:
        path (`Path`):
            The YAML file.
        overrides (`Mapping[str, Any]`):
            Values from the command line; None leaves the file's.

    Returns:
        [`LaunchConfig`]

    Raises:
        PreflightError: The file cannot be read, has an unknown key or a value of the wrong type, or lacks a key.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as exc:
        raise PreflightError(
            f"The launch file {path} cannot be read: {exc}.",
            "It names the commands to start.",
            "Pass an existing YAML file with `-c`, for example examples/configs/quickstart_launch.yaml.",
        ) from exc
    if not isinstance(content, dict):
        raise PreflightError(
            f"The launch file {path} holds a {type(content).__name__}, not a mapping.",
            "Each option is one `key: value`.",
            "Compare it with examples/configs/quickstart_launch.yaml.",
        )
    values = {**content, **{key: value for key, value in overrides.items() if value is not None}}
    for key, value in values.items():
        _check_key(path, str(key), value)
    missing = [
        known.name
        for known in fields(LaunchConfig)
        if known.default is MISSING and known.default_factory is MISSING and known.name not in values
    ]
    if missing:
        raise PreflightError(
            f"The launch file {path} lacks {', '.join(f'`{name}`' for name in missing)}.",
            "There is no sensible default.",
            "Add the key to the file.",
        )
    for key in ("vllm_env", "env_env", "trainer_env"):
        # YAML reads 1 and true as numbers and booleans; an environment holds text.
        values[key] = {name: str(value) for name, value in values.get(key, {}).items()}
    return LaunchConfig(**values)


def _check_key(path: Path, key: str, value: Any) -> None:
    annotations = {known.name: str(known.type) for known in fields(LaunchConfig)}
    if key not in annotations:
        nearest = difflib.get_close_matches(key, annotations, n=1, cutoff=0.0)[0]
        raise PreflightError(
            f"The launch file {path} has the unknown key `{key}`.",
            "A misspelled option would be ignored otherwise.",
            f"Did you mean `{nearest}`? All keys: {', '.join(annotations)}.",
        )
    expected = _TYPES.get(annotations[key], (dict,))
    if not isinstance(value, expected) or isinstance(value, bool):
        raise PreflightError(
            f"`{key}` in the launch file {path} is {value!r}, a {type(value).__name__}.",
            f"It must be of type {annotations[key]}.",
            "Correct the value.",
        )


def build_api_command(port: int) -> list[str]:
    """Return the command line of the Atropos API."""
    # run-api starts one worker. It must stay one: the queue lives in that process's memory.
    return ["run-api", "--host", HOST, "--port", str(port)]


def build_vllm_command(config: LaunchConfig, port: int) -> list[str]:
    """Return the command line of the inference server: TRL's, with our weight transport and the `/generate` route."""
    arguments: dict[str, Any] = {
        "weight-transfer-config": {"backend": "trl_atropos_shm"},
        "middleware": "trl_atropos.serving.generate_endpoint.GenerateEndpoint",
        **config.vllm_args,
    }
    command = ["trl", "vllm-serve", "--model", config.model_name_or_path, "--host", HOST, "--port", str(port)]
    for name, value in arguments.items():
        command.append(f"--{name}")
        if value is not None:
            command.append(json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    return command


def build_env_command(config: LaunchConfig, api_url: str, vllm_url: str) -> list[str]:
    """Return the command line of the environment. A flag that the user gave is not given again.

    The `--openai.*` flags reach an environment whose `config_init` returns a list with one server config. For a single
    object BaseEnv drops the address, and with several configs it refuses the flags.
    """
    command = shlex.split(config.env_command)
    flags = {
        "--env.rollout_server_url": api_url,
        "--env.tokenizer_name": config.model_name_or_path,
        "--env.use_wandb": "false",
        # An environment leaves by itself once the API has formed `total_steps` batches, which is before the trainer has
        # trained them. The launcher ends it instead.
        "--env.total_steps": str(2**31 - 1),
        "--openai.base_url": f"{vllm_url}/v1",
        "--openai.model_name": config.model_name_or_path,
        "--openai.tokenizer_name": config.model_name_or_path,
        "--openai.server_type": "vllm",
    }
    return command + _missing_flags(command, flags)


def build_trainer_command(config: LaunchConfig, api_url: str, vllm_url: str) -> list[str]:
    """Return the command line of the trainer. A flag that the user gave is not given again."""
    command = shlex.split(config.trainer_command) + shlex.split(config.trainer_args)
    flags = {
        "--model_name_or_path": config.model_name_or_path,
        "--atropos_api_url": api_url,
        "--vllm_server_base_url": vllm_url,
        "--output_dir": str(config.trainer_output_dir),
    }
    return command + _missing_flags(command, flags)


def _missing_flags(command: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    given = {argument.split("=", 1)[0] for argument in command}
    return [part for flag, value in flags.items() if flag not in given for part in (flag, value)]
