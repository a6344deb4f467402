"""A policy on its way: complete, in the server's dtype, in one flat buffer of host memory.

Staging happens before the pause, so gathering, merging and casting cost the environments nothing; and what was staged
can be sent again to a server that was restarted, without asking the other ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..base import PolicyLayout, TensorSpec, WeightSource, check_same_tensor
from ..page_locks import PageLocks


NUM_SAMPLES = 65_536
"""Elements of a policy at which the rounding of updates is watched: its share is known to half a percent."""


@dataclass(frozen=True)
class StageReport:
    """What staging did.

    `source_s` seconds were spent in gathering and merging, and `copy_s` in casting and copying. `swallowed_fraction`
    is the share in [0, 1] of the watched elements that moved since they were staged last and whose value in the
    server's dtype did not; it is None if none moved, and at the first time.
    """

    source_s: float
    copy_s: float
    swallowed_fraction: float | None


class StagedPolicy:
    """Stages a policy of this layout, and watches on a sample of it what the server's dtype swallows of an update."""

    def __init__(self, layout: PolicyLayout):
        self.layout = layout
        self._samples: dict[str, torch.Tensor] = {}
        # Made for the first tensor that lies on a GPU.
        self._page_locks: PageLocks | None = None
        self._stride = max(1, sum(spec.numel for spec in layout.specs) // NUM_SAMPLES)

    def stage(
        self, source: WeightSource, specs: Sequence[TensorSpec], memories: Sequence[torch.Tensor]
    ) -> StageReport:
        """Cast and copy these tensors, which are all of the layout, or a part of it in its order.

        `memories` are buffers of shape `(layout.num_bytes,)`, uint8, one for each server. If a tensor cannot be
        staged, the rest of a collective source is still taken: the other ranks gather it too.

        Raises:
            `ValueError`: if the source does not follow its manifest.
        """
        start = time.perf_counter()
        copy_s = 0.0
        counts: dict[torch.device, torch.Tensor] = {}
        tensors = source.tensors(specs)
        try:
            for spec, (name, tensor) in zip(specs, tensors, strict=True):
                check_same_tensor(spec, name, tensor)
                copy_start = time.perf_counter()
                if tensor.is_cuda:
                    self._lock_pages(memories)
                _copy(tensor.detach(), [self.layout.view(memory, spec) for memory in memories])
                watched = self._watch(spec, tensor.detach())
                counts[watched.device] = counts[watched.device] + watched if watched.device in counts else watched
                copy_s += time.perf_counter() - copy_start
        finally:
            if source.is_collective:
                for _ in tensors:
                    pass
        source_s = time.perf_counter() - start - copy_s
        wait_start = time.perf_counter()
        # Reading the counts waits for the device, so also for the copies before them.
        num_moved, num_swallowed = (
            sum(column) for column in zip((0, 0), *(c.tolist() for c in counts.values()), strict=True)
        )
        copy_s += time.perf_counter() - wait_start
        return StageReport(source_s, copy_s, num_swallowed / num_moved if num_moved else None)

    def _lock_pages(self, memories: Sequence[torch.Tensor]) -> None:
        if self._page_locks is None:
            self._page_locks = PageLocks()
        self._page_locks.hold(memories)

    def _watch(self, spec: TensorSpec, tensor: torch.Tensor) -> torch.Tensor:
        """How many watched elements moved, and how many of these did not move in the server's dtype; (2,) int64, on
        the device of the tensor, which is not waited for.
        """
        exact = tensor.flatten()[:: self._stride].clone()
        before = self._samples.get(spec.name)
        self._samples[spec.name] = exact
        if before is None:
            return torch.zeros(2, dtype=torch.int64, device=exact.device)
        has_moved = exact != before
        is_swallowed = has_moved & (exact.to(spec.dtype) == before.to(spec.dtype))
        return torch.stack([has_moved.sum(), is_swallowed.sum()])


def _copy(tensor: torch.Tensor, targets: Sequence[torch.Tensor]) -> None:
    """Cast and copy a tensor into host memory, without waiting for a GPU that holds it.

    The cast is made on the GPU: otherwise torch copies the wider dtype over, and casts it on one core.
    """
    if tensor.device.type != "cpu":
        tensor = tensor.to(targets[0].dtype)
    first, *others = targets
    first.copy_(tensor, non_blocking=True)
    for other in others:
        # On a CPU from the first copy, which is cast already.
        other.copy_(first if tensor.device.type == "cpu" else tensor, non_blocking=True)
