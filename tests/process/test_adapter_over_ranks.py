"""An adapter of a policy that is sharded over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launcher import run_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_llama
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trl_atropos.weight_sync.weights.adapter import take_adapter


def policy(**options: Any) -> PeftModel:
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(tiny_llama(seed=1), LoraConfig(**config))


def take_on_two_ranks(rank: int, rendezvous: str, output: Path) -> None:
    """What each rank of an FSDP2 model takes, and what it holds afterwards."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    model = policy(r=3)
    base = model.get_base_model()
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    held = [parameter.to_local().clone() for parameter in model.parameters()]
    tensors = take_adapter(model, torch.bfloat16).tensors
    is_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    is_unchanged = all(torch.equal(p.to_local(), before) for p, before in zip(model.parameters(), held, strict=True))
    torch.save((tensors, is_sharded and is_unchanged), output / f"{rank}.pt")
    dist.destroy_process_group()


def test_every_rank_of_a_sharded_policy_takes_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    arguments = (f"file://{tmp_path / 'rendezvous'}", tmp_path)
    run_ranks(take_on_two_ranks, arguments, num_ranks=2)
    expected = take_adapter(policy(r=3), torch.bfloat16).tensors
    for rank in range(2):
        tensors, is_as_before = torch.load(tmp_path / f"{rank}.pt")
        assert is_as_before
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
