"""The journal: what the wire gave is on the disk, bit for bit, before use; a torn end spoils nothing else."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.errors import JournalError
from trl_atropos.journal import Journal, read_journal


GROUP = {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [0.1], "advantages": None, "env_id": 0}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


def test_groups_come_back_in_order_over_several_batches(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([GROUP, {"tokens": []}])
    journal.append([{"scores": [1e-300, -0.0]}])

    assert list(read_journal(journal.path)) == [GROUP, {"tokens": []}, {"scores": [1e-300, -0.0]}]


def test_one_group_is_one_compact_line(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([GROUP, GROUP])

    line = '{"tokens":[[1,2]],"masks":[[-100,2]],"scores":[0.1],"advantages":null,"env_id":0}\n'
    assert journal.path.read_text() == line * 2


def test_nan_and_infinity_are_kept(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([{"scores": [math.nan, math.inf, -math.inf]}])

    (group,) = read_journal(journal.path)
    assert math.isnan(group["scores"][0])
    assert group["scores"][1:] == [math.inf, -math.inf]


@settings(deadline=None, max_examples=25)
@given(groups=st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=4))
def test_any_json_object_round_trips(tmp_path_factory, groups):
    journal = Journal(tmp_path_factory.mktemp("journal") / "journal.jsonl")
    journal.append(groups)

    assert list(read_journal(journal.path)) == groups


def test_missing_parent_directories_are_created(tmp_path):
    journal = Journal(tmp_path / "runs" / "first" / "journal.jsonl")
    journal.append([GROUP])

    assert list(read_journal(tmp_path / "runs" / "first" / "journal.jsonl")) == [GROUP]


def test_a_reopened_journal_is_continued(tmp_path):
    Journal(tmp_path / "journal.jsonl").append([GROUP])
    Journal(str(tmp_path / "journal.jsonl")).append([{"second": True}])

    assert list(read_journal(tmp_path / "journal.jsonl")) == [GROUP, {"second": True}]


def test_a_batch_is_one_write_synced_before_append_returns(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    sizes_at_sync = []
    real_fsync = os.fsync

    def fsync(descriptor):
        sizes_at_sync.append(os.fstat(descriptor).st_size)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    journal.append([GROUP, GROUP, GROUP])

    assert sizes_at_sync == [journal.path.stat().st_size]


@pytest.mark.parametrize("length", [1, 40, 3_000_000], ids=["one byte", "half a line", "longer than a block"])
def test_an_unfinished_line_is_cut_off_before_the_next_batch(tmp_path, caplog, length):
    path = tmp_path / "journal.jsonl"
    Journal(path).append([GROUP])
    unfinished = '{"tokens":"' + "x" * length
    with open(path, "a") as file:
        file.write(unfinished[:length])

    with caplog.at_level(logging.WARNING):
        journal = Journal(path)
    journal.append([{"second": True}])

    assert list(read_journal(path)) == [GROUP, {"second": True}]
    assert f"Cut {length} bytes" in caplog.text


def test_a_file_that_is_one_unfinished_line_becomes_empty(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"tokens":[[1,')

    Journal(path).append([GROUP])

    assert list(read_journal(path)) == [GROUP]


def test_a_whole_last_line_without_a_line_end_is_kept(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps(GROUP))
    assert list(read_journal(path)) == [GROUP]

    Journal(path).append([{"second": True}])

    assert list(read_journal(path)) == [GROUP, {"second": True}]


def test_reading_leaves_an_unfinished_last_line_out_and_says_so(tmp_path, caplog):
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps(GROUP) + '\n{"tokens":[[1')

    with caplog.at_level(logging.WARNING):
        assert list(read_journal(path)) == [GROUP]
    assert "Line 2" in caplog.text


@pytest.mark.parametrize("line", [b"not json", b"[1, 2]", b"", b"\xff\xfe", b'{"tokens": [[1'])
def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(json.dumps(GROUP).encode() + b"\n" + line + b"\n" + json.dumps(GROUP).encode() + b"\n")
    groups = read_journal(path)
    assert next(groups) == GROUP

    with pytest.raises(JournalError, match=r"^Line 2 of .*journal\.jsonl is not a JSON object\. "):
        next(groups)


def test_an_empty_file_has_no_groups(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")

    assert list(read_journal(journal.path)) == []


def test_a_compressed_file_reads_the_same(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(GROUP) + "\n" + json.dumps({"second": True}))

    assert list(read_journal(path)) == [GROUP, {"second": True}]


def test_a_compressed_file_that_was_cut_off_is_an_error(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    compressed = gzip.compress((json.dumps(GROUP) + "\n").encode())
    path.write_bytes(compressed[:-10])

    with pytest.raises(JournalError, match="cannot be read beyond line") as caught:
        list(read_journal(path))
    assert isinstance(caught.value.__cause__, EOFError)


@pytest.mark.parametrize("damage", ["header", "body"])
def test_a_damaged_compressed_file_is_an_error(tmp_path, damage):
    path = tmp_path / "data.jsonl.gz"
    compressed = bytearray(gzip.compress((json.dumps(GROUP) + "\n").encode()))
    # A gzip header has 10 bytes; the three highest-order bits of the first deflate byte hold no valid block type.
    compressed[0 if damage == "header" else 10] = 0xFF
    path.write_bytes(compressed)

    with pytest.raises(JournalError, match="cannot be read beyond line 0"):
        list(read_journal(path))


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(JournalError, match=r"nowhere\.jsonl") as caught:
        next(read_journal(tmp_path / "nowhere.jsonl"))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_an_error_of_the_consumer_passes_through_the_reader(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([GROUP])
    groups = read_journal(journal.path)
    next(groups)

    with pytest.raises(KeyError):
        groups.throw(KeyError("the consumer's own"))


def test_writing_compressed_is_refused(tmp_path):
    with pytest.raises(JournalError, match="cannot be written compressed"):
        Journal(tmp_path / "journal.jsonl.gz")


def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("not a directory")

    with pytest.raises(JournalError, match="cannot be opened for writing") as caught:
        Journal(tmp_path / "file" / "journal.jsonl")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_full_disk_is_an_error_that_says_where_the_batch_is(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.path.unlink()
    journal.path.symlink_to("/dev/full")  # the kernel's own full disk

    with pytest.raises(JournalError, match=r"^Writing 2 groups to the journal .* failed") as caught:
        journal.append([GROUP, GROUP])
    assert "held by this process alone" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
