"""The key that joins a rollout with the policy that sampled it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_atropos.rollout_key import rollout_key


def test_same_ids_from_list_and_tensor():
    key = rollout_key([1, 2, 300000])
    assert key == rollout_key(torch.tensor([1, 2, 300000]).tolist()) == rollout_key(iter([1, 2, 300000]))
    assert len(key) == 32
    assert set(key) <= set("0123456789abcdef")


@given(st.lists(st.lists(st.integers(0, 2**31)), unique_by=tuple))
def test_other_ids_have_other_keys(sequences: list[list[int]]):
    assert len({rollout_key(sequence) for sequence in sequences}) == len(sequences)


def test_order_and_boundaries_matter():
    # 258 = 0x0102 holds the bytes of 1 and 2
    sequences = [[1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [258], [12], []]
    assert len({rollout_key(sequence) for sequence in sequences}) == len(sequences)
