"""The journal: what the wire gave is on the disk, bit for bit, before use; a torn end spoils nothing else."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.errors import JournalError
from trl_atropos.wire.journal import Journal, read_lines, segments


GROUP = {"tokens": [[1, 2]], "masks": [[-100, 2]], "scores": [0.1], "advantages": None, "env_id": 0}
SECOND = {"tokens": [[3]], "scores": [1e-300, -0.0]}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


def contents(directory: Path, first: int = 0) -> dict[int, list[dict]]:
    return {batch.number: batch.raw_groups for batch in Journal(directory).batches(first)}


def only_segment(directory: Path) -> Path:
    (path,) = segments(directory)
    return path


class TestRoundTrip:
    def test_batches_come_back_in_order_with_their_numbers(self, tmp_path):
        journal = Journal(tmp_path / "journal")
        assert [journal.append([GROUP, SECOND]), journal.append([SECOND])] == [0, 1]
        assert contents(journal.directory) == {0: [GROUP, SECOND], 1: [SECOND]}

    def test_a_line_is_the_group_and_one_more_key_with_the_checksum_of_the_rest(self, tmp_path):
        journal = Journal(tmp_path / "journal")
        journal.append([GROUP])
        body = '{"tokens":[[1,2]],"masks":[[-100,2]],"scores":[0.1],"advantages":null,"env_id":0'
        checksum = f"{zlib.crc32((body + '}').encode()):08x}"
        line = only_segment(journal.directory).read_text()
        assert line == f'{body},"journal":{{"batch":0,"group":0,"crc32":"{checksum}"}}}}\n'

    def test_nan_and_infinity_are_kept(self, tmp_path):
        Journal(tmp_path).append([{"scores": [math.nan, math.inf, -math.inf]}])
        ((group,),) = contents(tmp_path).values()
        assert math.isnan(group["scores"][0])
        assert group["scores"][1:] == [math.inf, -math.inf]

    @settings(deadline=None, max_examples=50)
    @given(
        groups=st.lists(
            st.dictionaries(st.text() | st.just("journal"), json_values, max_size=4), min_size=1, max_size=4
        )
    )
    def test_any_json_object_round_trips(self, tmp_path_factory, groups):
        directory = tmp_path_factory.mktemp("journal")
        Journal(directory).append(groups)
        assert contents(directory) == {0: groups}

    def test_a_reopened_journal_goes_on_counting(self, tmp_path):
        Journal(tmp_path / "runs" / "journal").append([GROUP])
        assert Journal(str(tmp_path / "runs" / "journal")).append([SECOND]) == 1
        assert contents(tmp_path / "runs" / "journal") == {0: [GROUP], 1: [SECOND]}

    def test_reading_can_begin_at_any_batch(self, tmp_path):
        journal = Journal(tmp_path)
        for _ in range(4):
            journal.append([GROUP, SECOND])
        assert list(contents(tmp_path, first=2)) == [2, 3]
        assert contents(tmp_path, first=4) == {}

    def test_a_batch_is_synced_before_append_returns(self, tmp_path, monkeypatch):
        journal = Journal(tmp_path)
        journal.append([GROUP])
        sizes_at_sync = []
        real_fsync = os.fsync

        def fsync(descriptor):
            sizes_at_sync.append(os.fstat(descriptor).st_size)
            real_fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        journal.append([GROUP, GROUP, GROUP])
        assert sizes_at_sync == [only_segment(tmp_path).stat().st_size]


class TestSegments:
    def test_a_full_segment_is_followed_by_one_named_after_its_first_batch(self, tmp_path):
        journal = Journal(tmp_path, segment_bytes=200)
        for _ in range(5):
            journal.append([GROUP])
        # One line has 80 + 51 bytes, so that two make a segment full.
        assert [path.name for path in segments(tmp_path)] == [f"rollouts-{n:08d}.jsonl" for n in (0, 2, 4)]
        assert list(contents(tmp_path)) == [0, 1, 2, 3, 4]
        assert list(contents(tmp_path, first=3)) == [3, 4]
        assert Journal(tmp_path).next_batch == 5

    def test_beyond_the_limit_the_oldest_segments_that_no_resume_needs_are_deleted(self, tmp_path):
        journal = Journal(tmp_path, segment_bytes=1, max_bytes=300)
        for _ in range(4):
            journal.append([GROUP])
        journal.release(before=3)
        journal.make_room()
        assert [path.name for path in segments(tmp_path)] == [f"rollouts-{n:08d}.jsonl" for n in (2, 3)]
        with pytest.raises(JournalError, match="begins with batch 2, batch 1 is asked for"):
            next(journal.batches(1))

    def test_what_a_resume_needs_is_not_deleted_and_the_error_names_the_options(self, tmp_path):
        journal = Journal(tmp_path, segment_bytes=1, max_bytes=300)
        for _ in range(4):
            journal.append([GROUP])
        journal.release(before=1)
        with pytest.raises(JournalError, match="journal_max_bytes is 300") as caught:
            journal.make_room()
        assert "--save_steps" in caught.value.fix
        # Batch 0 was deleted: it was released. The others are there.
        assert len(segments(tmp_path)) == 3

    def test_without_a_limit_nothing_is_deleted(self, tmp_path):
        journal = Journal(tmp_path, segment_bytes=1)
        journal.append([GROUP])
        journal.append([GROUP])
        journal.release(before=2)
        journal.make_room()
        assert len(segments(tmp_path)) == 2


class TestTornEnd:
    @pytest.mark.parametrize("length", [1, 40, 3_000_000], ids=["one byte", "half a line", "longer than a block"])
    def test_an_unfinished_line_is_cut_off_before_the_next_batch(self, tmp_path, caplog, length):
        Journal(tmp_path).append([GROUP])
        with open(only_segment(tmp_path), "a") as file:
            file.write(('{"tokens":"' + "x" * length)[:length])
        with caplog.at_level(logging.WARNING):
            journal = Journal(tmp_path)
        assert journal.append([SECOND]) == 1
        assert contents(tmp_path) == {0: [GROUP], 1: [SECOND]}
        assert f"Cut {length} bytes" in caplog.text

    def test_every_cut_of_a_batch_keeps_its_whole_lines_and_nothing_else(self, tmp_path):
        Journal(tmp_path / "whole").append([GROUP, SECOND])
        data = only_segment(tmp_path / "whole").read_bytes()
        first_end = data.index(b"\n")
        for cut in range(len(data)):
            directory = tmp_path / str(cut)
            directory.mkdir()
            (directory / "rollouts-00000000.jsonl").write_bytes(data[:cut])
            # A line that lacks nothing but its line end is whole.
            expected = [GROUP][: cut >= first_end] + [SECOND][: cut >= len(data) - 1]
            assert contents(directory) == ({0: expected} if expected else {})

    def test_reading_leaves_an_unfinished_last_line_out_and_says_so(self, tmp_path, caplog):
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(GROUP) + '\n{"tokens":[[1')
        with caplog.at_level(logging.WARNING):
            assert list(read_lines(path, may_be_cut=True)) == [(GROUP, None)]
        assert "Line 2" in caplog.text

    def test_an_unfinished_mark_is_cut_off(self, tmp_path):
        Journal(tmp_path).mark("trained", 0, step=1)
        with open(tmp_path / "marks.jsonl", "a") as file:
            file.write('{"event":"trai')
        Journal(tmp_path).mark("trained", 1, step=2)
        assert [mark["step"] for mark in Journal(tmp_path).marks("trained")] == [1, 2]


class TestDamage:
    @pytest.mark.parametrize("line", [b"not json", b"[1, 2]", b"\xff\xfe", b'{"tokens": [[1'])
    def test_a_broken_line_in_the_middle_is_an_error_with_its_number(self, tmp_path, line):
        path = tmp_path / "data.jsonl"
        path.write_bytes(json.dumps(GROUP).encode() + b"\n" + line + b"\n" + json.dumps(GROUP).encode() + b"\n")
        lines = read_lines(path, may_be_cut=True)
        assert next(lines) == (GROUP, None)
        with pytest.raises(JournalError, match=r"^Line 2 of .*data\.jsonl is not a JSON object\. "):
            next(lines)

    def test_one_changed_digit_is_found_by_the_checksum(self, tmp_path):
        Journal(tmp_path).append([GROUP, SECOND])
        path = only_segment(tmp_path)
        text = path.read_text()
        path.write_text(text.replace('"scores":[0.1]', '"scores":[0.2]'))
        with pytest.raises(JournalError, match=r"^Line 1 of .* has the checksum [0-9a-f]{8}, it says [0-9a-f]{8}\."):
            Journal(tmp_path)

    def test_a_line_of_somebody_else_in_a_segment_is_refused(self, tmp_path):
        (tmp_path / "rollouts-00000000.jsonl").write_text(json.dumps(GROUP) + "\n")
        with pytest.raises(JournalError, match="without the journal's own key"):
            Journal(tmp_path)

    def test_a_missing_file_is_an_error_that_names_it(self, tmp_path):
        with pytest.raises(JournalError, match=r"nowhere\.jsonl") as caught:
            next(read_lines(tmp_path / "nowhere.jsonl", may_be_cut=True))
        assert isinstance(caught.value.__cause__, FileNotFoundError)


class TestFullDisk:
    def test_a_batch_that_does_not_fit_leaves_no_half_of_itself(self, tmp_path):
        journal = Journal(tmp_path)
        journal.append([GROUP])
        size = only_segment(tmp_path).stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores SIGXFSZ, so that writing beyond the limit is an OSError, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
        try:
            with pytest.raises(JournalError, match="Writing 3 groups to the journal") as caught:
                journal.append([GROUP] * 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "--output_dir" in caught.value.fix
        assert only_segment(tmp_path).stat().st_size == size
        assert journal.append([SECOND]) == 1
        assert contents(tmp_path) == {0: [GROUP], 1: [SECOND]}

    def test_a_directory_that_cannot_be_made_is_an_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(JournalError, match="cannot be opened for writing"):
            Journal(tmp_path / "file" / "journal")


def test_marks_are_read_back_by_kind_in_their_order(tmp_path):
    journal = Journal(tmp_path)
    journal.mark("versions", 0, policy_versions=[[1, None]])
    journal.mark("trained", 0, step=1)
    journal.mark("versions", 1, policy_versions=[[2]])
    assert list(journal.marks("versions")) == [
        {"event": "versions", "batch": 0, "policy_versions": [[1, None]]},
        {"event": "versions", "batch": 1, "policy_versions": [[2]]},
    ]
    assert [mark["step"] for mark in journal.marks("trained")] == [1]
