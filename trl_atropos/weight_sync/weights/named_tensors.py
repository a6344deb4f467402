"""A policy that is given as pairs of name and tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..base import TensorSpec


class NamedTensors:
    """`WeightSource` of pairs of name and tensor: a complete policy under the names of a server that serves in
    `dtype`.
    """

    is_collective = False

    def __init__(self, pairs: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype):
        self._tensors = dict(pairs)
        self._specs = tuple(
            TensorSpec(name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        )

    def manifest(self) -> Sequence[TensorSpec]:
        """What was given, in its order."""
        return self._specs

    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what was given."""
        for spec in specs:
            yield spec.name, self._tensors[spec.name]
