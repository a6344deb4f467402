"""A group of rollouts as each side of a comparison takes it: ours, and TRL's GRPOTrainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trl_atropos.types import Rollout, RolloutOrigin


def as_rollouts(
    prompt: torch.Tensor, completions: Sequence[torch.Tensor], advantages: Sequence[torch.Tensor]
) -> list[Rollout]:
    """One rollout per completion, with its advantage at each token."""
    rollouts = []
    for number, (completion, advantage) in enumerate(zip(completions, advantages, strict=True)):
        input_ids = torch.cat([prompt, completion])
        rollouts.append(
            Rollout(
                input_ids=input_ids,
                labels=torch.cat([torch.full_like(prompt, -100), completion]),
                reward=0.0,
                advantages=advantage.expand(input_ids.shape),
                origin=RolloutOrigin(0, 0, number),
            )
        )
    return rollouts


def as_trl_inputs(
    prompt: torch.Tensor, completions: Sequence[torch.Tensor], advantages: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What `GRPOTrainer._compute_loss` takes: completions padded on the right, (rollouts, longest)."""
    longest = max(map(len, completions))
    return {
        "prompt_ids": prompt.repeat(len(completions), 1),
        "prompt_mask": torch.ones(len(completions), prompt.numel(), dtype=torch.long),
        "completion_ids": torch.nn.utils.rnn.pad_sequence(list(completions), batch_first=True),
        "completion_mask": torch.tensor([[i < len(c) for i in range(longest)] for c in completions]).long(),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
