"""The reference and a publish under FSDP2 as accelerate wraps a model: what test_fsdp2.py compares.

    torchrun --nproc_per_node 2 launched_fsdp2.py CHECKPOINT OUTPUT PRECISION

Each rank leaves its results in `OUTPUT/rank{rank}.pt`. Accelerate does not choose FSDP on a CPU, so the parts of an
`Accelerator` that its own function for FSDP2 reads stand in for one.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from trl_atropos.policy.forward import ReferencePolicy
from trl_atropos.policy.logprobs import MAX_LOGITS
from trl_atropos.policy.recompute import recompute_selectively
from trl_atropos.policy.scoring import ForwardPlan, PolicyScorer
from trl_atropos.weight_sync.weights.source import PolicyWeights


COLLECTIVE_TIMEOUT = timedelta(seconds=60)
# Only rank 0 loads, as examples/accelerate_configs/fsdp2.yaml says.
RAM_EFFICIENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def accelerator(precision: str) -> Any:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=True,
        reshard_after_forward=True,
    )
    if precision != "no":
        plugin.set_mixed_precision(precision)
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None),
        device=torch.device("cpu"),
        mixed_precision=precision,
        is_main_process=dist.get_rank() == 0,
        process_index=dist.get_rank(),
        torch_device_mesh=None,
        autocast=nullcontext,
    )


def load(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def micro_batch() -> dict[str, Tensor]:
    """Two padded rows, scored at every position but the last."""
    input_ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))
    index = torch.arange(18).view(2, 9)[:, :-1].flatten()
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "prediction_index": index,
        "targets": input_ids[:, 1:].flatten(),
        "temperature": torch.ones(index.shape),
    }


def weighted_sum(logprobs: Tensor) -> Tensor:
    return (torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1)) * logprobs).sum()


def main(checkpoint: Path, output: Path, precision: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    os.environ.update(RAM_EFFICIENT)
    policy, copy_of_start = load(checkpoint), load(checkpoint)
    copy_of_start.requires_grad_(False).eval()
    wrapping = accelerator(precision)
    plan = ForwardPlan("padded", projects_in_pieces=True, is_head_sharded=True)
    # Two tokens at a time: the backward pass makes most logits again, of weights that may be in pieces by then.
    MAX_LOGITS["cpu"] = 2 * policy.config.vocab_size
    reference = ReferencePolicy(policy, copy_of_start, plan, wrapping)
    wrapped = fsdp2_prepare_model(wrapping, policy)
    batch = micro_batch()
    ref_logprobs = reference.logprobs(wrapped, batch)
    # Every rank has the same rows, and the mean of their gradients is that of one.
    scores, no_loss = PolicyScorer(policy, plan)(wrapped, batch)
    (weighted_sum(scores.logprobs) + no_loss).backward()
    gradient = {name: parameter.grad.full_tensor() for name, parameter in wrapped.named_parameters()}
    wrapped.zero_grad()
    wrapped.train().gradient_checkpointing_enable({"use_reentrant": False})
    recompute_selectively(wrapped)
    scores, no_loss = PolicyScorer(policy, plan)(wrapped, batch)
    (weighted_sum(scores.logprobs) + no_loss).backward()
    recomputed = {name: parameter.grad.full_tensor() for name, parameter in wrapped.named_parameters()}
    wrapped.zero_grad()
    with torch.no_grad():
        # What a logprob probe does before the next publish.
        wrapped(input_ids=batch["input_ids"], use_cache=False)
    left_whole = sum(not isinstance(parameter, DTensor) for parameter in wrapped.parameters())
    source = PolicyWeights(wrapped, torch.float32)
    published = {name: tensor.clone() for name, tensor in source.tensors(source.manifest())}
    results = {
        "ref_logprobs": ref_logprobs, "left_whole": left_whole, "published": published, "gradient": gradient,
        "recomputed": recomputed,
    }  # fmt: skip
    torch.save(results, output / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
