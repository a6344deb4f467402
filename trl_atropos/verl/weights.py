"""The policy of a verl engine as a publish takes it, and the proof that it arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..distributed import is_distributed
from ..weight_sync.base import TensorSpec
from ..weight_sync.probe import LogprobProbe


class EngineWeights:
    """`WeightSource` of `get_per_tensor_param()` of a verl `engine`, for servers that serve in `dtype`.

    What verl gives its own rollout engines is sent: the tensors of a checkpoint under its names, whole, with LoRA merged if
    `model.lora.merge` is set. Parameters are announced in `dtype`; buffers keep theirs. A tensor that is tied to another
    is not sent.
    """

    def __init__(self, engine: Any, dtype: torch.dtype):
        self._engine = engine
        self._dtype = dtype
        self._specs: tuple[TensorSpec, ...] | None = None
        self.is_collective = is_distributed()

    def manifest(self) -> Sequence[TensorSpec]:
        """All tensors in order. verl tells their shapes only with their values, so that the first call gathers all of them;
        it is collective.
        """
        if self._specs is None:
            buffers = {name for name, _ in self._engine.module.named_buffers()}
            self._specs = tuple(
                TensorSpec(
                    name,
                    self._dtype if tensor.is_floating_point() and name not in buffers else tensor.dtype,
                    tuple(tensor.shape),
                )
                for name, tensor in self._pairs()
            )
        return self._specs

    @torch.no_grad()
    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for each of `specs`. A consumer that stops ends it only after all was gathered: the other
        ranks wait for that.
        """
        wanted = {spec.name for spec in specs}
        pairs = self._pairs()
        try:
            for name, tensor in pairs:
                if name in wanted:
                    yield name, tensor
        finally:
            if self.is_collective:
                for _ in pairs:
                    pass

    def _pairs(self) -> Iterator[tuple[str, torch.Tensor]]:
        tied = _tied_names(self._engine.module)
        pairs, _ = self._engine.get_per_tensor_param()
        for name, tensor in pairs:
            if name not in tied:
                yield name, tensor


class EngineProbe(LogprobProbe):
    """Scores the sequences of [`~weight_sync.probe.LogprobProbe`] with the policy of a verl `engine`; collective."""

    def __init__(self, engine: Any, processing_class: Any, vocab_size: int):
        super().__init__(processing_class, vocab_size)
        self._engine = engine

    def trainer_logprobs(self, model: nn.Module) -> torch.Tensor:
        """As there, with the weights where verl computes: they may be offloaded."""
        with self._engine.eval_mode():
            return super().trainer_logprobs(model)


def _tied_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that are another one, which a checkpoint does not have twice."""
    config: Any = module.config
    if not config.get_text_config().tie_word_embeddings:
        return frozenset()
    tied: dict[str, str] = getattr(module, "all_tied_weights_keys", {})
    return frozenset(tied)
