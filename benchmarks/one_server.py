"""Publishing to one server, as a trainer does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trl_atropos.trainer.preflight import inspect_server
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.options import WeightSyncOptions
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.server_link import ServerLink
from trl_atropos.weight_sync.transports.choose import make_transport


def make_link(url: str, model: nn.Module, device: torch.device, timeout_s: float, **options: Any) -> ServerLink:
    """The way to a server from a trainer on `device`, with these options of publishing."""
    client = AtroposVLLMClient(url)
    facts = inspect_server(client, model.config, max_length=10**9)
    transport = make_transport(facts.backend, client, device, timeout_s=timeout_s)
    return ServerLink(client, transport, facts.dtype, WeightSyncOptions(**options))


def make_publisher(link: ServerLink, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> PolicyPublisher:
    """The publisher of models like this one to the server of `link`, by the options of the link."""
    probe = LogprobProbe(tokenizer, model.config.get_text_config().vocab_size)
    servers = ServerGroup([link], link.options)
    return PolicyPublisher(link.options, link.dtype, servers, make_probe=lambda model: probe)
