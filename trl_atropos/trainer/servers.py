"""The servers of a run, as rank 0 holds them, and what is asked of their data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import torch
from torch import nn

from ..data.options import check_source
from ..distributed import run_on_main_process
from ..errors import PreflightError, VLLMServerUnreachable, WeightSyncTimeout
from ..network import is_this_machine
from ..policy.load import vocab_size_of
from ..types import ServedCall
from ..weight_sync.adapter_publisher import AdapterPublisher
from ..weight_sync.base import WeightSource, WeightTransport
from ..weight_sync.connecting import connect_server
from ..weight_sync.inference_server import InferenceServer
from ..weight_sync.probe import LogprobProbe
from ..weight_sync.publisher import PolicyPublisher
from ..weight_sync.server_group import ServerGroup
from ..weight_sync.server_link import ServerLink
from ..weight_sync.transports.backends import GLOO_BACKEND, SHARED_MEMORY_BACKEND, find_backend
from ..weight_sync.transports.choose import make_transport
from ..weight_sync.weights.source import PolicyWeights
from ..wire.client import AtroposClient, Registration
from .atropos_config import AtroposConfig
from .preflight import ServerFacts, inspect_run, inspect_server, trainer_side


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Servers:
    """Clients of the Atropos API and of the inference servers that environments query, checked against the model and each
    other.

    `group` takes the steps of a publish with all servers, and `adapters` publishes adapters to them. `facts` are what
    they reported. `clients_with_versions` are those of servers that remember which policy sampled a rollout.
    `in_background` says whether the trainer goes on while a policy is on its way.
    """

    atropos_client: AtroposClient
    vllm_clients: list[InferenceServer]
    group: ServerGroup
    adapters: AdapterPublisher
    facts: ServerFacts
    clients_with_versions: list[InferenceServer]
    in_background: bool

    def register(self, args: AtroposConfig, *, starting_step: int) -> None:
        """Register the trainer with the API; `starting_step` is the number of optimizer steps done so far."""
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

    def find_calls(self, rollout_keys: Sequence[str]) -> list[ServedCall | None]:
        """Return what is remembered of each call, by whichever server answered it; None if none knows it.

        A server that is away is not asked: the next publish waits for it, and what it remembered is gone with it.
        """
        found: list[ServedCall | None] = [None] * len(rollout_keys)
        for client in self.clients_with_versions:
            try:
                calls = client.find_calls(rollout_keys)
            except (VLLMServerUnreachable, WeightSyncTimeout) as exc:
                logger.warning(f"{exc.what} The staleness of rollouts that it sampled is unknown.")
                continue
            found = [new if old is None else old for old, new in zip(found, calls, strict=True)]
        return found

    def close(self) -> None:
        """Close the sessions with the API. The servers keep the policy that they have."""
        self.atropos_client.close()


@dataclass(frozen=True)
class Connection:
    """What every rank has of the servers: the publisher that keeps them on the newest policy, and the facts that they
    have in common. Their clients, `servers`, are on rank 0 only.
    """

    publisher: PolicyPublisher
    facts: ServerFacts
    servers: Servers | None

    def close(self) -> None:
        """Release transports and sessions. The servers keep the policy that they have; the next publish connects again."""
        self.publisher.close()
        if self.servers is not None:
            self.servers.close()


def open_connection(
    args: AtroposConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    transport: WeightTransport | None = None,
    *,
    make_source: Callable[[nn.Module, torch.dtype], WeightSource] = PolicyWeights,
    probe: LogprobProbe | None = None,
) -> Connection:
    """Reach the servers on rank 0 as [`connect`] does, and check that they fit the run; a collective call. Sets
    `args.weight_sync_background`, if it is None, to what fits the servers.

    `make_source` is that of [`~weight_sync.publisher.PolicyPublisher`], and `probe` scores the sequences that prove a
    publish, where plain forward passes of the model do not.
    """
    servers: Servers | None = None

    def connect_main_process() -> tuple[ServerFacts, bool]:
        nonlocal servers
        servers = connect(args, model, tokenizer, transport)
        return servers.facts, servers.in_background

    facts, args.weight_sync_background = run_on_main_process(connect_main_process)
    model_probe = probe or LogprobProbe(tokenizer, vocab_size_of(model))
    publisher = PolicyPublisher(
        args,
        facts.dtype,
        None if servers is None else servers.group,
        None if servers is None else servers.adapters,
        make_probe=lambda model: model_probe,
        on_main=run_on_main_process,
        make_source=make_source,
    )
    return Connection(publisher, facts, servers)


def connect(
    args: AtroposConfig,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    transport: WeightTransport | None = None,
) -> Servers:
    """Reach both servers and check that they fit the run.

    Without a transport, one is chosen from what the server reports.

    Raises:
        [`TrlAtroposError`]: a server does not answer in time, or does not fit.
    """
    check_source(args)
    assert args.atropos_api_url is not None, "a run on recorded data connects to nobody"
    atropos_client = AtroposClient(args.atropos_api_url)
    atropos_client.wait_until_reachable(args.api_timeout_s)
    clients = [
        connect_server(
            url,
            connection_timeout=args.vllm_server_timeout,
            request_timeout=args.weight_sync_timeout,
            api_key=args.vllm_api_key or os.environ.get("VLLM_API_KEY"),
        )
        for url in args.vllm_server_base_urls
    ]
    trainer = trainer_side(args, model, tokenizer, args.device if transport is None else None)
    facts = inspect_run(clients, trainer, args, model)
    if transport is not None and len(clients) > 1:
        raise PreflightError(
            f"One weight_transport was given for {len(clients)} servers.",
            "A transport moves weights to one server.",
            "Name one server in --vllm_server_base_url, or leave weight_transport out.",
        )
    links = [
        ServerLink(client, transport or _make_transport(args, client, server.backend), server.dtype, args)
        for client, server in zip(clients, facts, strict=True)
    ]

    def check_server(link: ServerLink) -> None:
        inspect_server(link.client, model.config, args.max_length)

    directory = Path(args.weight_sync_adapter_dir or Path(args.output_dir) / "adapters")
    return Servers(
        atropos_client,
        clients,
        ServerGroup(links, args, check_server),
        AdapterPublisher(links, directory, args),
        _agreed(facts),
        [client for client, server in zip(clients, facts, strict=True) if server.knows_policy_versions],
        publishes_in_background(args, [server.backend for server in facts], has_own_transport=transport is not None),
    )


def publishes_in_background(args: AtroposConfig, backends: Sequence[str], *, has_own_transport: bool) -> bool:
    """Whether the trainer goes on while a policy is on its way to servers with these backends: as the option says, or else
    where nothing of a publish runs on the device that trains.
    """
    if args.weight_sync_background is not None:
        return args.weight_sync_background
    rows = [find_backend(backend, args.device.type) for backend in backends]
    is_on_device = has_own_transport or args.vllm_enable_sleep_mode or any(row is None or row.device for row in rows)
    if args.device.type == "cpu":
        hosts = [urlsplit(url).hostname or "" for url in args.vllm_server_base_urls]
        is_on_device = is_on_device or any(is_this_machine(host) for host in hosts)
    if not is_on_device:
        logger.info("The trainer goes on while a policy is on its way to the servers (--weight_sync_background).")
    return not is_on_device


def _make_transport(args: AtroposConfig, client: InferenceServer, backend: str) -> WeightTransport:
    row = find_backend(backend, args.device.type)
    if args.weight_sync_background and row is not None and row.device is not None:
        raise PreflightError(
            f"weight_sync_background is on, and the server at {client.base_url} receives weights over {backend!r}.",
            "Broadcasts on the trainer's GPU beside its training, and beside the collectives of its ranks, can wait for each "
            "other for ever.",
            f"""Set --weight_sync_background false, or start the server with --weight-transfer-config '{{"backend": """
            f""""{SHARED_MEMORY_BACKEND}"}}' (same host) or "{GLOO_BACKEND}".""",
        )
    return make_transport(
        backend,
        client,
        args.device,
        timeout_s=args.weight_sync_timeout,
        group_host=args.vllm_group_host,
        group_port=args.vllm_group_port,
    )


def _agreed(facts: Sequence[ServerFacts]) -> ServerFacts:
    """Return what all servers have in common."""
    dtypes = {server.dtype for server in facts}
    if len(dtypes) > 1:
        raise PreflightError(
            f"The servers serve in different dtypes: {', '.join(sorted(str(dtype) for dtype in dtypes))}.",
            "Rollouts of one batch would come from policies that are rounded differently.",
            "Start them with the same --dtype.",
        )
    return replace(
        facts[0],
        has_processed_logprobs=all(server.has_processed_logprobs for server in facts),
        knows_policy_versions=all(server.knows_policy_versions for server in facts),
    )


def _save_interval(args: AtroposConfig) -> int:
    """Return the steps between checkpoints of the environments: those of the trainer, so that both resume from the
    same step.
    """
    return max(int(args.save_steps), 1) if args.save_strategy == "steps" else args.max_steps
