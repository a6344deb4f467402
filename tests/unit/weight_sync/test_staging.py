"""Staging: bytes, layout, what the server's dtype swallows, and a collective source that fails in the middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from trl_atropos.weight_sync.base import ALIGNMENT_BYTES, PolicyLayout, TensorSpec, align
from trl_atropos.weight_sync.weights.staging import StagedPolicy


class Source:
    """Tensors of this test, which counts what was taken."""

    def __init__(self, tensors: dict[str, torch.Tensor], *, is_collective: bool = False):
        self.values = tensors
        self.is_collective = is_collective
        self.taken: list[str] = []

    def manifest(self) -> list[TensorSpec]:
        return [TensorSpec(name, torch.bfloat16, tuple(value.shape)) for name, value in self.values.items()]

    def tensors(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
        for spec in specs:
            self.taken.append(spec.name)
            yield spec.name, self.values[spec.name]


def random_source(*, is_collective: bool = False) -> Source:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "scalar": (), "transposed": (4, 6), "b": (7,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["transposed"] = torch.randn(6, 4, generator=generator).T
    return Source(tensors, is_collective=is_collective)


def staged(source: Source, num_memories: int = 1) -> tuple[StagedPolicy, list[torch.Tensor]]:
    policy = StagedPolicy(PolicyLayout(source.manifest()))
    return policy, [torch.zeros(policy.layout.num_bytes, dtype=torch.uint8) for _ in range(num_memories)]


def test_tensors_are_cast_into_every_memory_in_their_own_order():
    source = random_source()
    policy, memories = staged(source, num_memories=2)
    policy.stage(source, source.manifest(), memories)
    for memory in memories:
        for spec in source.manifest():
            assert torch.equal(policy.layout.view(memory, spec), source.values[spec.name].to(torch.bfloat16))


def test_tensors_are_aligned_and_do_not_overlap():
    layout = PolicyLayout(random_source().manifest())
    ends = [layout.offsets[spec.name] + spec.num_bytes for spec in layout.specs]
    starts = [layout.offsets[spec.name] for spec in layout.specs]
    assert all(start % ALIGNMENT_BYTES == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, [*starts[1:], layout.num_bytes], strict=True))


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_align_is_the_next_multiple(num_bytes, expected):
    assert align(num_bytes) == expected


def test_a_name_that_comes_twice_is_refused():
    spec = TensorSpec("twice", torch.bfloat16, (2,))
    with pytest.raises(ValueError, match=r"1 names twice, first \['twice'\]"):
        PolicyLayout([spec, spec])


def test_a_part_leaves_the_rest_as_it_was():
    source = random_source()
    policy, memories = staged(source)
    policy.stage(source, source.manifest(), memories)
    before = {spec.name: policy.layout.view(memories[0], spec).clone() for spec in source.manifest()}
    source.values = {name: value + 1 for name, value in source.values.items()}
    policy.stage(source, source.manifest()[1:2], memories)
    changed = [
        spec.name
        for spec in source.manifest()
        if not torch.equal(policy.layout.view(memories[0], spec), before[spec.name])
    ]
    assert changed == ["scalar"]


def test_a_source_that_leaves_its_manifest_is_refused_with_both_sides_named():
    source = random_source()
    policy, memories = staged(source)
    specs = source.manifest()
    source.values["a"] = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"yields 'a' of shape \(5, 3\).*announces 'a' of shape \(3, 5\)"):
        policy.stage(source, specs, memories)


@pytest.mark.parametrize(("is_collective", "taken"), [(True, ["a", "scalar", "transposed", "b"]), (False, ["a"])])
def test_after_an_error_only_a_collective_source_is_taken_to_its_end(is_collective, taken):
    source = random_source(is_collective=is_collective)
    policy, memories = staged(source)
    specs = source.manifest()
    source.values["a"] = torch.zeros(5, 3)
    with pytest.raises(ValueError, match="announces"):
        policy.stage(source, specs, memories)
    assert source.taken == taken


class TestSwallowed:
    # 1.0 in bfloat16 has neighbours at 1 - 2^-8 and 1 + 2^-7.
    VISIBLE, INVISIBLE = 2.0**-7, 2.0**-10

    def report(self, updates: torch.Tensor) -> float | None:
        source = Source({"weight": torch.ones(len(updates))})
        policy, memories = staged(source)
        assert policy.stage(source, source.manifest(), memories).swallowed_fraction is None
        source.values["weight"] = source.values["weight"] + updates
        return policy.stage(source, source.manifest(), memories).swallowed_fraction

    def test_is_the_share_of_moved_weights_that_stay_on_their_grid_point(self):
        assert self.report(torch.tensor([self.VISIBLE, self.INVISIBLE, self.INVISIBLE, 0.0])) == pytest.approx(2 / 3)

    def test_is_0_for_visible_updates_and_1_for_invisible_ones(self):
        assert self.report(torch.full((8,), self.VISIBLE)) == 0.0
        assert self.report(torch.full((8,), self.INVISIBLE)) == 1.0

    def test_is_unknown_if_nothing_moved(self):
        assert self.report(torch.zeros(8)) is None
