"""Recorded or hand-made rollouts as data: every form that is read, how they are packed, and what bad data gets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from trl_atropos.errors import JournalError, PreflightError
from trl_atropos.wire.journal import Journal, segments
from trl_atropos.wire.recorded import DataSummary, OfflineData


def group(num_rollouts: int, first_id: int = 10) -> dict:
    tokens = [[first_id, first_id + 1 + i] for i in range(num_rollouts)]
    return {
        "tokens": tokens,
        "masks": [[-100, ids[1]] for ids in tokens],
        "scores": [float(i) for i in range(num_rollouts)],
    }


GROUPS = [group(2), group(2, 20), group(4, 30)]


def write(path: Path, groups: list[dict], end: str = "\n") -> str:
    path.write_text("\n".join(map(json.dumps, groups)) + end)
    return str(path)


def packed(data_path: str, batch_size: int, num: int) -> list[list[int]]:
    """The first ids of the groups of the first batches."""
    batches = OfflineData(data_path, batch_size).batches()
    return [[g["tokens"][0][0] for g in next(batches).raw_groups] for _ in range(num)]


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
        assert data.summarize() == DataSummary(num_batches=2, num_groups=3, num_rollouts=8)
        batches = data.batches()
        assert next(batches).raw_groups == GROUPS[:2]
        assert next(batches).raw_groups == GROUPS[2:]


class TestPacking:
    def test_groups_are_never_split_and_keep_their_order(self, tmp_path):
        path = write(tmp_path / "data.jsonl", [group(3), group(2, 20), group(1, 30), group(4, 40)])
        assert packed(path, 4, 3) == [[10], [20, 30], [40]]

    def test_passes_follow_one_another_with_the_same_batches_and_go_on_counting(self, tmp_path):
        path = write(tmp_path / "data.jsonl", GROUPS)
        batches = OfflineData(path, 4).batches()
        seen = [next(batches) for _ in range(4)]
        assert [batch.number for batch in seen] == [0, 1, 2, 3]
        assert seen[2].raw_groups == seen[0].raw_groups

    @pytest.mark.parametrize("first", [0, 1, 2, 3])
    def test_a_resume_begins_with_the_batch_after_those_that_were_trained(self, tmp_path, first):
        path = write(tmp_path / "data.jsonl", GROUPS)
        batch = next(OfflineData(path, 4).batches(first))
        assert (batch.number, batch.raw_groups) == (first, [GROUPS[:2], GROUPS[2:]][first % 2])

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
