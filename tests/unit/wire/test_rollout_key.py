"""The key that joins a rollout with the policy that sampled it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_atropos.wire.rollout_key import rollout_key, span_keys


CALLS = st.lists(st.integers(0, 2**31)).flatmap(lambda ids: st.tuples(st.just(tuple(ids)), st.integers(0, len(ids))))


def test_same_ids_from_list_and_tensor():
    key = rollout_key([1, 2, 300000], 1)
    assert key == rollout_key(torch.tensor([1, 2, 300000]).tolist(), 1) == rollout_key((1, 2, 300000), 1)
    assert len(key) == 32
    assert set(key) <= set("0123456789abcdef")


@given(st.lists(CALLS, unique=True))
def test_other_calls_have_other_keys(calls: list[tuple[tuple[int, ...], int]]):
    assert len({rollout_key(ids, num_prompt_tokens) for ids, num_prompt_tokens in calls}) == len(calls)


def test_the_border_between_prompt_and_completion_matters():
    assert len({rollout_key([5, 5, 5], num_prompt_tokens) for num_prompt_tokens in range(4)}) == 4


@pytest.mark.parametrize("num_prompt_tokens", [0, 1])
def test_order_and_boundaries_matter(num_prompt_tokens: int):
    # 258 = 0x0102 holds the bytes of 1 and 2. Token 1 of [1, 1] is not the number of prompt tokens of [1].
    sequences = [[1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [258], [12], [1], [1, 1]]
    assert len({rollout_key(sequence, num_prompt_tokens) for sequence in sequences}) == len(sequences)


@given(ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=30), data=st.data())
def test_the_keys_of_spans_are_those_of_the_calls(ids: list[int], data: st.DataObject):
    borders = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    assert span_keys(ids, spans) == [rollout_key(ids[:end], start) for start, end in spans]
