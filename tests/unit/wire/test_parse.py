"""Wire JSON -> typed rollouts: what is accepted arrives exactly, what is refused says where and why.

`GOOD` is a group of two rollouts as ManagedServer builds them: -100 and the sentinel 1.0 on the prompt, token ids and
logprobs on the completion; the second rollout has a tool turn in its middle.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from atroposlib.api.server import ScoredData
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.errors import AtroposProtocolError
from trl_atropos.types import IGNORE_INDEX, RolloutOrigin
from trl_atropos.wire.parse import WireLimits, parse_batch, parse_group


LIMITS = WireLimits(vocab_size=100, max_length=8)
GOOD: dict[str, Any] = {
    "tokens": [[5, 6, 7, 8], [5, 6, 9, 10, 11]],
    "masks": [[-100, -100, 7, 8], [-100, -100, 9, -100, 11]],
    "scores": [1.0, -1],
    "advantages": [[9.0, 9.0, 0.5, -0.5], [0.0, 0.0, 2, 9.0, 0.25]],
    "inference_logprobs": [[1.0, 1.0, -0.5, -2.0], [1.0, 1.0, -0.25, 1.0, 0]],
    "ref_logprobs": [[1.0, 1.0, -0.75, -3.0], [1.0, 1.0, -0.125, 1.0, -1]],
    "overrides": [{"set_advantage_to_zero": True}, {"temperature": 0.5}],
    "generation_params": {"temperature": 0.8},
    "group_overrides": {"temperature": 0.9, "group_size": 2},
    "messages": None,
    "images": None,
    "env_id": 3,
    "distill_token_ids": None,
    "distill_logprobs": None,
}
REQUIRED = ("tokens", "masks", "scores")
OPTIONAL = tuple(name for name in GOOD if name not in REQUIRED)


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """GOOD with the value at `path` replaced."""
    group = copy.deepcopy(GOOD)
    target: Any = group
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return group


def refusal(raw: object, index: int = 0) -> str:
    """The message with which the group is refused; all three parts are sentences."""
    with pytest.raises(AtroposProtocolError) as caught:
        parse_group(raw, LIMITS, index=index)
    for part in (caught.value.what, caught.value.why, caught.value.fix):
        assert part.endswith(".")
    return caught.value.what


# What is accepted


def test_tokens_labels_rewards_and_env_id_arrive():
    group = parse_group(GOOD, LIMITS)

    first, second = group.rollouts
    assert group.env_id == 3
    assert first.input_ids.tolist() == [5, 6, 7, 8]
    assert first.labels.tolist() == [-100, -100, 7, 8]
    assert second.labels.tolist() == [-100, -100, 9, -100, 11]
    assert first.input_ids.dtype == first.labels.dtype == torch.int64
    assert (first.reward, second.reward) == (1.0, -1.0)
    assert isinstance(second.reward, float)
    assert (first.num_trained_tokens, second.num_trained_tokens) == (2, 2)


def test_every_rollout_knows_where_it_came_from():
    first, second = parse_group(GOOD, LIMITS, index=7).rollouts

    assert first.origin == RolloutOrigin(env_id=3, group=7, rollout=0)
    assert str(second.origin) == "environment 3, group 7, rollout 1"


def test_advantages_are_zero_where_untrained():
    first, second = parse_group(GOOD, LIMITS).rollouts

    assert first.advantages.tolist() == [0.0, 0.0, 0.5, -0.5]
    assert second.advantages.tolist() == [0.0, 0.0, 2.0, 0.0, 0.25]
    assert first.advantages.dtype == torch.float32


@pytest.mark.parametrize("name", ["inference_logprobs", "ref_logprobs"])
def test_the_logprob_sentinel_becomes_nan_at_untrained_positions(name):
    second = getattr(parse_group(GOOD, LIMITS).rollouts[1], name)

    assert second.dtype == torch.float32
    assert second.isnan().tolist() == [True, True, False, True, False]
    assert second[[2, 4]].tolist() == [GOOD[name][1][2], GOOD[name][1][4]]


@pytest.mark.parametrize("name", ["inference_logprobs", "ref_logprobs"])
def test_one_trained_token_without_logprob_leaves_the_rollout_without(name):
    first, second = parse_group(changed((name, 1, 4), 1.0), LIMITS).rollouts

    assert getattr(first, name) is not None
    assert getattr(second, name) is None


def test_the_sentinel_at_position_zero_does_not_count():
    group = changed(("masks", 0, 0), 5)

    assert parse_group(group, LIMITS).rollouts[0].inference_logprobs is not None


@pytest.mark.parametrize("value", [0.001, 1e-9, 0.0])
def test_a_rounding_error_above_zero_is_clamped(value):
    rollout = parse_group(changed(("inference_logprobs", 0, 2), value), LIMITS).rollouts[0]

    assert rollout.inference_logprobs[2] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.5, -1e300])
def test_an_impossible_logprob_at_an_untrained_position_becomes_nan(value):
    rollout = parse_group(changed(("inference_logprobs", 1, 3), value), LIMITS).rollouts[1]

    assert rollout.inference_logprobs[3].isnan()
    assert rollout.inference_logprobs[4] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_an_infinite_advantage_at_an_untrained_position_becomes_zero(value):
    rollout = parse_group(changed(("advantages", 1, 3), value), LIMITS).rollouts[1]

    assert rollout.advantages[3] == 0.0


def test_position_zero_keeps_its_label_and_is_not_trained():
    group = changed(("masks", 0, 0), 5)
    rollout = parse_group(group, LIMITS).rollouts[0]

    assert rollout.labels.tolist() == [5, -100, 7, 8]
    assert rollout.num_trained_tokens == 2
    assert rollout.advantages[0] == 0.0


def test_set_advantage_to_zero_is_read_per_rollout():
    first, second = parse_group(GOOD, LIMITS).rollouts

    assert (first.set_advantage_to_zero, second.set_advantage_to_zero) == (True, False)


def test_temperature_comes_from_the_most_specific_place():
    group = copy.deepcopy(GOOD)
    assert [rollout.temperature for rollout in parse_group(group, LIMITS).rollouts] == [0.8, 0.5]
    group["generation_params"] = {}
    assert [rollout.temperature for rollout in parse_group(group, LIMITS).rollouts] == [0.9, 0.5]
    group["group_overrides"] = {"temperature": None}
    assert [rollout.temperature for rollout in parse_group(group, LIMITS).rollouts] == [None, 0.5]


@pytest.mark.parametrize(
    ("value", "versions"),
    [(4, [4, 4]), (0, [0, 0]), ([4, 5], [4, 5]), ([None, 5], [None, 5]), ([None, None], [None, None])]
    + [(absent, [None, None]) for absent in (None, [])],
)
def test_an_environment_may_send_the_policy_version_of_the_group_or_of_each_rollout(value, versions):
    group = parse_group(changed(("group_overrides", "policy_version"), value), LIMITS)

    assert [rollout.policy_version for rollout in group.rollouts] == versions
    assert group.unknown_fields == ()


def test_without_the_environment_no_policy_version_is_known():
    assert [rollout.policy_version for rollout in parse_group(GOOD, LIMITS).rollouts] == [None, None]


def test_messages_arrive_as_they_are():
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]
    group = parse_group({**GOOD, "messages": [turns, []]}, LIMITS)

    assert [rollout.messages for rollout in group.rollouts] == [tuple(turns), None]
    assert group.rollouts[0].messages[1] is turns[1]
    assert group.unknown_fields == ()


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        {"role": "user", "content": "?"},
        [[{"role": "user", "content": "?"}]],
        [[{"role": "user", "content": "?"}], [], []],
        [[{"role": "user", "content": "?"}], "hello"],
        [[{"role": "user", "content": "?"}], ["hello"]],
        [[{"role": "user", "content": "?"}], [{"role": "user"}]],
        [[{"role": "user", "content": "?"}], [{"content": "?"}]],
        [{"role": "user", "content": "?"}, None],
    ],
)
def test_malformed_messages_do_not_cost_the_group_and_are_counted_as_unknown(messages):
    group = parse_group({**GOOD, "messages": messages}, LIMITS)

    assert [rollout.messages for rollout in group.rollouts] == [None, None]
    assert group.unknown_fields == ("messages",)
    assert group.rollouts[0].input_ids.tolist() == GOOD["tokens"][0]


def test_a_group_as_the_api_writes_it_has_no_unknown_fields():
    assert set(GOOD) == set(ScoredData.model_fields)
    assert parse_group(GOOD, LIMITS).unknown_fields == ()


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        (("priority",), 1, "priority"),
        (("loss_mask",), None, "loss_mask"),
        (("overrides", 1, "top_p"), 0.5, "overrides.top_p"),
        (("group_overrides", "kl_coef"), 0.1, "group_overrides.kl_coef"),
        (("generation_params", "top_k"), 20, "generation_params.top_k"),
    ],
)
def test_what_nobody_reads_is_named(path, value, name):
    group = parse_group(changed(path, value), LIMITS)

    assert group.unknown_fields == (name,)
    assert len(group.rollouts) == 2


def test_an_unknown_option_of_several_rollouts_is_named_once():
    group = parse_group({**GOOD, "overrides": [{"top_p": 0.5}, {"top_p": 0.6}]}, LIMITS)

    assert group.unknown_fields == ("overrides.top_p",)


def test_the_keys_of_the_journal_and_of_the_environment_are_not_unknown():
    group = changed(("group_overrides", "skip_teacher_top_k"), True)
    group["group_overrides"]["teacher_top_k"] = 5
    group["journal"] = {"batch": 0, "group": 0, "crc32": "89abcdef"}

    assert parse_group(group, LIMITS).unknown_fields == ()


def test_rollouts_of_different_prompts_and_lengths_make_one_group():
    tokens = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15]]
    group = {"tokens": tokens, "masks": [[-100, *rest] for _, *rest in tokens], "scores": [0, 1, 2]}

    rollouts = parse_group(group, LIMITS).rollouts

    assert [rollout.input_ids.tolist() for rollout in rollouts] == tokens
    assert [rollout.num_trained_tokens for rollout in rollouts] == [2, 5, 1]


def test_groups_of_different_sizes_make_one_batch():
    groups = [{**{name: GOOD[name][:1] for name in REQUIRED}, "env_id": 1}, GOOD, {**GOOD, "env_id": 0}]

    batch = parse_batch(groups, LIMITS)

    assert [(group.env_id, len(group.rollouts)) for group in batch.groups] == [(1, 1), (3, 2), (0, 2)]
    assert batch.rejected == ()


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("absent", ["missing", None, [], {}])
def test_null_missing_and_empty_mean_the_same(name, absent):
    group = copy.deepcopy(GOOD)
    if absent == "missing":
        del group[name]
    else:
        group[name] = absent

    first, second = parse_group(group, LIMITS).rollouts

    if hasattr(first, name):
        assert getattr(first, name) is getattr(second, name) is None
    if name == "overrides":
        assert (first.set_advantage_to_zero, second.temperature) == (False, 0.8)
    if name == "env_id":
        assert parse_group({**group, "env_id": None}, LIMITS).env_id is None


@pytest.mark.parametrize("name", ["advantages", "inference_logprobs", "ref_logprobs", "images", "overrides"])
@pytest.mark.parametrize("empty", [[[], []], [None, None], [None, []]])
def test_a_list_of_empty_entries_means_the_same(name, empty):
    first, second = parse_group({**GOOD, name: empty}, LIMITS).rollouts

    if hasattr(first, name):
        assert getattr(first, name) is getattr(second, name) is None


def test_a_group_without_any_optional_field():
    rollout = parse_group({name: GOOD[name] for name in REQUIRED}, LIMITS).rollouts[1]

    assert rollout.advantages is rollout.inference_logprobs is rollout.ref_logprobs is rollout.temperature is None


def test_one_rollout_may_lack_logprobs_that_others_have():
    first, second = parse_group(changed(("inference_logprobs", 0), []), LIMITS).rollouts

    assert first.inference_logprobs is None
    assert second.inference_logprobs is not None


@pytest.mark.parametrize("overrides", [[{"set_advantage_to_zero": True}], [{"set_advantage_to_zero": True}, None]])
def test_overrides_may_be_shorter_or_hold_null(overrides):
    first, second = parse_group({**GOOD, "overrides": overrides}, LIMITS).rollouts

    assert (first.set_advantage_to_zero, second.set_advantage_to_zero) == (True, False)


def test_a_rollout_of_exactly_max_length_is_accepted():
    tokens = list(range(8))
    group = {"tokens": [tokens], "masks": [tokens], "scores": [0.5]}

    assert parse_group(group, LIMITS).rollouts[0].num_tokens == 8


def test_first_and_last_token_id_of_the_vocabulary_are_accepted():
    group = {"tokens": [[0, 99]], "masks": [[-100, 99]], "scores": [0]}

    assert parse_group(group, LIMITS).rollouts[0].input_ids.tolist() == [0, 99]


# What is refused


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # lengths
        (("inference_logprobs", 1), [-1.0] * 4, "rollout 1: `inference_logprobs` has 4 entries, `tokens` has 5."),
        (("ref_logprobs", 0), [-1.0] * 5, "rollout 0: `ref_logprobs` has 5 entries, `tokens` has 4."),
        (("masks", 1), [-100, 6], "rollout 1: `masks` has 2 entries, `tokens` has 5."),
        (("masks", 1), [], "rollout 1: `masks` has 0 entries, `tokens` has 5."),
        (("advantages", 0), [1.0], "rollout 0: `advantages` has 1 entries, `tokens` has 4."),
        (("masks",), [[-100, 6, 7, 8]], "`masks` has 1 entries, the group has 2 rollouts."),
        (("masks",), [], "`masks` has 0 entries, the group has 2 rollouts."),
        (("scores",), [1.0], "`scores` has 1 entries, the group has 2 rollouts."),
        (("scores",), [1.0, 2.0, 3.0], "`scores` has 3 entries, the group has 2 rollouts."),
        (("inference_logprobs",), [[-1.0] * 4], "`inference_logprobs` has 1 entries, the group has 2 rollouts."),
        (("advantages", 1), [], "rollout 1: it has no `advantages`, others of its group have them."),
        (("tokens", 0), list(range(9)), "rollout 0: it has 9 tokens, `max_length` is 8."),
        # empty
        (("tokens",), [], "`tokens` is a list of 0 entries; a group has at least one rollout."),
        (("tokens", 1), [], "rollout 1: `tokens` is a list of 0 entries; a rollout has at least one token."),
        # tokens and masks
        (("tokens", 0, 1), 100, "rollout 0: `tokens` has 100 at position 1, the vocabulary has 100 entries."),
        (("tokens", 0, 1), -1, "rollout 0: `tokens` has -1 at position 1, the vocabulary has 100 entries."),
        (("tokens", 0, 1), 6.0, "rollout 0: `tokens` has 6.0 at position 1, not an integer."),
        (("tokens", 0, 1), True, "rollout 0: `tokens` has true at position 1, not an integer."),
        (("tokens", 0, 1), "6", 'rollout 0: `tokens` has "6" at position 1, not an integer.'),
        (("tokens", 0, 1), None, "rollout 0: `tokens` has null at position 1, not an integer."),
        (("tokens", 0, 1), [6], "rollout 0: `tokens` has a list of 1 entries at position 1, not an integer."),
        (("tokens", 0, 1), 2**63, "rollout 0: `tokens` has 9223372036854775808 at position 1."),
        (("tokens", 0, 1), -(10**1000), "rollout 0: `tokens` has an integer of 3322 bits at position 1."),
        (("masks", 1, 4), 10, "rollout 1: `masks` has 10 at position 4, `tokens` has 11."),
        (
            ("masks", 0),
            [0, 0, 1, 1],
            "rollout 0: `masks` has 0 at position 0, `tokens` has 5. All entries are 0 or 1.",
        ),
        (("masks", 0, 2), True, "rollout 0: `masks` has true at position 2, not an integer."),
        (("masks", 0), [-100] * 4, "rollout 0: none of its 4 tokens is trained (token 0 never counts)."),
        (("masks", 0), [5, -100, -100, -100], "rollout 0: none of its 4 tokens is trained (token 0 never counts)."),
        # numbers; an integer n > 0 has floor(log2(n)) + 1 bits, log2(10) = 3.3219
        (("scores", 1), math.nan, "rollout 1: the score is NaN."),
        (("scores", 0), -math.inf, "rollout 0: the score is -Infinity."),
        (("scores", 0), 1e300, "rollout 0: the score is 1e+300."),
        (("scores", 0), 10**400, "`scores` has an integer of 1329 bits at position 0."),
        (("scores", 0), True, "`scores` has true at position 0, not a number."),
        (("scores", 0), None, "`scores` has null at position 0, not a number."),
        (("advantages", 1, 4), math.nan, "rollout 1: `advantages` has NaN at the trained position 4."),
        (("advantages", 1, 4), 1e39, "rollout 1: `advantages` has 1e+39 at the trained position 4."),
        (("advantages", 0), 0.5, "rollout 0: `advantages` is 0.5, not a list."),
        (("inference_logprobs", 0, 3), math.nan, "rollout 0: `inference_logprobs` has NaN at the trained position 3."),
        (("inference_logprobs", 0, 3), -math.inf, "`inference_logprobs` has -Infinity at the trained position 3."),
        (("inference_logprobs", 0, 3), 0.002, "`inference_logprobs` has 0.002 at the trained position 3."),
        (("inference_logprobs", 0, 3), 2.0, "`inference_logprobs` has 2.0 at the trained position 3."),
        (("ref_logprobs", 0, 3), math.inf, "rollout 0: `ref_logprobs` has Infinity at the trained position 3."),
        (("inference_logprobs", 0, 0), "x", 'rollout 0: `inference_logprobs` has "x" at position 0, not a number.'),
        # options
        (("overrides", 1, "temperature"), 0, "rollout 1: `overrides` has the temperature 0."),
        (("overrides", 1, "temperature"), math.nan, "rollout 1: `overrides` has the temperature NaN."),
        (("generation_params", "temperature"), -1.0, "`generation_params` has the temperature -1.0."),
        (("generation_params", "temperature"), "1", '`generation_params` has the temperature "1".'),
        (("generation_params", "temperature"), 10**400, "has the temperature an integer of 1329 bits."),
        (("generation_params",), 7, "`generation_params` is 7."),
        (("group_overrides",), "hot", '`group_overrides` is "hot".'),
        (("overrides",), [{}, {}, {}], "`overrides` is a list of 3 entries, the group has 2 rollouts."),
        (("overrides",), {"temperature": 1.0}, "`overrides` is an object with 1 keys, the group has 2 rollouts."),
        (("overrides", 0), 1, "rollout 0: its entry of `overrides` is 1."),
        (("overrides", 0, "set_advantage_to_zero"), 1, "`set_advantage_to_zero` in `overrides` is 1."),
        (("group_overrides", "policy_version"), -1, "`policy_version` in `group_overrides` has -1."),
        (("group_overrides", "policy_version"), "3", '`policy_version` in `group_overrides` has "3".'),
        (("group_overrides", "policy_version"), True, "`policy_version` in `group_overrides` has true."),
        (
            ("group_overrides", "policy_version"),
            2**63,
            "`policy_version` in `group_overrides` has 9223372036854775808.",
        ),
        (("group_overrides", "policy_version"), [3, 3.0], "`policy_version` in `group_overrides` has 3.0."),
        (("group_overrides", "policy_version"), [3], "`policy_version` in `group_overrides` is a list of 1 entries"),
        (
            ("group_overrides", "policy_version"),
            {},
            "`policy_version` in `group_overrides` has an object with 0 keys.",
        ),
        (("images",), [["aGVsbG8="], None], "it has `images`."),
        (("env_id",), "3", '`env_id` is "3".'),
        (("env_id",), True, "`env_id` is true."),
        # shapes
        (("tokens",), "abc", '`tokens` is "abc"; a group has at least one rollout.'),
        (("tokens",), [5, 6], "rollout 0: `tokens` is 5; a rollout has at least one token."),
        (("masks",), None, "`masks` is null, not a list with one entry per rollout."),
        (("masks", 0), None, "rollout 0: `masks` is null, not a list."),
        (("inference_logprobs",), -0.5, "`inference_logprobs` is -0.5, not a list with one entry per rollout."),
    ],
)
def test_a_bad_value_is_refused_with_its_position(path, value, message):
    what = refusal(changed(path, value), index=3)

    assert what.startswith("Group 3")
    assert message in what


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_required_field_is_refused(name):
    group = {key: value for key, value in GOOD.items() if key != name}

    assert f"`{name}` is null" in refusal(group)


def test_a_zero_one_mask_is_explained():
    with pytest.raises(AtroposProtocolError) as caught:
        parse_group(changed(("masks", 0), [0, 0, 1, 1]), LIMITS)

    assert "masks carry token ids: -100 where a token is not trained" in caught.value.why
    assert "`masked_tokens`" in caught.value.fix


def test_a_long_value_is_shortened_in_the_message():
    assert len(refusal(changed(("tokens", 0, 1), "x" * 10_000))) < 200


@pytest.mark.parametrize("raw", [None, [], 3, "group", b"bytes"])
def test_a_group_that_is_no_object_is_refused(raw):
    assert refusal(raw).startswith("Group 0 is ")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("tokens", 0, 1), 6.5, "tokens"),
        (("tokens", 0), list(range(9)), "too_long"),
        (("tokens", 0, 1), 100, "vocabulary"),
        (("masks", 0), [0, 0, 1, 1], "masks"),
        (("scores", 0), math.nan, "scores"),
        (("advantages", 0), [1.0], "advantages"),
        (("inference_logprobs", 0, 3), 0.5, "inference_logprobs"),
        (("ref_logprobs", 0), [-1.0], "ref_logprobs"),
        (("images",), "pixels", "images"),
        (("env_id",), "3", "env_id"),
        (("overrides",), {"temperature": 1.0}, "overrides"),
        (("overrides", 0), 1, "overrides"),
        (("overrides", 0, "set_advantage_to_zero"), 1, "overrides"),
        (("overrides", 0, "temperature"), 0, "temperature"),
        (("generation_params", "temperature"), 0, "temperature"),
        (("generation_params",), 7, "generation_params"),
        (("group_overrides",), 7, "group_overrides"),
        (("group_overrides", "policy_version"), -1, "policy_version"),
    ],
)
def test_a_refused_group_has_a_reason_to_be_counted(path, value, reason):
    (rejected,) = parse_batch([changed(path, value)], LIMITS).rejected

    assert rejected.reason == reason
    assert pickle.loads(pickle.dumps(rejected.error)).reason == reason


# Batches


def test_bad_groups_are_set_aside_with_their_error_and_good_ones_stay_in_order():
    bad = changed(("scores", 0), math.nan)
    second = {**GOOD, "env_id": 4}

    batch = parse_batch([GOOD, bad, second, {"env_id": True}], LIMITS)

    assert [group.env_id for group in batch.groups] == [3, 4]
    assert len(batch.rollouts) == 4
    assert [(r.index, r.env_id, r.num_rollouts) for r in batch.rejected] == [(1, 3, 2), (3, None, 0)]
    assert batch.rejected[0].error.what == "Group 1, rollout 0: the score is NaN."


def test_a_batch_may_lose_all_its_groups():
    batch = parse_batch([{}, {"tokens": 7}], LIMITS)

    assert batch.groups == ()
    assert len(batch.rejected) == 2


@pytest.mark.parametrize("raw", [None, [], {}, {"batch": [GOOD]}, "batch", [GOOD, None], [[GOOD]]])
def test_an_answer_that_is_no_list_of_objects_raises(raw):
    with pytest.raises(AtroposProtocolError, match=r'\{"batch": \[ScoredData'):
        parse_batch(raw, LIMITS)


def test_a_batch_of_64_rollouts_of_2048_tokens_is_read_whole():
    length = 2048
    tokens = list(range(1000, 1000 + length))
    group = {
        "tokens": [tokens] * 8,
        "masks": [[-100] * 512 + tokens[512:]] * 8,
        "scores": [0.5] * 8,
        "inference_logprobs": [[1.0] * 512 + [-0.5] * (length - 512)] * 8,
    }
    limits = WireLimits(vocab_size=50_000, max_length=length)

    batch = parse_batch([group] * 8, limits)

    assert len(batch.rollouts) == 64


# Properties

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=10,
)
extreme_numbers = st.sampled_from([2**63, -(2**63) - 1, 2**64, 10**400, -(10**400), 1e308, math.nan, math.inf, -0.0])


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value, as the keys that lead to it."""
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    else:
        return [prefix]
    return [p for key, child in children for p in paths(child, (*prefix, key))] + ([prefix] if prefix else [])


@settings(deadline=None, max_examples=150)
@given(raw=json_values | st.dictionaries(st.sampled_from(list(GOOD)), json_values))
def test_arbitrary_json_raises_nothing_but_a_protocol_error(raw):
    with contextlib.suppress(AtroposProtocolError):
        parse_group(raw, LIMITS)


@settings(deadline=None, max_examples=300)
@given(path=st.sampled_from(paths(GOOD)), value=json_values | extreme_numbers)
def test_any_one_wrong_value_gives_a_trainable_group_or_a_protocol_error(path, value):
    try:
        group = parse_group(changed(path, value), LIMITS)
    except AtroposProtocolError:
        return
    for rollout in group.rollouts:
        trained = rollout.labels != IGNORE_INDEX
        trained[0] = False
        assert rollout.num_trained_tokens > 0
        assert math.isfinite(rollout.reward)
        assert rollout.temperature is None or (math.isfinite(rollout.temperature) and rollout.temperature > 0)
        if rollout.advantages is not None:
            assert rollout.advantages.isfinite().all()
            assert (rollout.advantages[~trained] == 0).all()
        for logprobs in (rollout.inference_logprobs, rollout.ref_logprobs):
            assert logprobs is None or (logprobs[trained].isfinite() & (logprobs[trained] <= 0)).all()


@st.composite
def good_groups(draw: st.DrawFn) -> dict[str, Any]:
    group: dict[str, Any] = {"tokens": [], "masks": [], "scores": [], "inference_logprobs": []}
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.lists(st.integers(0, LIMITS.vocab_size - 1), min_size=2, max_size=LIMITS.max_length))
        trained = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
        trained[draw(st.integers(1, len(tokens) - 1))] = True
        logprobs = draw(st.lists(st.floats(-100, 0, width=32), min_size=len(tokens), max_size=len(tokens)))
        group["tokens"].append(tokens)
        group["masks"].append([token if t else -100 for token, t in zip(tokens, trained, strict=True)])
        group["scores"].append(draw(st.floats(-1e6, 1e6)))
        group["inference_logprobs"].append(
            [logprob if t else 1.0 for logprob, t in zip(logprobs, trained, strict=True)]
        )
    return group


@settings(deadline=None, max_examples=100)
@given(raw=good_groups())
def test_a_good_group_arrives_exactly(raw):
    # Through JSON text, as on the wire.
    group = parse_group(json.loads(json.dumps(raw)), LIMITS)

    assert [rollout.input_ids.tolist() for rollout in group.rollouts] == raw["tokens"]
    assert [rollout.labels.tolist() for rollout in group.rollouts] == raw["masks"]
    assert [rollout.reward for rollout in group.rollouts] == raw["scores"]
    for rollout, logprobs in zip(group.rollouts, raw["inference_logprobs"], strict=True):
        arrived = rollout.inference_logprobs.nan_to_num(nan=1.0)
        assert arrived.tolist() == logprobs
