"""What `trl-atropos preflight` knows of an inference server that a launch is going to start: what its arguments tell."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..checks.finding import Finding, Unread
from ..checks.server import ServerConfigFacts, TrainerSide
from ..errors import PreflightError
from ..trainer.preflight import describe_model, segment_bytes
from ..trainer.run_facts import chat_ids, free_bytes, read_tokenizer, tokenizer_facts
from ..weight_sync.http import SGLANG as SGLANG_KIND
from ..weight_sync.sglang import FLOOR
from ..weight_sync.transports.backends import SGLANG_GLOO_BACKEND, SGLANG_NCCL_BACKEND, SHARED_MEMORY_BACKEND
from ..weight_sync.transports.shm_segment import SEGMENT_DIR
from .launch.command_lines import DEFAULT_VLLM_ARGS
from .launch.config import SGLANG, LaunchConfig
from .launch.gpus import visible_gpus


ASK_PYTHON_S = 30.0
"""Longest wait for another interpreter to say which packages it has."""

NOT_RUNNING = Unread("The launch starts the server; `preflight --vllm_url` asks one that runs.")
URL = "127.0.0.1 (to be started)"

# Each name is read once: without a network, the Hub is asked for long.
read_tokenizer_once = functools.cache(read_tokenizer)


@functools.cache
def read_config_once(name: str) -> Any:
    """The config of a model, or why it cannot be read here."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as exc:
        return Unread(f"The config of {name} cannot be read here ({type(exc).__name__}).")


def planned_server(launch: LaunchConfig, trainer: TrainerSide) -> ServerConfigFacts:
    """Return the facts of the server of either kind, as far as its arguments tell them."""
    return _planned_sglang(launch, trainer) if launch.server == SGLANG else _planned_vllm(launch, trainer)


def _planned_vllm(launch: LaunchConfig, trainer: TrainerSide) -> ServerConfigFacts:
    given = {name.replace("-", "_"): value for name, value in {**DEFAULT_VLLM_ARGS, **launch.vllm_args}.items()}
    no_length = Unread("`vllm_args` has no max_model_len, so vLLM takes that of the model.")
    config = read_config_once(launch.model_name_or_path)
    dtype = str(given.get("dtype", "auto") if given.get("dtype", "auto") != "auto" else getattr(config, "dtype", None))
    has_dtype = dtype.removeprefix("torch.") in ("float32", "float16", "bfloat16")
    backend = (given["weight_transfer_config"] or {}).get("backend")
    size: int | Unread = segment_bytes(trainer, dtype.removeprefix("torch.")) if has_dtype else NOT_RUNNING
    if backend != SHARED_MEMORY_BACKEND:
        size = 0
    return ServerConfigFacts.beside(
        trainer,
        url=URL,
        backend=backend,
        # What `trl vllm-serve` sets itself.
        logprobs_mode=given.get("logprobs_mode", "processed_logprobs"),
        max_model_len=given.get("max_model_len", no_length),
        knows_policy_versions="GenerateEndpoint" in str(given["middleware"]),
        loads_adapters=bool({**os.environ, **launch.vllm_env}.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING")),
        segment_bytes=size,
        **_same_of_both_kinds(launch, given, given.get("tokenizer")),
    )


def _planned_sglang(launch: LaunchConfig, trainer: TrainerSide) -> ServerConfigFacts:
    given = {name.replace("-", "_"): value for name, value in launch.sglang_args.items()}
    no_length = Unread("`sglang_args` has no context-length, so SGLang takes that of the model.")
    return ServerConfigFacts.beside(
        trainer,
        url=URL,
        kind=SGLANG_KIND,
        backend=_sglang_backend(given.get("device")),
        # SGLang divides the logits by the temperature before it takes logprobs.
        logprobs_mode="processed_logprobs",
        max_model_len=given.get("context_length", no_length),
        knows_policy_versions=False,
        loads_adapters=False,
        segment_bytes=0,
        **_same_of_both_kinds(launch, given, given.get("tokenizer_path")),
    )


def _sglang_backend(device: str | None) -> str | Unread:
    if device is None:
        try:
            device = "cuda" if visible_gpus() else "cpu"
        except PreflightError as exc:
            return Unread(exc.what)
    return SGLANG_NCCL_BACKEND if device == "cuda" else SGLANG_GLOO_BACKEND


def _same_of_both_kinds(launch: LaunchConfig, given: dict[str, Any], tokenizer_name: str | None) -> dict[str, Any]:
    tokenizer = read_tokenizer_once(tokenizer_name or launch.model_name_or_path)
    config = read_config_once(launch.model_name_or_path)
    is_unread = isinstance(tokenizer, Unread)
    return {
        "served_name": launch.model_name_or_path,
        "has_tokenizer": "skip_tokenizer_init" not in given,
        "has_lora": "enable_lora" in given,
        "served_model": config if isinstance(config, Unread) else describe_model(config),
        "served_tokenizer": tokenizer if is_unread else tokenizer_facts(tokenizer),
        "served_chat_ids": NOT_RUNNING if is_unread else _planned_chat_ids(tokenizer, given.get("chat_template")),
        "free_shared_memory_bytes": free_bytes(SEGMENT_DIR),
    }


def _planned_chat_ids(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[int, ...] | Unread | None:
    """What the server will make of a conversation: by its `--chat-template`, where that is a file, or its tokenizer's."""
    if template is None:
        return chat_ids(tokenizer)
    try:
        return chat_ids(tokenizer, Path(template).read_text(encoding="utf-8"))
    except OSError:
        return Unread(f"`--chat-template {template}` is no file here.")


def check_sglang(launch: LaunchConfig) -> Finding:
    """Look whether the interpreter that will start SGLang has it, in a version to which policies can be published."""
    name = "sglang_version"
    python = launch.sglang_python or sys.executable
    code = "import importlib.metadata as metadata; print(metadata.version('sglang'))"
    fix = f"Install SGLang {FLOOR} or newer there, or name another interpreter in `sglang_python`."
    try:
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=ASK_PYTHON_S)
        found = asked.stdout.strip()
        if asked.returncode:
            reason = f"{python} has no SGLang: {' '.join(asked.stderr.strip().splitlines()[-1:])}."
        elif Version(found) < Version(FLOOR):
            reason = f"{python} has SGLang {found}."
        else:
            return Finding(name, "ok", f"{python} has SGLang {found}.")
    except (OSError, subprocess.TimeoutExpired, InvalidVersion) as exc:
        return Finding(name, "unknown", f"Not checked: {python} does not say which SGLang it has ({exc}).")
    return Finding(name, "error", reason, f"The launch starts it there, and a publish needs {FLOOR}.", fix)
