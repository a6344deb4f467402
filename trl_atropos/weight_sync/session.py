"""A publish to one server without a trainer, as a context manager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..policy.load import vocab_size_of
from .inference_server import InferenceServer
from .options import WeightSyncOptions
from .probe import LogprobProbe
from .publisher import PolicyPublisher, WeightSync
from .server_group import ServerGroup
from .server_link import ServerLink
from .transports.choose import make_transport


@contextmanager
def weight_sync(client: InferenceServer, policy_version: int, **options: Any) -> Iterator[WeightSync]:
    """Publish to one server without a trainer.

    The server is paused on entry. At the end of the block it holds what was pushed under `policy_version`, proven and
    resumed; or an error is raised with the server still paused.

    Args:
        client (`InferenceServer`):
            The server.
        policy_version (`int`):
            Number of the policy, reported by the server as `weight_version`.
        transport (`WeightTransport`, *optional*):
            Moves the weights to the server. Chosen from what the server reports if not given.
        device (`torch.device`, *optional*):
            Device of the model, from which a transport is chosen; a CPU if not given.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Encodes the text of the logprob probe; without it, fixed token ids are scored.

    Yields:
        [`~weight_sync.publisher.WeightSync`]: takes the policy, and holds the report after the block.

    Raises:
        [`WeightSyncError`]: naming the state of the server.

    Example:

    ```python
    client = AtroposVLLMClient("http://127.0.0.1:8000")
    with client.weight_sync(policy_version=1) as sync:
        sync.push(model)
    sync.report.probe.mean_abs_diff  # trainer against server, in nats
    ```
    """
    transport, device, tokenizer = (options.pop(name, None) for name in ("transport", "device", "tokenizer"))
    if options:
        raise TypeError(f"weight_sync() has no option {sorted(options)}.")
    server = client.describe()
    dtype = getattr(torch, server.dtype)
    if transport is None:
        where = torch.device(device or "cpu")
        transport = make_transport(server.backend, client, where, timeout_s=client.request_timeout)
    # Every publish is the first one here, so that each is proven by logprobs; nobody waits for a second try.
    how = WeightSyncOptions(on_publish_failure="abort")
    servers = ServerGroup([ServerLink(client, transport, dtype, how)], how)
    publisher = PolicyPublisher(
        how, dtype, servers, make_probe=lambda model: LogprobProbe(tokenizer, vocab_size_of(model))
    )
    try:
        with publisher.weight_sync(policy_version) as sync:
            yield sync
    finally:
        publisher.close()
