"""A teacher's tokens on the wire -> padded tensors: what is accepted arrives exactly, what is refused says where.

`GOOD` is a group as an environment with a teacher sends it: nothing before token 0, and as many tokens elsewhere as the
teacher named. Trained are tokens 2 and 3 of the first rollout, 2 and 4 of the second.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.errors import AtroposProtocolError
from trl_atropos.types import IGNORE_INDEX, NO_TOKEN, Rollout
from trl_atropos.wire.parse import WireLimits, parse_batch, parse_group


LIMITS = WireLimits(vocab_size=100, max_length=8, reads_teacher=True)
IDS, LOGPROBS = "distill_token_ids", "distill_logprobs"
GOOD: dict[str, Any] = {
    "tokens": [[5, 6, 7, 8], [5, 6, 9, 10, 11]],
    "masks": [[-100, -100, 7, 8], [-100, -100, 9, -100, 11]],
    "scores": [1.0, -1.0],
    IDS: [[[], [6], [7, 3], [8]], [[], [6, 1], [9, 2, 4], [10, 3], [11]]],
    LOGPROBS: [[[], [-0.5], [-0.25, -2], [-1.0]], [[], [-0.5, -1.5], [-0.5, -2.0, -4.0], [-1.0, -1.5], [0]]],
}
ABSENT = [None, [], [[], []], [None, None], [None, []], {}]
NOT_A_LOGPROB = [math.nan, math.inf, -math.inf, 0.002, 1.0, -1e300]
NOT_IN_THE_VOCABULARY = [-1, -100, 100, 2**40]


def changed(*changes: tuple[tuple[Any, ...], Any]) -> dict[str, Any]:
    """GOOD with the value at each path replaced."""
    group = copy.deepcopy(GOOD)
    for path, value in changes:
        target: Any = group
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
    return group


def without_teacher(rollout: Rollout) -> bool:
    return rollout.teacher_token_ids is None and rollout.teacher_logprobs is None


# What is accepted


def test_ragged_lists_arrive_padded_to_the_longest_of_their_rollout():
    first, second = parse_group(GOOD, LIMITS).rollouts

    assert first.teacher_token_ids.tolist() == [[-1, -1], [6, -1], [7, 3], [8, -1]]
    assert second.teacher_token_ids.tolist() == [[-1, -1, -1], [6, 1, -1], [9, 2, 4], [10, 3, -1], [11, -1, -1]]
    no = -math.inf
    assert first.teacher_logprobs.tolist() == [[no, no], [-0.5, no], [-0.25, -2.0], [-1.0, no]]
    assert second.teacher_logprobs[1:].tolist() == [
        [-0.5, -1.5, no],
        [-0.5, -2.0, -4.0],
        [-1.0, -1.5, no],
        [0.0, no, no],
    ]
    assert (first.teacher_token_ids.dtype, first.teacher_logprobs.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("field", [IDS, LOGPROBS])
@pytest.mark.parametrize("value", [None, "garbage", [[]], [[[-1.0]], 7]])
def test_without_distillation_the_fields_are_not_looked_at(field, value):
    limits = WireLimits(vocab_size=LIMITS.vocab_size, max_length=LIMITS.max_length)

    assert all(map(without_teacher, parse_group(changed(((field,), value)), limits).rollouts))


@pytest.mark.parametrize("ids", [*ABSENT, "missing"])
@pytest.mark.parametrize("logprobs", [*ABSENT, "missing"])
def test_null_missing_and_empty_mean_that_there_is_no_teacher(ids, logprobs):
    group = changed(((IDS,), ids), ((LOGPROBS,), logprobs))
    group = {name: value for name, value in group.items() if value != "missing"}

    assert all(map(without_teacher, parse_group(group, LIMITS).rollouts))


@pytest.mark.parametrize("empty", [None, [], [[], [], [], []], [None, None, None, None]])
def test_a_rollout_without_teacher_leaves_the_others_theirs(empty):
    first, second = parse_group(changed(((IDS, 0), empty), ((LOGPROBS, 0), empty)), LIMITS).rollouts

    assert without_teacher(first)
    assert second.teacher_token_ids.shape == second.teacher_logprobs.shape == (5, 3)


@pytest.mark.parametrize(("ids", "logprobs"), [(None, None), ([], []), (None, []), ([], None)])
def test_a_trained_position_may_have_no_distribution(ids, logprobs):
    first = parse_group(changed(((IDS, 0, 3), ids), ((LOGPROBS, 0, 3), logprobs)), LIMITS).rollouts[0]

    assert first.teacher_token_ids[3].tolist() == [NO_TOKEN, NO_TOKEN]
    assert first.teacher_logprobs[3].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("value", [0.001, 1e-9, 0])
def test_a_rounding_error_above_zero_is_clamped(value):
    first = parse_group(changed(((LOGPROBS, 0, 3, 0), value)), LIMITS).rollouts[0]

    assert first.teacher_logprobs[3].tolist() == [0.0, -math.inf]


def test_probabilities_may_sum_to_a_rounding_error_above_one():
    # 1 + 0.0009 is below 1 + 1e-3.
    group = changed(((LOGPROBS, 0, 2), [0.0, math.log(0.0009)]))

    assert parse_group(group, LIMITS).rollouts[0].teacher_logprobs[2, 0] == 0.0


def test_first_and_last_token_id_of_the_vocabulary_are_accepted():
    group = changed(((IDS, 0, 2), [0, 99]))

    assert parse_group(group, LIMITS).rollouts[0].teacher_token_ids[2].tolist() == [0, 99]


@pytest.mark.parametrize(
    ("field", "value"),
    [(LOGPROBS, value) for value in NOT_A_LOGPROB] + [(IDS, value) for value in NOT_IN_THE_VOCABULARY],
)
def test_an_impossible_number_at_an_untrained_position_is_left_out(field, value):
    second = parse_group(changed(((field, 1, 3, 0), value)), LIMITS).rollouts[1]

    assert second.teacher_token_ids[3].tolist() == [NO_TOKEN, 3, NO_TOKEN]
    assert second.teacher_logprobs[3].tolist() == [-math.inf, -1.5, -math.inf]


def test_position_zero_counts_as_untrained_whatever_its_mask():
    group = changed((("masks", 0, 0), 5), ((IDS, 0, 0), [100, 4]), ((LOGPROBS, 0, 0), [-1.0, -1.0]))

    assert parse_group(group, LIMITS).rollouts[0].teacher_token_ids[0].tolist() == [NO_TOKEN, 4]


def test_repeated_ids_and_a_sum_above_one_pass_at_an_untrained_position():
    second = parse_group(changed(((IDS, 1, 3), [4, 4]), ((LOGPROBS, 1, 3), [0.0, -0.5])), LIMITS).rollouts[1]

    assert second.teacher_token_ids[3].tolist() == [4, 4, NO_TOKEN]


# What is refused


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # one without the other
        ((IDS,), None, f"rollout 0: it has `{LOGPROBS}` and no `{IDS}`."),
        ((LOGPROBS,), [], f"rollout 0: it has `{IDS}` and no `{LOGPROBS}`."),
        ((LOGPROBS, 1), [], f"rollout 1: it has `{IDS}` and no `{LOGPROBS}`."),
        ((IDS, 1), None, f"rollout 1: it has `{LOGPROBS}` and no `{IDS}`."),
        # lengths
        ((IDS,), GOOD[IDS][:1], f"`{IDS}` has 1 entries, the group has 2 rollouts."),
        ((IDS, 0), GOOD[IDS][0][:3], f"rollout 0: `{IDS}` has 3 entries, `tokens` has 4."),
        ((LOGPROBS, 1), GOOD[LOGPROBS][0], f"rollout 1: `{LOGPROBS}` has 4 entries, `tokens` has 5."),
        ((LOGPROBS, 0, 2), [-1.0], f"rollout 0: `{LOGPROBS}` has 1 entries at position 2, `{IDS}` has 2."),
        ((IDS, 0, 1), [], f"rollout 0: `{LOGPROBS}` has 1 entries at position 1, `{IDS}` has 0."),
        ((LOGPROBS, 1, 4), None, f"rollout 1: `{LOGPROBS}` has 0 entries at position 4, `{IDS}` has 1."),
        # types, at untrained positions too
        ((IDS,), 7, f"`{IDS}` is 7, not a list with one entry per rollout."),
        ((IDS, 0), {"6": -0.5}, f"rollout 0: `{IDS}` is an object with 1 keys, not a list."),
        ((LOGPROBS, 0), -0.5, f"rollout 0: `{LOGPROBS}` is -0.5, not a list."),
        ((IDS, 0, 1), 6, f"rollout 0: `{IDS}` has 6 at position 1, not a list."),
        (
            (LOGPROBS, 0, 3),
            {"8": -1.0},
            f"rollout 0: `{LOGPROBS}` has an object with 1 keys at position 3, not a list.",
        ),
        ((IDS, 1, 2, 1), 2.0, f"rollout 1: `{IDS}` has 2.0 at position 2, entry 1, not an integer."),
        ((IDS, 1, 3, 0), True, f"rollout 1: `{IDS}` has true at position 3, entry 0, not an integer."),
        ((IDS, 0, 1, 0), "Paris", f'rollout 0: `{IDS}` has "Paris" at position 1, entry 0, not an integer.'),
        ((IDS, 0, 1, 0), 2**63, f"rollout 0: `{IDS}` has 9223372036854775808 at position 1, entry 0."),
        ((LOGPROBS, 1, 2, 2), None, f"rollout 1: `{LOGPROBS}` has null at position 2, entry 2, not a number."),
        ((LOGPROBS, 1, 1, 1), [-1.5], f"`{LOGPROBS}` has a list of 1 entries at position 1, entry 1, not a number."),
        # numbers at trained positions
        ((IDS, 1, 2, 1), 100, f"rollout 1: `{IDS}` has 100 at the trained position 2, entry 1."),
        ((IDS, 0, 3, 0), -1, f"rollout 0: `{IDS}` has -1 at the trained position 3, entry 0."),
        ((LOGPROBS, 1, 4, 0), math.nan, f"rollout 1: `{LOGPROBS}` has NaN at the trained position 4, entry 0."),
        ((LOGPROBS, 1, 2, 2), -math.inf, f"`{LOGPROBS}` has -Infinity at the trained position 2, entry 2."),
        ((LOGPROBS, 0, 2, 1), -1e300, f"rollout 0: `{LOGPROBS}` has -1e+300 at the trained position 2, entry 1."),
        ((LOGPROBS, 0, 2, 1), 0.002, f"rollout 0: `{LOGPROBS}` has 0.002 at the trained position 2, entry 1."),
        # distributions at trained positions
        ((IDS, 1, 2, 2), 9, f"rollout 1: `{IDS}` has 9 twice at the trained position 2."),
        # 1 + exp(-0.5) = 1.606531, rounded to six digits
        (
            (LOGPROBS, 0, 2),
            [0.0, -0.5],
            f"`{LOGPROBS}` has probabilities that sum to 1.60653 at the trained position 2.",
        ),
        # 1 + 0.002 is above 1 + 1e-3
        ((LOGPROBS, 0, 2), [0, math.log(0.002)], "probabilities that sum to 1.002 at the trained position 2."),
    ],
)
def test_a_bad_value_is_refused_with_its_position(path, value, message):
    with pytest.raises(AtroposProtocolError) as caught:
        parse_group(changed((path, value)), LIMITS, index=3)

    assert caught.value.what.startswith("Group 3")
    assert message in caught.value.what
    assert caught.value.why.startswith("Distillation needs one ")
    assert "`--distillation_coef 0`" in caught.value.fix


@pytest.mark.parametrize("value", NOT_IN_THE_VOCABULARY)
def test_an_id_outside_of_the_vocabulary_is_refused_where_trained(value):
    with pytest.raises(AtroposProtocolError, match=rf"`{IDS}` has {value} at the trained position 2, entry 0\."):
        parse_group(changed(((IDS, 0, 2, 0), value)), LIMITS)


@pytest.mark.parametrize("value", NOT_A_LOGPROB)
def test_what_is_no_logprob_is_refused_where_trained(value):
    with pytest.raises(AtroposProtocolError, match=rf"`{LOGPROBS}` has .* at the trained position 2, entry 0\."):
        parse_group(changed(((LOGPROBS, 0, 2, 0), value)), LIMITS)


def test_a_bad_teacher_costs_its_group_only():
    batch = parse_batch([GOOD, changed(((IDS, 1, 4, 0), 100)), GOOD], LIMITS)

    assert [group.rollouts[0].origin.group for group in batch.groups] == [0, 2]
    assert [(rejected.index, rejected.num_rollouts) for rejected in batch.rejected] == [(1, 2)]


def test_a_teacher_of_many_tokens_is_read_whole():
    length, width = 512, 20
    tokens = list(range(length))
    ids = [[], *(list(range(t, t + width)) for t in range(1, length))]
    # 20 probabilities of 1/20.
    logprobs = [[], *([-math.log(width)] * width for _ in range(1, length))]
    group = {
        "tokens": [tokens] * 8,
        "masks": [tokens] * 8,
        "scores": [0.5] * 8,
        IDS: [ids] * 8,
        LOGPROBS: [logprobs] * 8,
    }
    limits = WireLimits(vocab_size=length + width, max_length=length, reads_teacher=True)

    batch = parse_batch([group] * 2, limits)

    assert all(rollout.teacher_token_ids.shape == (length, width) for rollout in batch.rollouts)
    assert len(batch.rollouts) == 16


# Properties

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=6,
)
token_ids = st.integers(0, 99) | st.sampled_from(NOT_IN_THE_VOCABULARY)
# Mostly small probabilities, so that several of them often sum to less than 1.
logprobs = st.floats(-20, -2, width=32) | st.floats(-2, 0.0015) | st.sampled_from(NOT_A_LOGPROB)


def assert_consistent(rollout: Rollout) -> None:
    """What whoever reads the tensors relies on."""
    if rollout.teacher_token_ids is None or rollout.teacher_logprobs is None:
        assert without_teacher(rollout)
        return
    ids, values = rollout.teacher_token_ids, rollout.teacher_logprobs
    assert ids.shape == values.shape
    assert ids.shape[0] == rollout.num_tokens
    assert ids.shape[1] > 0
    assert torch.equal(ids == NO_TOKEN, values == -math.inf)
    assert ((ids >= NO_TOKEN) & (ids < LIMITS.vocab_size)).all()
    assert (values <= 0).all()
    trained = rollout.labels != IGNORE_INDEX
    trained[0] = False
    for row, named in zip(ids[trained].tolist(), values[trained], strict=True):
        real = [token for token in row if token != NO_TOKEN]
        assert len(set(real)) == len(real)
        # In float64 here and there: the same numbers, added in another order.
        assert sum(math.exp(value) for value in named.tolist()) <= 1.001 + 1e-9


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """GOOD's second rollout with any widths; the two fields agree on them more often than not."""
    widths = draw(st.lists(st.integers(0, 3), min_size=5, max_size=5))
    other = draw(st.just(widths) | st.just(widths) | st.lists(st.integers(0, 3), min_size=4, max_size=6))
    ids = [draw(st.lists(token_ids, min_size=width, max_size=width)) for width in widths]
    values = [draw(st.lists(logprobs, min_size=width, max_size=width)) for width in other]
    one = {name: [GOOD[name][1]] for name in ("tokens", "masks", "scores")}
    return {**one, IDS: [ids], LOGPROBS: [values]}


@settings(deadline=None, max_examples=300)
@given(raw=mixtures())
def test_any_mixture_of_widths_gives_consistent_tensors_or_a_protocol_error(raw):
    try:
        group = parse_group(raw, LIMITS)
    except AtroposProtocolError:
        return
    (rollout,) = group.rollouts
    assert_consistent(rollout)
    # Nothing is lost where trained: the other direction of the promise.
    for position in (2, 4):
        row = [] if rollout.teacher_token_ids is None else rollout.teacher_token_ids[position].tolist()
        assert [token for token in row if token != NO_TOKEN] == raw[IDS][0][position]


def places(value: Any, prefix: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """A value of the wire and everything in it, as the keys that lead there."""
    children = enumerate(value) if isinstance(value, list) else []
    return [prefix, *(place for key, child in children for place in places(child, (*prefix, key)))]


@settings(deadline=None, max_examples=300)
@given(
    path=st.sampled_from(places(GOOD[IDS], (IDS,)) + places(GOOD[LOGPROBS], (LOGPROBS,))),
    value=json_values | st.sampled_from([2**63, -(10**400), 1e308, *NOT_A_LOGPROB, *NOT_IN_THE_VOCABULARY]),
)
def test_any_one_wrong_value_gives_consistent_tensors_or_a_protocol_error(path, value):
    try:
        group = parse_group(changed((path, value)), LIMITS)
    except AtroposProtocolError:
        return
    for rollout in group.rollouts:
        assert_consistent(rollout)


@settings(deadline=None, max_examples=100)
@given(
    named=st.lists(
        # At most 4 probabilities of at most exp(-2) = 0.135 each.
        st.dictionaries(st.integers(0, 99), st.floats(-50, -2, width=32), max_size=4),
        min_size=2,
        max_size=LIMITS.max_length,
    )
)
def test_a_good_teacher_arrives_exactly(named):
    tokens = list(range(len(named)))
    ids, values = [list(entry) for entry in named], [list(entry.values()) for entry in named]
    raw = {"tokens": [tokens], "masks": [tokens], "scores": [0.5], IDS: [ids], LOGPROBS: [values]}

    # Through JSON text, as on the wire.
    rollout = parse_group(json.loads(json.dumps(raw)), LIMITS).rollouts[0]

    if not any(named):
        assert without_teacher(rollout)
        return
    width = max(map(len, named))
    assert rollout.teacher_token_ids.tolist() == [row + [NO_TOKEN] * (width - len(row)) for row in ids]
    assert rollout.teacher_logprobs.tolist() == [row + [-math.inf] * (width - len(row)) for row in values]
