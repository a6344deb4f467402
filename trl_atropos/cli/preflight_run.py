"""What `trl-atropos preflight` does: read the files, the model and the servers, and run every check on them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from rich.console import Console
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from ..checks.api import API_CHECKS, inspect_api
from ..checks.finding import Finding, Unread, diagnose, examine
from ..checks.gateway import GATEWAY_CHECKS, GatewayFacts
from ..checks.machine import MACHINE_CHECKS
from ..checks.server import SERVER_CHECKS, TrainerSide
from ..checks.tokenizers import ENVIRONMENT_CHECKS, EnvironmentFacts
from ..checks.vllm import VLLM_CHECKS, inspect_inference_server
from ..errors import PreflightError, TrlAtroposError
from ..trainer.atropos_config import AtroposConfig
from ..trainer.parser import AtroposParser
from ..trainer.preflight import model_side, read_server_config
from ..trainer.run_facts import chat_ids, machine_facts, num_parameters, tokenizer_facts
from ..weight_sync.connecting import connect_server
from ..weight_sync.http import UNKNOWN, ServerSession
from ..wire.client import AtroposClient
from .findings import print_findings
from .gateway import add_arguments as add_gateway_arguments
from .gateway_look import look_at_server
from .launch.command_lines import (
    build_env_command,
    build_gateway_command,
    build_trainer_command,
    flag_value,
)
from .launch.config import SGLANG, LaunchConfig, load_launch_config
from .launch.gpus import split_gpus, visible_gpus
from .planned_server import check_sglang, planned_server, read_config_once, read_tokenizer_once
from .progress import say


TIMEOUT_S = 30.0
"""Longest wait for one answer of a server."""

API_FINDINGS = ("api_unreachable", "data_before_register", "registration_wiped", "other_registration")
VLLM_FINDINGS = ("vllm_unreachable", "vllm_without_dev_mode", "vllm_without_generate", "vllm_paused")
GATEWAY_FINDINGS = ("gateway_token_routes", "gateway_temperature", "gateway_lengths")
"""What counts before a trainer starts; `trl-atropos doctor` looks for the rest while it runs."""

NO_MODEL = Unread("No model is named: --model.")
NO_TRAINER = Unread("The options of the trainer are not known: -c or --config.")


@dataclass(frozen=True)
class Preflight:
    """What a preflight is told: the launch file, the training script's `--config` file, servers that run already.

    `api_url`, `vllm_url` and `model` (path or Hub id of the trainer's model) default to those that the files name.
    """

    launch_file: Path | None = None
    trainer_file: Path | None = None
    api_url: str | None = None
    vllm_url: str | None = None
    model: str | None = None


def run_preflight(told: Preflight, as_json: bool = False) -> list[Finding]:
    """Check everything that can be checked, print a table or one JSON array, and return one finding a check."""
    transformers.logging.set_verbosity_error()
    findings: list[Finding] = []
    launch = _load_launch(told, findings)
    args, model_args = _load_trainer(told, launch, findings)
    if told.trainer_file is not None and args is not None:
        told = replace(
            told,
            api_url=told.api_url or args.atropos_api_url,
            vllm_url=told.vllm_url or (args.vllm_server_base_url if args.data_path is None else None),
        )
    if launch is not None:
        told = replace(told, api_url=launch.api_url, vllm_url=launch.vllm_url)
    name = told.model
    if name is None and model_args is not None:
        name = model_args.model_name_or_path
    if name is None and launch is not None:
        name = launch.model_name_or_path
    say(f"Reading the model {name}" if name else "No model is named")
    trainer = _trainer_side(name, args)
    findings += _machine(launch, args, model_args, trainer)
    findings += _environments(launch, trainer)
    findings += _gateway(launch, args)
    findings += _api(told.api_url, args)
    for url in (told.vllm_url or "").split(","):
        findings += _server(url.strip(), launch, trainer)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print_findings(Console(), findings)
    return findings


def _load_launch(told: Preflight, findings: list[Finding]) -> LaunchConfig | None:
    if told.launch_file is None:
        return None
    try:
        launch = load_launch_config(told.launch_file, {"api_url": told.api_url, "vllm_url": told.vllm_url})
    except PreflightError as exc:
        findings.append(_as_finding("launch_file", exc))
        return None
    findings.append(Finding("launch_file", "ok", f"{told.launch_file} can be launched."))
    return launch


def _load_trainer(
    told: Preflight, launch: LaunchConfig | None, findings: list[Finding]
) -> tuple[AtroposConfig | None, ModelConfig | None]:
    """Parse the trainer's options as the training script does."""
    if told.trainer_file is not None:
        arguments = ["--config", str(told.trainer_file)]
    elif launch is not None and launch.has_trainer:
        command = build_trainer_command(
            launch, launch.api_url or "http://127.0.0.1", launch.vllm_url or "http://127.0.0.1"
        )
        scripts = [i for i, part in enumerate(command) if part.endswith(".py")]
        if not scripts:
            what = "Not checked: `trainer_command` runs no .py file, so its options are not known."
            findings.append(Finding("trainer_options", "unknown", what))
            return None, None
        arguments = command[scripts[-1] + 1 :]
    else:
        return None, None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser = AtroposParser((AtroposConfig, ModelConfig))
            args, model_args, *unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except (ValueError, OSError, SystemExit) as exc:
        reason = said.getvalue().strip().splitlines()[-1:] if isinstance(exc, SystemExit) else [str(exc)]
        what = f"The trainer does not take its options: {' '.join(reason)}"
        findings.append(Finding("trainer_options", "error", what, "It would end at its start.", "Correct them."))
        return None, None
    if unknown[0]:
        what = f"Options that are not AtroposConfig's or ModelConfig's: {shlex.join(map(str, unknown[0]))}."
        why = "examples/scripts/atropos.py refuses them; a script of your own may take them."
        findings.append(
            Finding("trainer_options", "warning", what, why, "Correct their names if they are misspelled.")
        )
    else:
        findings.append(
            Finding("trainer_options", "ok", f"The options of the trainer are valid: {shlex.join(arguments)}.")
        )
    return args, model_args


def _trainer_side(name: str | None, args: AtroposConfig | None) -> TrainerSide:
    if args is None:
        side = TrainerSide(
            max_length=NO_TRAINER, device=NO_TRAINER, weight_sync_mode=NO_TRAINER, vllm_enable_sleep_mode=NO_TRAINER
        )
    else:
        side = TrainerSide(
            max_length=args.max_length,
            device=args.device.type,
            weight_sync_mode=args.weight_sync_mode,
            vllm_enable_sleep_mode=args.vllm_enable_sleep_mode,
        )
    if name is None:
        return replace(
            side,
            tokenizer=NO_MODEL,
            chat_ids=NO_MODEL,
            model=NO_MODEL,
            num_parameters=NO_MODEL,
            longrope_boundary=NO_MODEL,
        )
    tokenizer = read_tokenizer_once(name)
    is_unread = isinstance(tokenizer, Unread)
    model = read_config_once(name)
    return replace(
        side,
        tokenizer=tokenizer if is_unread else tokenizer_facts(tokenizer),
        chat_ids=tokenizer if is_unread else chat_ids(tokenizer),
        num_parameters=model if isinstance(model, Unread) else _count_parameters(model),
        **({"model": model, "longrope_boundary": model} if isinstance(model, Unread) else model_side(model)),
    )


def _count_parameters(model_config: Any) -> int | Unread:
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(model_config)
            # Loading the empty weights has undone it.
            model.tie_weights()
            return num_parameters(model)
    except (ValueError, ImportError) as exc:
        return Unread(f"The model cannot be made from its config: {exc}.")


def _machine(
    launch: LaunchConfig | None, args: AtroposConfig | None, model_args: ModelConfig | None, trainer: TrainerSide
) -> list[Finding]:
    findings: list[Finding] = []
    no_launch = Unread("Which GPUs server and trainer take is in a launch file: -c.")
    gpu_split: dict[str, str] | Unread = no_launch
    num_gpus: int | Unread = no_launch
    extras: set[str] = set()
    ports: dict[str, int] = {} if args is None else {"vllm_group_port": args.vllm_group_port}
    if launch is not None:
        extras |= {
            extra for extra, url in (("atropos", launch.api_url), (launch.server, launch.vllm_url)) if url is None
        }
        ports |= {"api_port": launch.api_port, "vllm_port": launch.vllm_port, "gateway_port": launch.gateway_port}
        try:
            num_gpus = len(visible_gpus())
            gpu_split = {name: env["CUDA_VISIBLE_DEVICES"] for name, env in split_gpus(launch).items()}
        except PreflightError as exc:
            findings.append(_as_finding("gpu_separation", exc))
    saved = trainer.num_parameters
    if model_args is not None and model_args.use_peft:
        saved = Unread("The size of an adapter is not known before it is made.")
    facts = machine_facts(args, saved, required_extras=extras, ports=ports, num_gpus=num_gpus, gpu_split=gpu_split)
    known = {finding.name for finding in findings}
    return findings + [finding for finding in examine(facts, MACHINE_CHECKS) if finding.name not in known]


def _environments(launch: LaunchConfig | None, trainer: TrainerSide) -> list[Finding]:
    if launch is not None and launch.agents and not launch.environments:
        # A gateway has no tokenizer: the server renders.
        return []
    if launch is None or not launch.environments:
        what = "Not checked: the environments' tokenizers are in a launch file: -c."
        return [Finding("environment_tokenizer", "unknown", what)]
    findings: list[Finding] = []
    for name, environment in launch.environments.items():
        command = build_env_command(launch, environment, "http://127.0.0.1", "http://127.0.0.1")
        tokenizer = read_tokenizer_once(flag_value(command, "--env.tokenizer_name") or launch.model_name_or_path)
        facts = tokenizer if isinstance(tokenizer, Unread) else tokenizer_facts(tokenizer)
        findings += examine(EnvironmentFacts(name, facts, trainer.tokenizer), ENVIRONMENT_CHECKS)
    return findings


def _gateway(launch: LaunchConfig | None, args: AtroposConfig | None) -> list[Finding]:
    """Look at what is known of the gateway that a launch is going to start."""
    if launch is None or not launch.has_gateway:
        return []
    said = io.StringIO()
    parser = argparse.ArgumentParser()
    add_gateway_arguments(parser.add_subparsers())
    try:
        command = build_gateway_command(launch, 1, launch.api_url or "http://127.0.0.1", "http://127.0.0.1")
        with contextlib.redirect_stderr(said):
            options = parser.parse_args(command[1:])
    except PreflightError as exc:
        return [_as_finding("gateway_options", exc)]
    except SystemExit:
        what = f"The gateway does not take its options: {' '.join(said.getvalue().strip().splitlines()[-1:])}"
        return [Finding("gateway_options", "error", what, "It would end at its start.", "Correct `gateway_args`.")]
    missing: Any = {}
    if launch.vllm_url is not None:
        key = os.environ.get("VLLM_API_KEY")
        looks = {url: look_at_server(url, key, TIMEOUT_S) for url in launch.external_server_urls}
        seen = {url: look[0] for url, look in looks.items() if look is not None and look[0] is not None}
        missing = seen or Unread("The server does not show its routes.")
    facts = GatewayFacts(
        "127.0.0.1 (to be started)",
        missing_routes=missing,
        temperature=options.temperature,
        trainer_temperature=NO_TRAINER if args is None else args.temperature,
        max_rollout_tokens=options.max_rollout_tokens,
        max_length=NO_TRAINER if args is None else args.max_length,
    )
    return examine(facts, [check for check in GATEWAY_CHECKS if check.name in GATEWAY_FINDINGS])


def _api(url: str | None, args: AtroposConfig | None) -> list[Finding]:
    if url is None:
        return [Finding("api", "unknown", "Not checked: no Atropos API is named: --api_url.")]
    try:
        with AtroposClient(url, connect_timeout_s=TIMEOUT_S, read_timeout_s=TIMEOUT_S) as client:
            say(f"Asking the Atropos API at {client.base_url} (at most {TIMEOUT_S:g} s per answer)")
            facts = inspect_api(
                client,
                watch_s=0.0,
                expected_batch_size=None if args is None else args.atropos_batch_size,
                # A trainer registers one more: environments drop a group at max_token_len.
                expected_max_token_len=None if args is None else args.max_length + 1,
            )
    except PreflightError as exc:
        return [_as_finding("api", exc)]
    checks = [check for check in API_CHECKS if check.name in API_FINDINGS]
    return diagnose(facts, checks) or [Finding("api", "ok", f"The Atropos API at {facts.url} takes a trainer.")]


def _server(url: str, launch: LaunchConfig | None, trainer: TrainerSide) -> list[Finding]:
    if not url:
        if launch is None or launch.vllm_url is not None:
            return [Finding("vllm", "unknown", "Not checked: no inference server is named: --vllm_url.")]
        return _planned(launch, trainer)
    key = os.environ.get("VLLM_API_KEY")
    try:
        with ServerSession(url.rstrip("/"), TIMEOUT_S, key, kind=UNKNOWN) as session:
            say(f"Asking the inference server at {session.base_url} (at most {TIMEOUT_S:g} s per answer)")
            checks = [check for check in VLLM_CHECKS if check.name in VLLM_FINDINGS]
            facts = inspect_inference_server(session)
        findings = diagnose(facts, checks)
        if any(finding.name in ("vllm_unreachable", "vllm_without_dev_mode") for finding in findings):
            return findings
        if not findings:
            what = f"The {facts.kind} server at {facts.url} has the routes of a publish, answers /generate and is not frozen."
            findings.append(Finding("vllm", "ok", what))
        client = connect_server(url, connection_timeout=TIMEOUT_S, request_timeout=TIMEOUT_S, api_key=key)
        return findings + examine(read_server_config(client, trainer), SERVER_CHECKS)
    except TrlAtroposError as exc:
        return [_as_finding("vllm", exc)]


def _planned(launch: LaunchConfig, trainer: TrainerSide) -> list[Finding]:
    findings = [check_sglang(launch)] if launch.server == SGLANG else []
    return findings + examine(planned_server(launch, trainer), SERVER_CHECKS)


def _as_finding(name: str, error: TrlAtroposError) -> Finding:
    return Finding(name, "error", error.what, error.why, error.fix)
