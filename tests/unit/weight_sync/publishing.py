"""A publisher for one scripted server, as the trainer makes it, and the policy that it publishes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_llama

from trl_atropos.errors import WeightSyncError
from trl_atropos.weight_sync.base import WeightTransport
from trl_atropos.weight_sync.inference_server import InferenceServer
from trl_atropos.weight_sync.options import WeightSyncOptions
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.report import PublishReport
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.server_link import ServerLink


VOCAB_SIZE = 64


def policy(seed: int = 0) -> torch.nn.Module:
    return tiny_llama(seed=seed, vocab_size=VOCAB_SIZE, num_layers=1, initializer_range=0.1)


def serves(server: Any, model: torch.nn.Module) -> bool:
    """Whether a scripted server holds this policy, rounded once."""
    assert server.model is not None
    served = dict(server.model.named_parameters())
    return all(
        torch.equal(served[name], parameter.to(torch.bfloat16).float()) for name, parameter in model.named_parameters()
    )


class ScriptedPublishing:
    """What the tests of both kinds of servers do with a publisher.

    Args:
        server (`ScriptedServer` or `ScriptedSGLang`):
            Its requests from here on are those of the publisher.
        client ([`InferenceServer`]):
            Of it.
        transport (`WeightTransport`):
            To it.
        action (`str`):
            `on_publish_failure`.
        options:
            Of [`WeightSyncOptions`].
    """

    def __init__(self, server: Any, client: InferenceServer, transport: WeightTransport, action: str, **options: Any):
        self.server = server
        self.client: Any = client
        self.options = WeightSyncOptions(
            on_publish_failure=action, max_publish_retries=2, vllm_server_timeout=5, **options
        )
        self.link = ServerLink(self.client, transport, torch.bfloat16, self.options)
        self.servers = ServerGroup([self.link], self.options)
        self.probe = LogprobProbe(None, VOCAB_SIZE)
        self.publisher = self.publisher_of(self.servers)
        server.requests.clear()

    def publisher_of(self, servers: ServerGroup) -> PolicyPublisher:
        return PolicyPublisher(self.options, torch.bfloat16, servers, make_probe=lambda model: self.probe)

    def publish(self, model: torch.nn.Module, version: int) -> PublishReport:
        return self.publisher.publish(model, version)

    def failure(self, version: int = 1) -> WeightSyncError:
        with pytest.raises(WeightSyncError) as caught:
            self.publish(policy(), version)
        return caught.value
