"""What must fit together before training starts: the server's settings, its model, and the trainer's model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checks.finding import NOT_ASKED, Check, FactsT, Finding, Unread, examine, known
from ..checks.machine import MACHINE_CHECKS
from ..checks.server import SERVER_CHECKS, ServerConfigFacts, TrainerSide
from ..errors import PreflightError, VLLMServerError
from ..policy.rotary import longrope_boundary
from ..weight_sync.inference_server import InferenceServer
from ..weight_sync.transports.backends import SHARED_MEMORY_BACKEND
from ..weight_sync.transports.shm_segment import SEGMENT_DIR
from .atropos_config import AtroposConfig
from .run_facts import (
    CONVERSATION,
    chat_ids,
    free_bytes,
    machine_facts,
    num_parameters,
    read_tokenizer,
    tokenizer_facts,
)


logger = logging.getLogger(__name__)

WAIT_POLICY = "OMP_WAIT_POLICY"
"""Variable that tells the threads of OpenMP how to wait for each other; they read it once, when torch is imported."""

COMPARED_CONFIG_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class ServerFacts:
    """What the trainer needs to know of an inference server.

    `backend` is its weight transfer backend, and `dtype` is what it serves in. `has_processed_logprobs` says whether
    its logprobs are those after temperature, and `knows_policy_versions` whether it remembers which policy sampled a
    rollout (`serving.generate_endpoint`).
    """

    backend: str
    dtype: torch.dtype
    has_processed_logprobs: bool
    knows_policy_versions: bool


def check_launch(accelerator: Accelerator, num_gpus: int) -> None:
    """Check that accelerate knows of all processes, and that each has one of the GPUs at most.

    `num_gpus` is how many GPUs transformers would spread the model of this process over.

    Raises:
        [`PreflightError`]: accelerate counts other processes, so that gradients would be summed over ranks that the loss
            does not count; or transformers would wrap the model in `nn.DataParallel`, whose replicas share the head.
    """
    if num_gpus > 1:
        raise PreflightError(
            f"This process sees {num_gpus} GPUs, and would train on all of them with nn.DataParallel.",
            "Its replicas run in threads that share the output head, whose inputs are taken apart here.",
            f"Start a process for each with `accelerate launch --num_processes {num_gpus}`, or show it one: "
            "CUDA_VISIBLE_DEVICES=0.",
        )
    num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_ranks != accelerator.num_processes:
        raise PreflightError(
            f"{num_ranks} processes share a group, accelerate counts {accelerator.num_processes}.",
            "The loss would be scaled for another number of ranks, and each would act as the main process.",
            "Start with `accelerate launch`, for DeepSpeed with --use_deepspeed; on a CPU give the script --ddp_backend gloo.",
        )


def warn_of_spinning_threads(device: torch.device) -> None:
    """Say it if training computes with threads that wait for each other without giving the processor away.

    `import trl_atropos` makes them sleep where it comes before torch.
    """
    num_threads = torch.get_num_threads()
    if device.type == "cpu" and num_threads > 1 and os.environ.get(WAIT_POLICY, "").lower() != "passive":
        logger.warning(
            f"{num_threads} threads compute together and keep the processor while they wait for each other. Beside another busy "
            f"process a step then takes several times as long. Start with {WAIT_POLICY}=passive in the environment, or import "
            "trl_atropos before torch and transformers."
        )


def describe_model(model_config: Any) -> dict[str, Any]:
    """Return the fields of a config in which server and trainer must agree."""
    config = model_config.get_text_config()
    return {name: getattr(config, name, None) for name in COMPARED_CONFIG_FIELDS}


def model_side(model_config: Any) -> dict[str, Any]:
    """Return the fields of [`~checks.server.TrainerSide`] that a model's config holds."""
    return {"model": describe_model(model_config), "longrope_boundary": longrope_boundary(model_config)}


def trainer_side(
    args: AtroposConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device | None,
) -> TrainerSide:
    """Return what servers are compared with.

    `device` is where the policy lies; None if another transport than ours sends it. What is None is not compared.
    """
    return TrainerSide(
        max_length=args.max_length,
        device=NOT_ASKED if device is None else device.type,
        weight_sync_mode=args.weight_sync_mode,
        vllm_enable_sleep_mode=args.vllm_enable_sleep_mode,
        tokenizer=NOT_ASKED if tokenizer is None else tokenizer_facts(tokenizer),
        chat_ids=NOT_ASKED if tokenizer is None else chat_ids(tokenizer),
        num_parameters=num_parameters(model),
        **model_side(model.config),
    )


def inspect_server(client: InferenceServer, model_config: Any, max_length: int) -> ServerFacts:
    """Check a server against the trainer's model.

    `model_config` is the config of that model, and `max_length` the longest rollout in tokens that the trainer
    accepts.

    Raises:
        [`PreflightError`]: the server has no dev mode, no weight transfer engine, another model or another vocabulary.
    """
    facts = read_server_config(client, TrainerSide(max_length=max_length, model=describe_model(model_config)))
    report(check(facts, SERVER_CHECKS))
    return as_server_facts(facts)


def inspect_run(
    clients: Sequence[InferenceServer], trainer: TrainerSide, args: AtroposConfig, model: nn.Module
) -> list[ServerFacts]:
    """Check all servers and this machine, and report everything that is found at once.

    `trainer` is what [`trainer_side`] returned.

    Raises:
        [`PreflightError`]: names every error.
    """
    saved = num_parameters(model, only_trained=hasattr(model, "peft_config"))
    machine = machine_facts(args, saved, ports={"vllm_group_port": args.vllm_group_port})
    findings = check(machine, MACHINE_CHECKS)
    servers = [read_server_config(client, trainer) for client in clients]
    for facts in servers:
        findings += check(facts, SERVER_CHECKS)
    report(findings)
    return [as_server_facts(facts) for facts in servers]


def check(facts: FactsT, checks: Sequence[Check[FactsT]]) -> list[Finding]:
    """Run those checks for which there is something to compare."""
    asked = [check for check in checks if all(getattr(facts, name) is not NOT_ASKED for name in check.needs)]
    return examine(facts, asked)


def report(findings: Sequence[Finding]) -> None:
    """Log what was found.

    Raises:
        [`PreflightError`]: names all errors.
    """
    levels = {"warning": logging.WARNING, "unknown": logging.WARNING, "ok": logging.DEBUG}
    for finding in findings:
        if finding.level != "error":
            logger.log(levels[finding.level], f"{finding} ({finding.name})")
    errors = [finding for finding in findings if finding.level == "error"]
    if len(errors) == 1:
        raise PreflightError(errors[0].what, errors[0].why, errors[0].fix)
    if errors:
        raise PreflightError(
            f"{len(errors)} checks before the start failed.",
            "\n".join(["", *(f"  {error.name}: {error}" for error in errors), ""]),
            "Training did not start; `trl-atropos preflight` shows them again.",
        )


def as_server_facts(facts: ServerConfigFacts) -> ServerFacts:
    """Return what the trainer goes on with."""
    backend = known(facts.backend)
    assert backend is not None, "a server without one is refused"
    return ServerFacts(
        backend=backend,
        dtype=getattr(torch, known(facts.dtype)),
        has_processed_logprobs=facts.logprobs_mode == "processed_logprobs",
        knows_policy_versions=known(facts.knows_policy_versions),
    )


def read_server_config(client: InferenceServer, trainer: TrainerSide) -> ServerConfigFacts:
    """Read what a server says of itself, and ask it for what it does not say.

    Changes nothing, and asks for nothing that its engine would run: an id that an embedding does not have ends an engine.
    It is compared with `trainer`; what is not known there is not asked here.

    Raises:
        [`PreflightError`]: the server was started so that nothing can be published to it.
        [`WeightSyncError`]: the server does not answer, or not as its kind does.
    """
    server = client.describe()
    served_tokenizer: Any = NOT_ASKED
    if not isinstance(trainer.tokenizer, Unread):
        served_tokenizer = read_tokenizer(server.tokenizer or server.model, server.tokenizer_revision)
    is_unread = isinstance(served_tokenizer, Unread)
    return ServerConfigFacts.beside(
        trainer,
        url=client.base_url,
        kind=client.kind,
        backend=server.backend,
        dtype=server.dtype,
        has_tokenizer=server.tokenizer is not None,
        logprobs_mode=server.logprobs_mode,
        max_model_len=server.max_model_len,
        served_name=server.model,
        served_model=NOT_ASKED if isinstance(trainer.model, Unread) else _read_model(server.model),
        knows_policy_versions=client.knows_policy_versions(),
        has_lora=server.has_lora,
        loads_adapters=server.loads_adapters,
        served_tokenizer=served_tokenizer if is_unread else tokenizer_facts(served_tokenizer),
        served_chat_ids=_served_chat_ids(client, trainer),
        segment_bytes=segment_bytes(trainer, server.dtype) if server.backend == SHARED_MEMORY_BACKEND else 0,
        free_shared_memory_bytes=free_bytes(SEGMENT_DIR),
    )


def segment_bytes(trainer: TrainerSide, dtype: str) -> int | Unread:
    """Return the size of a policy in the dtype that a server serves in, by torch's name."""
    if isinstance(trainer.num_parameters, Unread):
        return trainer.num_parameters
    return trainer.num_parameters * int(getattr(torch, dtype).itemsize)


def _read_model(name: str) -> dict[str, Any] | Unread:
    """Return [`describe_model`] of a path or Hub id."""
    from transformers import AutoConfig

    try:
        return describe_model(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as exc:
        return Unread(f"The config of the served model {name} cannot be read here ({type(exc).__name__}).")


def _served_chat_ids(client: InferenceServer, trainer: TrainerSide) -> tuple[int, ...] | Unread | None:
    if isinstance(trainer.chat_ids, Unread):
        return NOT_ASKED
    try:
        ids = client.render_messages(CONVERSATION)
    except VLLMServerError as exc:
        return Unread(exc.what)
    return None if ids is None else tuple(ids)
