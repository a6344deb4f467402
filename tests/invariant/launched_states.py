"""Trees through layers with a state under FSDP2, with other trees on every rank: what test_fsdp2.py compares.

    torchrun --nproc_per_node 2 launched_states.py CHECKPOINT OUTPUT

Each rank leaves the layout, whether states branch, and the mean of all gradients in `OUTPUT/rank{rank}.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from launched_fsdp2 import COLLECTIVE_TIMEOUT, RAM_EFFICIENT, accelerator, load, weighted_sum
from torch import Tensor

from trl_atropos.policy.layouts import tree_layout
from trl_atropos.policy.plan import plan_forward
from trl_atropos.policy.scoring import PolicyScorer


def sequences(rank: int) -> list[Tensor]:
    """Of one prompt; the more on the higher rank."""
    generator = torch.Generator().manual_seed(rank)
    prompt = torch.randint(60, (12,), generator=generator)
    return [torch.cat([prompt, torch.randint(60, (5 + number,), generator=generator)]) for number in range(2 + rank)]


def loss_of(scorer: PolicyScorer, model: torch.nn.Module, rank: int) -> Tensor:
    """Of every token but the first of each of the rank's sequences."""
    layout = tree_layout([sequences(rank)])
    assert layout.subtree_end is not None
    targets = torch.cat([sequence[1:] for sequence in sequences(rank)])
    batch = {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "subtree_end": layout.subtree_end,
        "prediction_index": torch.cat([positions[:-1] for positions in layout.token_positions]),
        "targets": targets,
        "temperature": torch.ones(targets.shape),
    }
    scores, no_loss = scorer(model, batch)
    return weighted_sum(scores.logprobs) + no_loss


def main(checkpoint: Path, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    os.environ.update(RAM_EFFICIENT)
    policy = load(checkpoint)
    wrapped = fsdp2_prepare_model(accelerator("no"), policy)
    plan = plan_forward(policy, wrapped, "auto", max_length=64, dtype=torch.float32, device=torch.device("cpu"))
    loss_of(PolicyScorer(policy, plan), wrapped, dist.get_rank()).backward()
    gradient = {name: parameter.grad.full_tensor() for name, parameter in wrapped.named_parameters()}
    results = {"plan": (plan.layout, plan.branches_states), "gradient": gradient}
    torch.save(results, output / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
