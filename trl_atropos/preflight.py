"""What must fit together before training starts: the server's settings, its model, and the trainer's model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from .errors import PreflightError, VLLMServerError
from .serving.plugin import SHARED_MEMORY_BACKEND
from .weight_sync.vllm_client import AtroposVLLMClient


logger = logging.getLogger(__name__)

COMPARED_CONFIG_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class ServerFacts:
    """What the trainer needs to know of the vLLM server.

    Args:
        backend (`str`):
            Its weight transfer backend.
        dtype (`torch.dtype`):
            The dtype that it serves in.
        has_processed_logprobs (`bool`):
            Whether its logprobs are those after temperature.
        knows_policy_versions (`bool`):
            Whether it remembers which policy sampled a rollout (`serving.generate_endpoint`).
    """

    backend: str
    dtype: torch.dtype
    has_processed_logprobs: bool
    knows_policy_versions: bool


def check_launch(accelerator: Accelerator) -> None:
    """Check that accelerate knows of all processes.

    Raises:
        [`PreflightError`]: it does not: gradients would be summed over ranks that the loss does not count.
    """
    num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if num_ranks != accelerator.num_processes:
        raise PreflightError(
            f"{num_ranks} processes share a group, accelerate counts {accelerator.num_processes}.",
            "The loss would be scaled for another number of ranks, and each would act as the main process.",
            "Start with `accelerate launch`, for DeepSpeed with --use_deepspeed; on a CPU give the script --ddp_backend gloo.",
        )


def inspect_server(client: AtroposVLLMClient, model_config: Any, max_length: int) -> ServerFacts:
    """Check a server against the trainer's model.

    Args:
        client (`AtroposVLLMClient`):
            The server.
        model_config (`PretrainedConfig`):
            The trainer's model.
        max_length (`int`):
            Longest rollout in tokens that the trainer accepts.

    Raises:
        [`PreflightError`]: no dev mode, no weight transfer engine, another model or another vocabulary.
    """
    info = client.get_server_info()
    transfer = info.get("weight_transfer_config")
    if transfer is None:
        raise PreflightError(
            f"The vLLM server at {client.base_url} has no weight transfer engine.",
            "Without one it serves the starting checkpoint for ever.",
            f"""Start it with --weight-transfer-config '{{"backend": "nccl"}}', or "{SHARED_MEMORY_BACKEND}" on a CPU.""",
        )
    served = info["model_config"]
    if served.get("skip_tokenizer_init"):
        raise PreflightError(
            f"The vLLM server at {client.base_url} was started with --skip-tokenizer-init.",
            "Without a tokenizer it does not check token ids: one beyond its vocabulary ends its engine, and environments "
            "cannot send text.",
            "Start it without --skip-tokenizer-init.",
        )
    _compare_models(client, served["model"], model_config)
    if served["max_model_len"] > max_length:
        logger.warning(
            f"The server generates up to {served['max_model_len']} tokens, the trainer takes up to {max_length}: "
            "environments drop groups with a longer rollout. Set --max_length, or the server's --max_model_len."
        )
    if served["logprobs_mode"] != "processed_logprobs":
        logger.warning(
            f"The server's logprobs mode is {served['logprobs_mode']}: logprobs before temperature. At temperatures "
            "other than 1 the importance ratio is not that of the sampling distribution."
        )
    return ServerFacts(
        backend=transfer["backend"],
        dtype=getattr(torch, served["dtype"].removeprefix("torch.")),
        has_processed_logprobs=served["logprobs_mode"] == "processed_logprobs",
        knows_policy_versions=_knows_policy_versions(client),
    )


def _compare_models(client: AtroposVLLMClient, served_model: str, model_config: Any) -> None:
    from transformers import AutoConfig

    ours = model_config.get_text_config()
    try:
        theirs = AutoConfig.from_pretrained(served_model).get_text_config()
    except (OSError, ValueError) as exc:
        logger.warning(
            f"The config of the served model {served_model} cannot be read here ({type(exc).__name__}); only the "
            "vocabulary is compared before the first publish."
        )
    else:
        for name in COMPARED_CONFIG_FIELDS:
            if getattr(ours, name, None) != getattr(theirs, name, None):
                raise PreflightError(
                    f"The server at {client.base_url} serves {served_model} with {name}={getattr(theirs, name, None)}, "
                    f"the trainer's model has {name}={getattr(ours, name, None)}.",
                    "The policy cannot be loaded into another architecture.",
                    "Start server and trainer with the same --model / --model_name_or_path.",
                )
    # The config may be another than the one served; the server itself must refuse the first id beyond our vocabulary.
    beyond = {"model": client.model, "prompt": [ours.vocab_size], "max_tokens": 1}
    try:
        client._post(f"{client.base_url}/v1/completions", json=beyond)
    except VLLMServerError as exc:
        if "out of vocabulary" in exc.detail:
            return
        raise
    raise PreflightError(
        f"The server at {client.base_url} accepts token id {ours.vocab_size}, the trainer's vocabulary ends before it.",
        "Rollouts could carry tokens that the trainer has no embedding for.",
        "Start server and trainer with the same --model / --model_name_or_path.",
    )


def _knows_policy_versions(client: AtroposVLLMClient) -> bool:
    try:
        client.get_policy_versions([])
    except VLLMServerError as exc:
        if exc.status_code != 404:
            raise
        logger.warning(
            "The server does not say which policy sampled a rollout, so staleness is unknown. Start it with "
            "--middleware trl_atropos.serving.generate_endpoint.GenerateEndpoint."
        )
        return False
    return True
