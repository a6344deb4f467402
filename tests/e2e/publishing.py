"""What the end-to-end tests of publishing share: a publisher for a running server, and its logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from servers import VOCAB_SIZE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_atropos.trainer.preflight import inspect_server
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.failures import FailurePolicy
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher, PublishOptions
from trl_atropos.weight_sync.report import PublishReport
from trl_atropos.weight_sync.server_link import LinkOptions, ServerLink
from trl_atropos.weight_sync.session import WeightSync
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
        failure_policy (`FailurePolicy`, *optional*):
            Raises at once if not given.
        timeout_s (`float`, *optional*, defaults to `120.0`):
            Deadline of every request.
        options:
            Of [`LinkOptions`].
    """

    def __init__(
        self,
        url: str,
        model_dir: Path,
        *,
        failure_policy: FailurePolicy | None = None,
        timeout_s: float = 120.0,
        **options: Any,
    ):
        self.client = AtroposVLLMClient(url, request_timeout=timeout_s)
        self.facts = inspect_server(self.client, load(model_dir).config, max_length=256)
        self.probe = LogprobProbe(AutoTokenizer.from_pretrained(model_dir), VOCAB_SIZE)
        transport = make_transport(self.facts.backend, self.client, torch.device("cpu"), timeout_s=timeout_s)
        self.link = ServerLink(self.client, transport, self.facts.dtype, LinkOptions(**options))
        publish_options = PublishOptions(failure_policy=failure_policy or FailurePolicy("abort"))
        self.publisher = PolicyPublisher([self.link], publish_options)

    def publish(self, model: torch.nn.Module, policy_version: int) -> PublishReport:
        """Publish as the trainer does."""
        sync = WeightSync(self.publisher, policy_version, self.facts.dtype, lambda model: self.probe)
        sync.push(model)
        return sync.deliver()

    def logprobs(self, sequences: list[list[int]] | None = None) -> list[list[float]]:
        """What the server answers."""
        return self.client.get_prompt_logprobs(sequences or SEQUENCES)


def max_abs_diff(left: list[list[float]], right: list[list[float]]) -> float:
    """Largest difference of two lists of logprobs."""
    return max(abs(a - b) for row, other in zip(left, right, strict=True) for a, b in zip(row, other, strict=True))
