"""Which GPUs the inference server and the trainer of a launch see."""

from __future__ import annotations

import os
import subprocess

from ...errors import PreflightError
from .command_lines import trainer_option
from .config import SGLANG, LaunchConfig


NVIDIA_SMI_TIMEOUT_S = 30.0


def visible_gpus() -> list[str]:
    """Return the entries that `CUDA_VISIBLE_DEVICES` of a child may have: this process's own, or all of the machine.

    Raises:
        PreflightError: `nvidia-smi` is there and fails.
    """
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    if own is not None:
        return [part.strip() for part in own.split(",") if part.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True)
    except FileNotFoundError:
        return []
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
        raise PreflightError(
            f"The GPUs of this machine cannot be listed: {exc}.",
            "`nvidia-smi` is installed, and its driver does not answer.",
            "Run `nvidia-smi` and mend what it reports.",
        ) from exc
    return listed.stdout.split()


def split_gpus(config: LaunchConfig) -> dict[str, dict[str, str]]:
    """Return the environment variables that give `vllm`, a server of either kind, and `trainer` their GPUs; empty if the file names no GPUs.

    Several servers, `vllm-1` and so on, get equal shares of `vllm_gpus` in their order.

    The numbers of `vllm_gpus` and `trainer_gpus` count what this process sees: with `CUDA_VISIBLE_DEVICES=4,5`, GPU 1
    is the device 5.

    Raises:
        PreflightError: What stands there is no number, a GPU that does not exist, or one that the other process has, too; or the
            servers cannot share theirs equally.
    """
    told = {
        name: _parse(name, gpus)
        for name, gpus in (("vllm_gpus", config.vllm_gpus), ("trainer_gpus", config.trainer_gpus))
        if gpus is not None
    }
    if not told:
        return {}
    needed = {"vllm_gpus": config.vllm_url is None, "trainer_gpus": config.has_trainer}
    forgotten = [name for name, is_needed in needed.items() if is_needed and name not in told]
    if forgotten:
        raise PreflightError(
            f"`{next(iter(told))}` is given and `{forgotten[0]}` is not.",
            "The other process would see all GPUs, and take memory of these, too.",
            f"Name its GPUs in `{forgotten[0]}`.",
        )
    visible = visible_gpus()
    for name, gpus in told.items():
        if max(gpus) >= len(visible):
            raise PreflightError(
                f"`{name}` names GPU {max(gpus)}, and {len(visible)} can be seen here.",
                "They are counted from 0, within CUDA_VISIBLE_DEVICES if it is set.",
                f"Correct `{name}`, or leave out `vllm_gpus` and `trainer_gpus` on a machine without GPUs.",
            )
    _check_overlap(config, told)
    return {
        name: {"CUDA_VISIBLE_DEVICES": ",".join(visible[gpu] for gpu in gpus)}
        for name, gpus in _shares(config, told).items()
    }


def _shares(config: LaunchConfig, told: dict[str, list[int]]) -> dict[str, list[int]]:
    """The GPUs of each process by its name."""
    shares = {name.removesuffix("_gpus"): gpus for name, gpus in told.items()}
    if config.num_servers == 1 or "vllm" not in shares:
        return shares
    of_servers = shares.pop("vllm")
    size, num_left = divmod(len(of_servers), config.num_servers)
    if num_left or not size:
        raise PreflightError(
            f"`vllm_gpus` names {len(of_servers)} GPUs for {config.num_servers} servers.",
            "Each gets as many as the others, in the order of the list.",
            "Name a multiple of `num_servers`, or start fewer servers.",
        )
    parts = [of_servers[start : start + size] for start in range(0, len(of_servers), size)]
    return {**shares, **{f"vllm-{number}": part for number, part in enumerate(parts, 1)}}


def _parse(name: str, gpus: str) -> list[int]:
    parts = [part.strip() for part in gpus.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise PreflightError(
            f"`{name}` is {gpus!r}.",
            "It lists the GPUs by number, each once.",
            'Write it like "0,1".',
        )
    return [int(part) for part in parts]


def _check_overlap(config: LaunchConfig, told: dict[str, list[int]]) -> None:
    shared = sorted(set(told.get("vllm_gpus", [])) & set(told.get("trainer_gpus", [])))
    if not shared or (
        _server_may_sleep(config) and str(trainer_option(config, "vllm_enable_sleep_mode")).lower() == "true"
    ):
        return
    fix = (
        "Name different GPUs."
        if config.server == SGLANG
        else "Name different GPUs, or take turns: `enable-sleep-mode: null` in `vllm_args` and `--vllm_enable_sleep_mode true` "
        "in `trainer_args`."
    )
    raise PreflightError(
        f"`vllm_gpus` and `trainer_gpus` both name GPU {', '.join(map(str, shared))}.",
        "Server and trainer would hold its memory at the same time, and one of them would run out of it.",
        fix,
    )


def _server_may_sleep(config: LaunchConfig) -> bool:
    given = {name.replace("_", "-"): value for name, value in config.vllm_args.items()}
    # None makes a flag without a value.
    return given.get("enable-sleep-mode", False) in (None, True)
