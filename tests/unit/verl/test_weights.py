from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama

from trl_atropos.verl.weights import EngineWeights


class Engine:
    """What verl's engine offers of a policy, and how many tensors were taken of the last iteration."""

    def __init__(self, *, tied: bool):
        self.module = tiny_llama(tied=tied)
        self.module.model.register_buffer("scale", torch.ones(3))
        self.num_taken = 0

    def get_per_tensor_param(self) -> tuple[Iterator[tuple[str, torch.Tensor]], dict[str, Any] | None]:
        self.num_taken = 0

        def pairs() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in self.module.state_dict().items():
                self.num_taken += 1
                yield name, tensor

        return pairs(), None


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_sent_once(tied):
    names = [spec.name for spec in EngineWeights(Engine(tied=tied), torch.bfloat16).manifest()]
    assert "model.embed_tokens.weight" in names
    assert ("lm_head.weight" in names) == (not tied)


def test_parameters_are_announced_in_the_dtype_of_the_server_and_buffers_in_theirs():
    dtypes = {spec.name: spec.dtype for spec in EngineWeights(Engine(tied=True), torch.bfloat16).manifest()}
    assert dtypes.pop("model.scale") is torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_a_part_is_given_in_order_and_a_consumer_that_stops_ends_nothing_early():
    engine = Engine(tied=True)
    weights = EngineWeights(engine, torch.float32)
    specs = weights.manifest()[1:4]
    assert [name for name, _ in weights.tensors(specs)] == [spec.name for spec in specs]
    # Other ranks would wait in the gathering of the rest.
    weights.is_collective = True
    tensors = weights.tensors(specs)
    next(tensors)
    tensors.close()
    assert engine.num_taken == len(engine.module.state_dict())
