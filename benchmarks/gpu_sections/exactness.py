"""Do all ways to lay out and attend give the logprobs and the gradient of each rollout run alone?

The reference is float32 without TF32. `precision` says what a variant computes in; in bfloat16 the yardstick is the
difference of `alone`, each rollout run alone in bfloat16.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trl_atropos.data.micro_batches import RolloutCollator
from trl_atropos.policy.scoring import ForwardPlan, PolicyScorer
from trl_atropos.policy.tree_attention import MIN_FLEX_LENGTH, TREE_FLEX
from trl_atropos.types import Rollout

from .attention import Variant, using, variants
from .bench import Bench, make_rollouts, qwen3


ALONE = Variant("alone", "padded", "sdpa")


def run(bench: Bench) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = {} if bench.is_tiny else {"num_hidden_layers": 4, "vocab_size": 8192, "hidden_size": 512}
    model = qwen3(bench, **sizes).train()
    # Around one block of keys, and around the row that is long enough for blocks: one that is not whole, whole, and begun.
    # The last has every kind of block.
    lengths = (24, 129) if bench.is_tiny else (24, 127, 128, 129, 1023, 1024, 1025, 1300, 4609)
    for length in lengths:
        prompt = length // 3
        rest = length - prompt
        completions = [rest - 3 * (rest // 4), rest // 4, rest // 4, rest // 4]
        rollouts = make_rollouts(prompt, completions, model.config.vocab_size)
        reference = score(bench, model, ALONE, [[rollout] for rollout in rollouts], torch.float32)
        for precision in (torch.float32, torch.bfloat16):
            for variant in (ALONE, *variants(bench)):
                if precision not in variant.precisions:
                    continue
                if variant.implementation == TREE_FLEX and length < MIN_FLEX_LENGTH:
                    # It would be the dense mask again.
                    continue
                micro_batches = [[rollout] for rollout in rollouts] if variant is ALONE else [rollouts]

                def compare(
                    reference=reference, variant=variant, micro_batches=micro_batches, precision=precision
                ) -> dict[str, Any]:
                    got = score(bench, model, variant, micro_batches, precision)
                    differences = (got[0] - reference[0]).abs()
                    return {
                        "max_logprob_diff": differences.max().item(),
                        "mean_logprob_diff": differences.mean().item(),
                        "grad_rel_diff": ((got[1] - reference[1]).norm() / reference[1].norm()).item(),
                    }

                bench.attempt(compare, length=length, precision=str(precision)[6:], variant=variant.name)
    bench.report(unique_graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"])


def score(
    bench: Bench, model: Any, variant: Variant, micro_batches: list[list[Rollout]], precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logprobs of all trained tokens, in the order of the rollouts, and the gradient of a weighted sum."""

    def autocast() -> Any:
        return nullcontext() if precision == torch.float32 else torch.autocast(bench.device.type, precision)

    def forward(**inputs: Any) -> Any:
        with autocast():
            return model(**inputs)

    scorer = PolicyScorer(model, ForwardPlan(variant.layout, projects_in_pieces=True), autocast)
    collate = RolloutCollator(variant.layout, temperature=1.0)
    model.zero_grad()
    logprobs = []
    with using(variant, model):
        for rollouts in micro_batches:
            batch = {
                name: value.to(bench.device) if isinstance(value, Tensor) else value
                for name, value in collate(rollouts).items()
            }
            scores, no_loss = scorer(forward, batch)
            index = batch["token_index"]
            token_losses = scores.logprobs[index] * batch["advantages"] + 0.01 * scores.entropy[index]
            (token_losses.sum() + no_loss).backward()
            logprobs.append(scores.logprobs.detach()[index])
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return torch.cat(logprobs), gradient
