"""Recorded or hand-made rollouts as data: every form that is read, how they are packed, and what bad data gets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_atropos.errors import JournalError, PreflightError
from trl_atropos.types import START, Position
from trl_atropos.wire.journal import Journal, segments
from trl_atropos.wire.recorded import DataSummary, OfflineData


def group(num_rollouts: int, first_id: int = 10) -> dict:
    tokens = [[first_id, first_id + 1 + i] for i in range(num_rollouts)]
    return {
        "tokens": tokens,
        "masks": [[-100, ids[1]] for ids in tokens],
        "scores": [float(i) for i in range(num_rollouts)],
    }


FAR = Position(10, 0)
"""The end of ten passes."""
GROUPS = [group(2), group(2, 20), group(4, 30)]


def write(path: Path, groups: list[dict], end: str = "\n") -> str:
    path.write_text("\n".join(map(json.dumps, groups)) + end)
    return str(path)


def packed(data_path: str, batch_size: int, num: int) -> list[list[int]]:
    """The first ids of the groups of the first batches."""
    batches = OfflineData(data_path, batch_size).batches(FAR)
    return [[g["tokens"][0][0] for g in next(batches)[1]] for _ in range(num)]


class TestForms:
    @pytest.fixture(params=["file", "gzip", "journal", "dataset", "dataset dict"])
    def data_path(self, request: pytest.FixtureRequest, tmp_path: Path) -> str:
        if request.param == "file":
            return write(tmp_path / "data.jsonl", GROUPS)
        if request.param == "gzip":
            with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
                file.write("\n".join(map(json.dumps, GROUPS)))
            return str(tmp_path / "data.jsonl.gz")
        if request.param == "journal":
            journal = Journal(tmp_path / "journal", segment_bytes=1)
            journal.append(GROUPS[:2])
            journal.append(GROUPS[2:])
            return str(tmp_path / "journal")
        dataset = datasets.Dataset.from_list(GROUPS)
        if request.param == "dataset dict":
            dataset = datasets.DatasetDict({"train": dataset})
        dataset.save_to_disk(tmp_path / "dataset")
        return str(tmp_path / "dataset")

    def test_every_form_gives_the_same_groups(self, data_path):
        data = OfflineData(data_path, batch_size=4)
        assert data.summarize() == DataSummary([2, 2, 4], 4)
        assert list(data.batches(Position(0, 3))) == [(Position(0, 0), GROUPS[:2]), (Position(0, 2), GROUPS[2:])]


class TestPacking:
    def test_groups_are_never_split_and_keep_their_order(self, tmp_path):
        path = write(tmp_path / "data.jsonl", [group(3), group(2, 20), group(1, 30), group(4, 40)])
        assert packed(path, 4, 3) == [[10], [20, 30], [40]]

    def test_passes_follow_one_another_with_the_same_batches_and_go_on_counting(self, tmp_path):
        path = write(tmp_path / "data.jsonl", GROUPS)
        places, groups = zip(*OfflineData(path, 4).batches(Position(1, 2)), strict=True)
        assert places == (Position(0, 0), Position(0, 2), Position(1, 0))
        assert groups == (GROUPS[:2], GROUPS[2:], GROUPS[:2])

    @given(
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9),
        batch_sizes=st.tuples(st.integers(4, 9), st.integers(4, 9)),
        num_passes=st.floats(0, 3),
        num_before=st.integers(0, 9),
    )
    def test_a_resume_with_another_batch_size_skips_and_repeats_no_group(
        self, tmp_path_factory, sizes, batch_sizes, num_passes, num_before
    ):
        groups = [group(size, 10 * number) for number, size in enumerate(sizes)]
        path = write(tmp_path_factory.mktemp("data") / "data.jsonl", groups)
        before, after = (OfflineData(path, batch_size) for batch_size in batch_sizes)
        end = after.summarize().end(num_passes)
        trained = list(before.batches(end))[:num_before]
        first = START if not trained else Position(trained[-1][0].batch, trained[-1][0].group + len(trained[-1][1]))
        rest = list(after.batches(end, first))

        in_order = [g for _, batch in (*trained, *rest) for g in batch]
        assert in_order == groups * end.batch + groups[: end.group]
        assert len(rest) == after.summarize().count_batches(first, end)
        assert all(sum(len(g["tokens"]) for g in batch) <= batch_sizes[1] for _, batch in rest)

    @pytest.mark.parametrize(
        ("num_passes", "end"), [(1, (1, 0)), (0.5, (0, 2)), (0.4, (0, 0)), (2.75, (2, 2)), (3, (3, 0))]
    )
    def test_a_part_of_a_pass_is_rounded_down_to_whole_batches(self, num_passes, end):
        assert DataSummary([2, 2, 4], 4).end(num_passes) == end

    def test_a_group_that_is_larger_than_a_batch_is_refused_by_number(self, tmp_path):
        path = write(tmp_path / "data.jsonl", GROUPS)
        with pytest.raises(PreflightError, match=r"Group 2 of .* has 4 rollouts, a batch has 3\."):
            OfflineData(path, 3).summarize()


class TestBadData:
    @pytest.mark.parametrize(("text", "found"), [("", "no group"), ("\n\n", "no group")])
    def test_an_empty_file_is_refused(self, tmp_path, text, found):
        path = tmp_path / "data.jsonl"
        path.write_text(text)
        with pytest.raises(PreflightError, match=f"holds {found}"):
            OfflineData(str(path), 4).summarize()

    @pytest.mark.parametrize(
        "masks", [[[-100, -100]], [[10, -100]], [], None], ids=["all masked", "only token 0", "empty", "missing"]
    )
    def test_a_file_without_a_trained_token_is_refused(self, tmp_path, masks):
        path = write(tmp_path / "data.jsonl", [{"tokens": [[10, 11]], "masks": masks, "scores": [1.0]}])
        with pytest.raises(PreflightError, match="holds 1 groups, none of which has a trained token"):
            OfflineData(path, 4).summarize()

    def test_what_is_not_json_is_refused_with_the_line(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(GROUPS[0]) + "\nhello\n" + json.dumps(GROUPS[1]) + "\n")
        with pytest.raises(JournalError, match=r"^Line 2 of .* is not a JSON object"):
            OfflineData(str(path), 4).summarize()

    def test_a_compressed_file_that_was_cut_off_is_refused(self, tmp_path):
        path = tmp_path / "data.jsonl.gz"
        path.write_bytes(gzip.compress((json.dumps(GROUPS[0]) + "\n").encode())[:-10])
        with pytest.raises(JournalError, match="is damaged") as caught:
            OfflineData(str(path), 4).summarize()
        assert isinstance(caught.value.__cause__, EOFError)

    def test_a_file_that_is_not_compressed_with_gzip_is_refused(self, tmp_path):
        path = tmp_path / "data.jsonl.gz"
        path.write_text(json.dumps(GROUPS[0]))
        with pytest.raises(JournalError, match="is damaged"):
            OfflineData(str(path), 4).summarize()

    def test_a_damaged_line_of_a_journal_is_refused_with_both_checksums(self, tmp_path):
        Journal(tmp_path).append(GROUPS)
        (path,) = segments(tmp_path)
        path.write_text(path.read_text().replace("[10, 11]", "[10, 12]").replace("[10,11]", "[10,12]"))
        with pytest.raises(JournalError, match=r"Line 1 of .* has the checksum [0-9a-f]{8}, it says"):
            OfflineData(str(tmp_path), 4).summarize()

    @pytest.mark.parametrize("name", ["missing.jsonl", "no/such/directory"])
    def test_a_path_that_does_not_exist_is_refused(self, tmp_path, name):
        with pytest.raises(PreflightError, match="does not exist"):
            OfflineData(str(tmp_path / name), 4)

    def test_a_directory_without_data_is_refused(self, tmp_path):
        with pytest.raises(PreflightError, match="holds neither a journal nor a dataset"):
            OfflineData(str(tmp_path), 4)

    def test_a_dataset_that_nobody_has_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(PreflightError, match="cannot be loaded as a dataset"):
            OfflineData("nobody/nothing-of-this-name", 4).summarize()
