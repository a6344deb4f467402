"""A publish of two real gloo ranks: only rank 0 talks to the server, and a failure there ends both with its message."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import run_ranks
from scripted_server import ScriptedServer
from tiny_models import tiny_llama

from trl_atropos.distributed import run_on_main_process
from trl_atropos.errors import TrlAtroposError
from trl_atropos.weight_sync.base import TensorSpec
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.options import WeightSyncOptions
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.server_link import ServerLink
from trl_atropos.weight_sync.transports.shm import SharedMemoryTransport


WORLD_SIZE = 2
TIMEOUT = timedelta(seconds=60)


class GatheredTensors:
    """`WeightSource` of tensors of which every rank holds a half, as under ZeRO-3: each is summed over the ranks."""

    is_collective = True

    def __init__(self, tensors: dict[str, torch.Tensor], *, breaks_at: int | None = None):
        self.values = tensors
        self.breaks_at = breaks_at

    def manifest(self) -> Sequence[TensorSpec]:
        return [TensorSpec(name, torch.bfloat16, tuple(value.shape)) for name, value in self.values.items()]

    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        for index, spec in enumerate(specs):
            whole = self.values[spec.name] / WORLD_SIZE
            dist.all_reduce(whole)
            is_broken = index == self.breaks_at and dist.get_rank() == 0
            yield spec.name, whole[..., :1] if is_broken else whole


def make_publisher(rank: int, url: str, **options: Any) -> PolicyPublisher:
    chosen = WeightSyncOptions(on_publish_failure="abort", logprob_probe_interval=1, **options)
    servers = None
    if rank == 0:
        client = AtroposVLLMClient(url, connection_timeout=10, request_timeout=20)
        servers = ServerGroup([ServerLink(client, SharedMemoryTransport(), torch.bfloat16, chosen)], chosen)
    return PolicyPublisher(chosen, torch.bfloat16, servers, on_main=run_on_main_process)


def publish(rank: int, url: str, version: int, *, breaks_at: int | None = None) -> str:
    """One publish of this rank; what it ended with."""
    tensors = {name: value.detach() for name, value in tiny_llama(num_layers=1).named_parameters()}
    publisher = make_publisher(rank, url)
    try:
        report = publisher.publish(GatheredTensors(tensors, breaks_at=breaks_at), version)
    except (TrlAtroposError, ValueError) as exc:
        return f"{type(exc).__name__}: {exc}"
    finally:
        publisher.close()
    return f"version {report.policy_version}"


def publish_in_background(rank: int, url: str) -> list[str]:
    """What three steps of this rank ended with, and the wait for the last of them."""
    publisher = make_publisher(rank, url, weight_sync_background=True, weight_sync_mode="merged")
    model, outcomes = tiny_llama(num_layers=1), []
    for step in range(3):
        publisher.publish_step(model, step)
        outcomes.append(f"version {publisher.policy_version}")
    try:
        publisher.finish()
    except TrlAtroposError as exc:
        outcomes.append(str(exc))
    finally:
        publisher.close()
    return outcomes


def run_rank(rank: int, directory: str, url: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(directory, "store"), WORLD_SIZE)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE, store=store, timeout=TIMEOUT)
    outcomes: dict[str, Any] = {
        "whole": publish(rank, url, 1),
        "broken_source": publish(rank, url, 2, breaks_at=1),
        "refusing_server": publish(rank, url, 3),
        "afterwards": publish(rank, url, 4),
        "in_background": publish_in_background(rank, url),
    }
    dist.destroy_process_group()
    Path(directory, f"outcomes{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedServer, list[dict[str, str]]]]:
    directory = tmp_path_factory.mktemp("ranks")
    with ScriptedServer(tiny_llama(seed=1, num_layers=1)) as server:
        # The first publish finishes, the second does not get as far, the third is refused, the fourth ends what that left
        # open and finishes; in the background, two finish and the last is refused.
        server.script["POST /finish_weight_update"] = [None, 500, None, None, None, None, 500]
        run_ranks(run_rank, (str(directory), server.base_url), num_ranks=WORLD_SIZE)
        yield server, [json.loads((directory / f"outcomes{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_both_ranks_learn_of_a_success(outcomes, rank):
    assert outcomes[1][rank]["whole"] == "version 1"


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_an_error_while_staging_on_rank_0_leaves_nobody_in_a_collective(outcomes, rank):
    assert "announces" in outcomes[1][rank]["broken_source"]


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_an_error_of_the_server_ends_both_ranks_with_its_message(outcomes, rank):
    assert "failed in state `finishing`" in outcomes[1][rank]["refusing_server"]


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_the_next_publish_of_both_ranks_works(outcomes, rank):
    assert outcomes[1][rank]["afterwards"] == "version 4"


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_in_the_background_too_every_rank_learns_how_a_publish_ended(outcomes, rank):
    *versions, refused = outcomes[1][rank]["in_background"]
    assert versions == ["version 0", "version 1", "version 2"]
    assert "failed in state `finishing`" in refused


def test_the_server_holds_the_gathered_policy_and_heard_of_rank_0_alone(outcomes):
    server, _ = outcomes
    served = dict(server.model.named_parameters())
    for name, value in tiny_llama(num_layers=1).named_parameters():
        assert torch.equal(served[name], value.to(torch.bfloat16).float()), name
    assert server.routes.count("POST /resume") == 2 + 2
    assert server.offences == []
