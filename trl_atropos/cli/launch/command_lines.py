"""The command lines that follow from a launch file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import PreflightError
from ...gateway.counts_file import COUNTS_VARIABLE
from ...gateway.options import GROUP, NONE, SCALE_REWARDS_VARIABLE, TEMPERATURE_VARIABLE
from ...trainer.yaml_file import read_yaml
from ...weight_sync.transports.backends import MIDDLEWARE, SHARED_MEMORY_BACKEND
from ..gateway import DEFAULT_GROUP_SIZE
from .config import DURABLE_API, SGLANG, EnvironmentConfig, LaunchConfig


HOST = "127.0.0.1"
"""Everything is bound to the loopback address: neither the Atropos API nor the weight routes of servers ask who calls."""

DEFAULT_VLLM_ARGS: dict[str, Any] = {
    "weight-transfer-config": {"backend": SHARED_MEMORY_BACKEND},
    "middleware": MIDDLEWARE,
}
"""Arguments of `trl vllm-serve` unless `vllm_args` names others."""


OPTIONS_OF_THE_TRAINER = {
    "temperature": "temperature",
    "scale_rewards": "scale_rewards",
    "max_rollout_tokens": "max_length",
}
"""Option of the gateway -> the trainer's that says the same."""

BASE_URL = "--openai.base_url"
"""The flag of an environment that says where it generates."""

AGENT_VARIABLES = ("TRL_ATROPOS_GATEWAY_URL", "TRL_ATROPOS_GATEWAY_KEY", "TRL_ATROPOS_GROUP_SIZE")


def build_api_command(config: LaunchConfig, port: int) -> list[str]:
    """Return the command line of the Atropos API."""
    if config.api == DURABLE_API:
        return ["trl-atropos", "api", "--db", str(config.api_database), "--host", HOST, "--port", str(port)]
    # run-api starts one worker. It must stay one: the queue lives in that process's memory.
    return ["run-api", "--host", HOST, "--port", str(port)]


def build_server_command(config: LaunchConfig, port: int) -> list[str]:
    """Return the command line of the inference server.

    vLLM is started by TRL's command, with our weight transport and the `/generate` route; SGLang as it is.
    """
    if config.server == SGLANG:
        python = config.sglang_python or sys.executable
        command = [python, "-m", "sglang.launch_server", "--model-path", config.model_name_or_path]
        arguments = config.sglang_args
    else:
        command = ["trl", "vllm-serve", "--model", config.model_name_or_path]
        arguments = {**DEFAULT_VLLM_ARGS, **config.vllm_args}
    command += ["--host", HOST, "--port", str(port)]
    for name, value in arguments.items():
        command.append(f"--{name}")
        if value is not None:
            command.append(json.dumps(value) if isinstance(value, (dict, list)) else str(value))
    return command


def build_gateway_command(config: LaunchConfig, port: int, api_url: str, vllm_url: str) -> list[str]:
    """Return the command line of the gateway; `vllm_url` has commas between several servers.

    What it shares with the trainer is the trainer's, as far as that is told, unless `gateway_args` say otherwise.

    Raises:
        PreflightError: The file of the trainer's `--config` cannot be read.
    """
    command = ["trl-atropos", "gateway", "--servers", vllm_url, "--api_url", api_url]
    command += ["--host", HOST, "--port", str(port), "--key_file", str(config.gateway_key_file)]
    command += ["--environment_key_file", str(config.environment_key_file)]
    for name, value in gateway_arguments(config).items():
        command += [f"--{name}", str(value)]
    return command


def gateway_arguments(config: LaunchConfig) -> dict[str, Any]:
    """Return the options of the gateway that are not addresses, by their names.

    Raises:
        PreflightError: The file of the trainer's `--config` cannot be read, or it scales rewards in a way that a gateway of agents
            cannot.
    """
    of_trainer = {
        name: trainer_option(config, option) if config.has_trainer else None
        for name, option in OPTIONS_OF_THE_TRAINER.items()
    }
    of_trainer["scale_rewards"] = _in_words(of_trainer["scale_rewards"])
    own = {name.replace("-", "_"): value for name, value in config.gateway_args.items()}
    arguments = {name: value for name, value in of_trainer.items() if value is not None} | own
    scale_rewards = arguments.get("scale_rewards")
    if scale_rewards in (None, GROUP, NONE) or "scale_rewards" in own:
        return arguments
    if config.agents or config.gateway:
        raise PreflightError(
            f"The trainer has --scale_rewards {scale_rewards}, and agents behind a gateway are to be trained.",
            "Where an agent rewrote its history, or turns have rewards, the gateway computes advantages per task, before there is a "
            "batch.",
            f"Set `scale_rewards: {GROUP}` or `{NONE}` in `gateway_args` for those, or give the trainer one of the two.",
        )
    # Environments alone are behind it, which compute their advantages themselves or leave it to the trainer.
    del arguments["scale_rewards"]
    return arguments


def agent_env(config: LaunchConfig, gateway_url: str, key: str) -> dict[str, str]:
    """Return the variables by which an agent finds the gateway, and the number of sessions of one task."""
    group_size = gateway_arguments(config).get("group_size", DEFAULT_GROUP_SIZE)
    return dict(zip(AGENT_VARIABLES, (gateway_url, key, str(group_size)), strict=True))


def environment_env(config: LaunchConfig) -> dict[str, str]:
    """Return the variables that tell an `AgentEnv` of the launch what a gateway is told in options. Other environments do not look at
    them; a flag they would refuse.

    Raises:
        PreflightError: The file of the trainer's `--config` cannot be read.
    """
    told = {COUNTS_VARIABLE: str(config.gateway_counts_dir)}
    if config.has_trainer:
        of_trainer = {
            TEMPERATURE_VARIABLE: trainer_option(config, OPTIONS_OF_THE_TRAINER["temperature"]),
            SCALE_REWARDS_VARIABLE: _in_words(trainer_option(config, OPTIONS_OF_THE_TRAINER["scale_rewards"])),
        }
        told |= {name: str(value) for name, value in of_trainer.items() if value is not None}
    return told


def _in_words(scale_rewards: Any) -> str | None:
    """`--scale_rewards` of a trainer, which takes the booleans of TRL, too; None if it is not told."""
    return (
        None if scale_rewards is None else {"True": GROUP, "False": NONE}.get(str(scale_rewards), str(scale_rewards))
    )


def build_env_command(
    config: LaunchConfig, environment: EnvironmentConfig, api_url: str, model_url: str, key: str | None = None
) -> list[str]:
    """Return the command line of an environment. A flag that the user gave is not given again, and `key` not to a server of the
    user's own.

    The `--openai.*` flags reach an environment whose `config_init` returns a list with one server config. For a single
    object BaseEnv drops the address, and with several configs it refuses the flags.
    """
    command = shlex.split(environment.command)
    if flag_value(command, BASE_URL) is not None:
        key = None
    return command + _missing_flags(command, env_flags(config, api_url, model_url, key))


def env_flags(config: LaunchConfig, api_url: str, model_url: str, key: str | None = None) -> dict[str, str]:
    """Return the flags that connect an environment to the run. `model_url` is that of the inference server, or of the gateway
    with the `key` that it asks for.
    """
    return {
        "--env.rollout_server_url": api_url,
        "--env.tokenizer_name": config.model_name_or_path,
        "--env.use_wandb": "false",
        # An environment leaves by itself once the API has formed `total_steps` batches, which is before the trainer has
        # trained them. The launcher ends it instead.
        "--env.total_steps": str(2**31 - 1),
        BASE_URL: f"{model_url}/v1",
        "--openai.model_name": config.model_name_or_path,
        "--openai.tokenizer_name": config.model_name_or_path,
        "--openai.server_type": config.server,
        **({} if key is None else {"--openai.api_key": key}),
    }


def build_trainer_command(config: LaunchConfig, api_url: str, vllm_url: str) -> list[str]:
    """Return the command line of the trainer. A flag that the user gave is not given again."""
    command = shlex.split(config.trainer_command) + shlex.split(config.trainer_args)
    return command + _missing_flags(command, trainer_flags(config, api_url, vllm_url))


def trainer_flags(config: LaunchConfig, api_url: str, vllm_url: str) -> dict[str, str]:
    """Return the flags that connect a trainer to the run."""
    return {
        "--model_name_or_path": config.model_name_or_path,
        "--atropos_api_url": api_url,
        "--vllm_server_base_url": vllm_url,
        "--output_dir": str(config.trainer_output_dir),
    }


def flag_value(command: Sequence[str], flag: str) -> str | None:
    """Return the value that a command line gives a flag, in either spelling; the last one wins, None if there is none."""
    value = None
    for i, argument in enumerate(command):
        if argument.startswith(f"{flag}="):
            value = argument.partition("=")[2]
        elif argument == flag:
            has_value = i + 1 < len(command) and not command[i + 1].startswith("--")
            value = command[i + 1] if has_value else "true"
    return value


def trainer_option(config: LaunchConfig, name: str) -> Any:
    """Return an option of the trainer as its command line gives it, or else the file of its `--config`; None if neither does.

    Raises:
        PreflightError: That file cannot be read.
    """
    command = shlex.split(config.trainer_command) + shlex.split(config.trainer_args)
    value = flag_value(command, f"--{name}")
    # The last one is the script's; an earlier one may be that of `accelerate launch`.
    path = flag_value(command, "--config")
    if value is not None or path is None:
        return value
    content = read_yaml(
        Path(path),
        f"The file {path} of the trainer's --config",
        "The trainer would end at its start.",
        "Correct `trainer_command` of the launch file.",
    )
    return content.get(name) if isinstance(content, dict) else None


def _missing_flags(command: Sequence[str], flags: Mapping[str, str]) -> list[str]:
    given = {argument.split("=", 1)[0] for argument in command}
    return [part for flag, value in flags.items() if flag not in given for part in (flag, value)]
