"""Ulysses sequence parallelism: the ranks of a group hold a piece each of the same sequences.

Attention is DeepSpeed's ([Jacobs et al. 2023](https://huggingface.co/papers/2309.14509)), through accelerate's
`ParallelismConfig(sp_size=...)`. What is added here is the way from the pieces back to the loss: every rank of a group
computes the scores of its piece, the group adds them up, and every rank computes the same loss from all of them. So every
loss works, those too that look at whole sequences, and the collator, the normalisation and the metrics know nothing of it.

Shape letters: L positions of a row, U scored positions, K teacher tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from .logprobs import TokenScores


if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class SequenceParallel:
    """The place of this rank among those that share sequences.

    The `size` ranks of `group` share this rank's sequences, and piece number `rank`, from 0, is this rank's. The ranks
    of `data_group` hold the same piece of other sequences: together they hold every sequence once. Rollouts are dealt
    in `data_size` shares. `gradient_scale` is a factor of the gradients that makes up for what DeepSpeed divides too
    much.
    """

    size: int
    rank: int
    group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_size: int
    gradient_scale: int = 1

    def bounds(self, length: int) -> tuple[int, int]:
        """First position of this rank's piece of a row of `length` tokens, and the one after its last.

        The last pieces may reach beyond the row, and are padded.
        """
        piece = -(-length // self.size)
        return self.rank * piece, (self.rank + 1) * piece

    def shard(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """This rank's piece of a micro-batch with one row.

        The batch has `input_ids` (1, L), and of the scored positions `prediction_index`, `targets` and `temperature`
        (U,), and `teacher_token_ids` (U, K) if there is a teacher.

        Returns `input_ids` and `position_ids` of the piece, (1, ceil(L / size)); the other entries for the scored
        positions that lie in it, their `prediction_index` counted in the piece; and which of the U these are, (U,)
        bool.
        """
        input_ids, index = batch["input_ids"], batch["prediction_index"]
        start, end = self.bounds(input_ids.shape[-1])
        whole = end - start
        # What is padded comes last, so that under a causal mask no token sees it.
        padded = pad(input_ids, (0, whole * self.size - input_ids.shape[-1]))
        position_ids = torch.arange(start, end, device=input_ids.device).unsqueeze(0)
        is_here = (start <= index) & (index < end)
        names = ("targets", "temperature", "teacher_token_ids")
        piece = {name: batch[name][is_here] for name in names if name in batch}
        piece["prediction_index"] = index[is_here] - start
        return {"input_ids": padded[:, start:end], "position_ids": position_ids}, piece, is_here

    def join(self, scores: TokenScores, is_here: Tensor) -> TokenScores:
        """The scores of the whole row, from those of this rank's piece.

        A collective call of the ranks of `group`. `is_here` (U,) bool is what `shard` returned with the piece.
        """
        columns = [scores.logprobs.unsqueeze(-1), scores.entropy.unsqueeze(-1)]
        if scores.teacher_token_logprobs is not None:
            columns.append(scores.teacher_token_logprobs)
        local = torch.cat(columns, dim=-1)
        everywhere = local.new_zeros(is_here.numel(), local.shape[-1])
        everywhere = everywhere.index_put((is_here.nonzero().squeeze(-1),), local)
        # torch declares no types for `Function.apply`.
        sum_over_group: Callable[[Tensor, dist.ProcessGroup, int], Tensor] = _SumOverGroup.apply
        everywhere = sum_over_group(everywhere, self.group, self.gradient_scale)
        logprobs, entropy, *_ = everywhere.unbind(dim=-1)
        return TokenScores(logprobs, entropy, None if scores.teacher_token_logprobs is None else everywhere[:, 2:])


class _SumOverGroup(torch.autograd.Function):
    """Adds tensors up over a group whose ranks all compute the same from the sum.

    The gradient passes as it is, but for the scale: each rank's loss is the whole loss, and the gradients of the pieces are
    added up where those of data-parallel ranks are.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup, gradient_scale: int) -> Tensor:
        ctx.gradient_scale = gradient_scale
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.gradient_scale, None, None


def scaled_for(sequence_parallel: SequenceParallel | None, wrapped: nn.Module) -> SequenceParallel | None:
    """The same with the `gradient_scale` that the policy needs, which accelerate has wrapped.

    Where ranks share sequences, DeepSpeed divides the sum of all gradients by the number of data-parallel ranks, since
    the pieces of a sequence add up. ZeRO-3, as far as it scatters gradients (its default), divides by the number of
    all ranks. None, if no ranks share sequences, stays None.
    """
    if sequence_parallel is None:
        return None
    engine: Any = wrapped
    scatters = engine.zero_optimization_stage() == 3 and engine.zero_reduce_scatter()
    return replace(sequence_parallel, gradient_scale=sequence_parallel.size if scatters else 1)


def use_sequence_parallel(accelerator: Accelerator) -> SequenceParallel | None:
    """Find out which ranks share sequences, and leave the cutting of these to [`SequenceParallel`]. A collective call.

    Returns None if every rank holds whole sequences.
    """
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is None or parallelism.sp_size == 1:
        return None
    # Its adapter would cut batches of labels; ours have scored positions.
    accelerator.deepspeed_ulysses_dl_adapter = lambda dataloader, model: dataloader
    # DeepSpeed's own groups exist only once the model is prepared. It groups ranks in the same order.
    size, rank = parallelism.sp_size, accelerator.process_index
    data_size = accelerator.num_processes // size
    groups = [dist.new_group(range(i * size, (i + 1) * size)) for i in range(data_size)]
    data_groups = [dist.new_group(range(i, accelerator.num_processes, size)) for i in range(size)]
    return SequenceParallel(size, rank % size, groups[rank // size], data_groups[rank % size], data_size)
