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
        self._samples: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
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
        num_moved = num_swallowed = 0
        tensors = source.tensors(specs)
        try:
            for spec, (name, tensor) in zip(specs, tensors, strict=True):
                check_same_tensor(spec, name, tensor)
                copy_start = time.perf_counter()
                first, *others = (self.layout.view(memory, spec) for memory in memories)
                first.copy_(tensor.detach())
                for other in others:
                    other.copy_(first)
                moved, swallowed = self._watch(spec, tensor, first)
                num_moved += moved
                num_swallowed += swallowed
                copy_s += time.perf_counter() - copy_start
        finally:
            if source.is_collective:
                for _ in tensors:
                    pass
        source_s = time.perf_counter() - start - copy_s
        return StageReport(source_s, copy_s, num_swallowed / num_moved if num_moved else None)

    def _watch(self, spec: TensorSpec, tensor: torch.Tensor, staged: torch.Tensor) -> tuple[int, int]:
        """How many watched elements moved, and how many of these did not move in the server's dtype."""
        exact = tensor.detach().flatten()[:: self._stride].clone().cpu()
        rounded = staged.flatten()[:: self._stride].clone()
        before = self._samples.get(spec.name)
        self._samples[spec.name] = (exact, rounded)
        if before is None:
            return 0, 0
        has_moved = exact != before[0]
        return int(has_moved.sum()), int((has_moved & (rounded == before[1])).sum())
