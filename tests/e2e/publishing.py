"""What the end-to-end tests of publishing share: a publisher for a running server, and its logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from servers import VOCAB_SIZE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_atropos.trainer.preflight import inspect_server
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.options import WeightSyncOptions
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.report import PublishReport
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.server_link import ServerLink
from trl_atropos.weight_sync.transports.choose import make_transport


SEQUENCES = [[7, 11, 13, 17, 19, 23, 29, 31, 37, 41], [250, 3, 250, 3, 99, 98, 97, 96], [5, 5, 5, 5, 5, 5]]

BF16_NOISE = 0.02
"""Two vLLM processes on the same bf16 weights differ only by the order of sums; one bf16 step at a logprob of -6 is
2^2 * 2^-8 = 0.016."""


def load(model_dir: Path) -> PreTrainedModel:
    """The checkpoint in float32, as a trainer holds it."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


class Publishing:
    """A trainer's publisher on one running server.

    Args:
        url (`str`):
            The server.
        model_dir (`Path`):
            A checkpoint of the served architecture, for config and tokenizer.
        timeout_s (`float`, *optional*, defaults to `120.0`):
            Deadline of every request.
        options:
            Of [`WeightSyncOptions`]. A failure raises at once, and every publish is probed, unless they say otherwise.
    """

    def __init__(
        self,
        url: str,
        model_dir: Path,
        *,
        timeout_s: float = 120.0,
        **options: Any,
    ):
        self.client = AtroposVLLMClient(url, request_timeout=timeout_s)
        self.facts = inspect_server(self.client, load(model_dir).config, max_length=256)
        self.probe = LogprobProbe(AutoTokenizer.from_pretrained(model_dir), VOCAB_SIZE)
        transport = make_transport(self.facts.backend, self.client, torch.device("cpu"), timeout_s=timeout_s)
        self.options = WeightSyncOptions(**{"on_publish_failure": "abort", "logprob_probe_interval": 1, **options})
        self.link = ServerLink(self.client, transport, self.facts.dtype, self.options)
        self.servers = ServerGroup([self.link], self.options)
        self.publisher = self.publisher_of(self.servers)

    def publisher_of(self, servers: ServerGroup) -> PolicyPublisher:
        """One for these servers, with the probe of this one."""
        # Not through `self`, which would keep itself and its descriptors alive.
        probe = self.probe
        return PolicyPublisher(self.options, self.facts.dtype, servers, make_probe=lambda model: probe)

    def publish(self, model: torch.nn.Module, policy_version: int) -> PublishReport:
        """Publish as the trainer does."""
        return self.publisher.publish(model, policy_version)

    def logprobs(self, sequences: list[list[int]] | None = None) -> list[list[float]]:
        """What the server answers."""
        return self.client.get_prompt_logprobs(sequences or SEQUENCES)


def max_abs_diff(left: list[list[float]], right: list[list[float]]) -> float:
    """Largest difference of two lists of logprobs."""
    return max(abs(a - b) for row, other in zip(left, right, strict=True) for a, b in zip(row, other, strict=True))
