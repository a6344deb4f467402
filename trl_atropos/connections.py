"""The servers of a run, as rank 0 holds them, and what is asked of their data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .atropos_client import AtroposClient, Registration
from .atropos_config import AtroposConfig
from .data import StreamSettings
from .preflight import ServerFacts, inspect_server, make_transport
from .validation import WireLimits
from .weight_sync.base import WeightTransport
from .weight_sync.probe import LogprobProbe
from .weight_sync.publisher import PolicyPublisher
from .weight_sync.vllm_client import AtroposVLLMClient


@dataclass(frozen=True)
class Connections:
    """Clients of the Atropos API and of the vLLM server, checked against the model and each other.

    Args:
        atropos_client ([`~atropos_client.AtroposClient`]):
            The API.
        vllm_client ([`~weight_sync.vllm_client.AtroposVLLMClient`]):
            The server that environments query.
        publisher ([`~weight_sync.publisher.PolicyPublisher`]):
            Keeps it on the newest policy.
        facts ([`~preflight.ServerFacts`]):
            What the server reported.
    """

    atropos_client: AtroposClient
    vllm_client: AtroposVLLMClient
    publisher: PolicyPublisher
    facts: ServerFacts

    def register(self, args: AtroposConfig, *, starting_step: int) -> None:
        """Register the trainer with the API.

        Args:
            args ([`AtroposConfig`]):
                Options of the run.
            starting_step (`int`):
                Optimizer steps done so far.
        """
        assert args.atropos_batch_size is not None
        self.atropos_client.register(
            Registration(
                wandb_group=args.run_name or "trl_atropos",
                wandb_project=os.environ.get("WANDB_PROJECT", "trl_atropos"),
                batch_size=args.atropos_batch_size,
                # Environments drop a whole group if a rollout has max_token_len tokens or more.
                max_token_len=args.max_length + 1,
                checkpoint_dir=str(Path(args.output_dir).absolute()),
                save_checkpoint_interval=_save_interval(args),
                starting_step=starting_step,
                num_steps=args.max_steps,
            )
        )

    def close(self) -> None:
        """Close transport and clients. The server keeps the policy that it has."""
        self.publisher.close()
        self.atropos_client.close()


def connect(
    args: AtroposConfig,
    model_config: Any,
    probe: LogprobProbe,
    device: torch.device,
    transport: WeightTransport | None = None,
) -> Connections:
    """Reach both servers and check that they fit the run.

    Args:
        args ([`AtroposConfig`]):
            Options of the run.
        model_config (`PretrainedConfig`):
            The trainer's model.
        probe ([`~weight_sync.probe.LogprobProbe`]):
            Proves each publish.
        device (`torch.device`):
            Of the trainer.
        transport ([`~weight_sync.base.WeightTransport`], *optional*):
            Chosen from what the server reports if not given.

    Raises:
        [`TrlAtroposError`]: a server does not answer in time, or does not fit.
    """
    atropos_client = AtroposClient(args.atropos_api_url)
    atropos_client.wait_until_reachable(args.api_timeout_s)
    vllm_client = AtroposVLLMClient(
        args.vllm_server_base_url,
        connection_timeout=args.vllm_server_timeout,
        request_timeout=args.weight_sync_timeout,
        group_port=args.vllm_group_port,
        api_key=args.vllm_api_key or os.environ.get("VLLM_API_KEY"),
    )
    facts = inspect_server(vllm_client, model_config, args.max_length)
    transport = transport or make_transport(facts, vllm_client, device)
    publisher = PolicyPublisher(vllm_client, transport, probe, facts.dtype, args.logprob_probe_tolerance)
    return Connections(atropos_client, vllm_client, publisher, facts)


def stream_settings(args: AtroposConfig, *, vocab_size: int, eos_token_ids: frozenset[int] | None) -> StreamSettings:
    """What the stream of rollouts needs to know of a configuration.

    Args:
        args ([`AtroposConfig`]):
            Options of the run.
        vocab_size (`int`):
            Rows of the model's embedding.
        eos_token_ids (`frozenset[int]`, *optional*):
            Given if truncated completions are not trained.
    """
    assert args.atropos_batch_size is not None
    required = ["inference_logprobs"] if args.needs_inference_logprobs else []
    required += ["ref_logprobs"] if args.ref_logprobs == "require" else []
    return StreamSettings(
        batch_size=args.atropos_batch_size,
        micro_batch_size=args.per_device_train_batch_size,
        rank=args.process_index,
        world_size=args.world_size,
        limits=WireLimits(vocab_size=vocab_size, max_length=args.max_length, reads_teacher=args.distillation_coef > 0),
        scale_rewards=args.scale_rewards,
        required_logprobs=tuple(required),
        max_dropped_fraction=args.max_dropped_fraction,
        batch_timeout_s=args.batch_timeout_s,
        refresh_interval_s=args.refresh_interval,
        max_tokens_per_micro_batch=args.max_tokens_per_micro_batch,
        eos_token_ids=eos_token_ids,
    )


def _save_interval(args: AtroposConfig) -> int:
    """Steps between checkpoints of the environments: those of the trainer, so that both resume from the same step."""
    return max(int(args.save_steps), 1) if args.save_strategy == "steps" else args.max_steps
