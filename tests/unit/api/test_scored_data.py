"""Posted groups: what is refused and in which words, and that all else is kept as it came."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from trl_atropos.api.refusals import RequestRefused
from trl_atropos.api.scored_data import (
    OPTIONAL_FIELDS,
    completed_parts,
    digest_of,
    inflate,
    read_group,
    read_groups,
)


def make_group(**fields: Any) -> dict[str, Any]:
    return {"tokens": [[5, 6, 7], [5, 8]], "masks": [[-100, 6, 7], [-100, 8]], "scores": [1.0, 0], **fields}


def encode(group: Any) -> bytes:
    return json.dumps(group).encode()


@pytest.mark.parametrize(
    ("fields", "field", "what"),
    [
        ({"scores": [float("nan"), 1]}, "scores", "`scores` holds NaN."),
        ({"scores": [1, float("inf")]}, "scores", "`scores` holds Infinity."),
        ({"scores": [1, float("-inf")]}, "scores", "`scores` holds -Infinity."),
        ({"inference_logprobs": [[1.0, float("nan"), -1], [1.0, -1]]}, "inference_logprobs", "holds NaN"),
        ({"group_overrides": {"temperature": float("inf")}}, "temperature", "`temperature` holds Infinity."),
        ({"tokens": [[5, 6, 7], [5, 2**80]]}, "tokens", "`tokens[1][1]`: Expected `int` <= 9223372036854775807"),
        ({"tokens": [[5, 6, 7], [5, "x"]]}, "tokens", "`tokens[1][1]`: Expected `int`, got `str`"),
        ({"tokens": [[5, 6, 7], [5, 8.5]]}, "tokens", "`tokens[1][1]`: Expected `int`, got `float`"),
        ({"tokens": [5, 6]}, "tokens", "`tokens[0]`: Expected `array`, got `int`"),
        ({"tokens": None}, "tokens", "`tokens`: Expected `array`, got `null`"),
        ({"tokens": [], "masks": [], "scores": []}, "tokens", "the group has no rollouts"),
        ({"tokens": [[5, 6, 7], []]}, "tokens", "Rollout 1 has no tokens."),
        ({"scores": [1.0]}, "scores", "`scores` has 1 entries, `tokens` has 2 rollouts."),
        ({"scores": ["high", 1]}, "scores", "`scores[0]`: Expected `float`, got `str`"),
        ({"masks": []}, "masks", "`masks` has 0 entries, `tokens` has 2 rollouts."),
        ({"masks": [[-100, 6, 7], [8]]}, "masks", "Rollout 1: `masks` has 1 entries, `tokens` has 2."),
        ({"advantages": [1, 1]}, "advantages", "`advantages[0]`: Expected `array`, got `int`"),
        ({"advantages": [[1.0] * 3]}, "advantages", "`advantages` has 1 entries"),
        ({"advantages": [[1.0] * 3, [1.0] * 3]}, "advantages", "Rollout 1: `advantages` has 3 entries"),
        ({"ref_logprobs": [[-1.0], [-1.0]]}, "ref_logprobs", "Rollout 0: `ref_logprobs` has 1 entries"),
        (
            {"distill_token_ids": [[[1]] * 3, [[1]] * 2], "distill_logprobs": [[[-1.0]] * 3, [[-1.0], []]]},
            "distill_logprobs",
            "Rollout 1: `distill_logprobs` has other lengths",
        ),
        ({"overrides": [{}] * 3}, "overrides", "`overrides` has 3 entries"),
        ({"overrides": {}}, "overrides", "Expected `array | null`, got `object`"),
        ({"messages": [[{"role": "user"}]]}, "messages", "Rollout 0, message 0: it lacks `role` or `content`."),
        ({"env_id": "first"}, "env_id", "`env_id`"),
    ],
)
def test_what_no_trainer_can_use_is_refused_with_its_place(fields, field, what):
    with pytest.raises(RequestRefused) as caught:
        read_group(encode(make_group(**fields)))
    assert caught.value.status_code == 422
    assert what in caught.value.what
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "The body is not JSON"),
        (b'{"tokens": [[1', "The body is not JSON"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"tokens": [[1]], "masks": [[1]]}', "missing required field `scores`"),
        (b'{"tokens":[[1]],"masks":[[1]],"scores":[1],"images":"\xff"}', "The body is not JSON"),
        (
            b'{"tokens":[[1]],"masks":[[1]],"scores":[1],"images":' + b"[" * 5000 + b"]" * 5000 + b"}",
            "nested too deeply",
        ),
        (b'{"tokens":[[1]],"masks":[[1]],"scores":[1e999]}', "Number out of range"),
    ],
)
def test_what_is_no_group_at_all_is_refused(text, what):
    with pytest.raises(RequestRefused) as caught:
        read_group(text)
    assert what in caught.value.what


def test_a_bad_group_of_a_list_is_named_by_its_place():
    with pytest.raises(RequestRefused) as caught:
        read_groups(encode([make_group(), make_group(scores=[1])]))
    assert caught.value.what.startswith("Group 1 of the list: `scores` has 1 entries")
    assert len(read_groups(encode([make_group(), make_group()]))) == 2
    assert read_groups(b"[]") == []


def test_a_group_is_kept_byte_for_byte_and_counted():
    text = b'{ "tokens": [[5, 6]], "masks": [[-100, 6]],\n "scores": [1], "env_id": 3, "advantages": [] }'
    sent = gzip.compress(text)

    group = read_group(text, sent)

    assert (group.body, group.is_gzipped, group.num_rollouts, group.env_id) == (sent, True, 1, 3)
    assert read_group(text).body == text
    parts = completed_parts([b" \n", *(text[at : at + 7] for at in range(0, len(text), 7))], group.missing)
    assert json.loads(b"".join(parts)) == {
        **dict.fromkeys(OPTIONAL_FIELDS),
        **{"tokens": [[5, 6]], "masks": [[-100, 6]], "scores": [1], "env_id": 3, "advantages": []},
    }


def test_a_long_plain_body_is_compressed_and_a_short_one_is_not():
    text = encode(make_group(images="x" * 2000))
    group = read_group(text)
    assert group.is_gzipped and gzip.decompress(group.body) == text
    assert not read_group(encode(make_group())).is_gzipped


def test_unknown_fields_are_dropped_and_numbers_in_text_are_read_as_atroposlib_does():
    group = read_group(encode(make_group(not_a_field=1, tokens=[["5", 6.0, 7], [5, 8]])))
    assert json.loads(group.body) == make_group()


def test_absent_lists_in_any_form_are_taken():
    for empty in (None, [], [[], []]):
        fields = dict.fromkeys(("advantages", "ref_logprobs", "inference_logprobs", "distill_token_ids"), empty)
        assert read_group(encode(make_group(**fields))).num_rollouts == 2


def test_a_gzip_bomb_is_refused_before_it_is_unpacked():
    bomb = gzip.compress(b"0" * (50 * 2**20))
    assert len(bomb) < 60_000
    with pytest.raises(RequestRefused) as caught:
        inflate(bomb, 2**20)
    assert caught.value.status_code == 413
    # Also if it comes in many members.
    with pytest.raises(RequestRefused):
        inflate(gzip.compress(b"0" * 2**19) * 3, 2**20)


# The head of a compressed text has the time, and xdist wants names of tests that are the same in every process.
@pytest.mark.parametrize(
    "data",
    [b"text", gzip.compress(b"text", mtime=0)[:-1], gzip.compress(b"text", mtime=0) + b"x"],
    ids=["no gzip", "cut off", "more behind it"],
)
def test_a_damaged_gzip_file_is_refused(data):
    with pytest.raises(RequestRefused) as caught:
        inflate(data, 100)
    assert caught.value.status_code == 400 and caught.value.what.startswith("Invalid gzip payload")


def test_whole_files_unpack_up_to_the_limit():
    assert inflate(gzip.compress(b"ab") + gzip.compress(b"") + gzip.compress(b"cd"), 4) == b"abcd"
    assert inflate(zlib.compress(b"x" * 3_000_000, wbits=31), 3_000_000) == b"x" * 3_000_000


def test_a_post_is_recognised_by_its_text():
    # The head of a gzip file has the time in it.
    text = encode(make_group())
    assert gzip.compress(text, mtime=1) != gzip.compress(text, mtime=2)
    assert digest_of(text) != digest_of(encode(make_group(scores=[0, 1])))
    assert len(digest_of(text)) == 16
