"""Refused groups: kept with their reason, counted, and too many end the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl_atropos.data.quarantine import Quarantine
from trl_atropos.errors import AtroposBatchLost, AtroposProtocolError, JournalError
from trl_atropos.types import Position, RejectedGroup


def rejected(index: int, env_id: int | None = 0, reason: str = "masks") -> RejectedGroup:
    return RejectedGroup(
        index, env_id, 2, AtroposProtocolError(f"Group {index} is bad.", "It is.", "Mend it."), reason
    )


RAW = [{"tokens": [[i]]} for i in range(4)]


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_refused_group_is_written_with_its_reason_and_its_raw_data(tmp_path):
    quarantine = Quarantine(tmp_path / "out" / "quarantine.jsonl", 0.5)
    quarantine.add(Position(7, 0), RAW, [rejected(2, env_id=3)])
    assert entries(quarantine.path) == [
        {
            "batch": 7,
            "group": 2,
            "env_id": 3,
            "reason": "masks",
            "error": "Group 2 is bad. It is. Mend it.",
            "raw": {"tokens": [[2]]},
        }
    ]


def test_good_batches_write_nothing(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.0)
    quarantine.add(Position(0, 0), RAW, [])
    assert not quarantine.path.exists()
    assert list(quarantine.fractions) == [0.0]


def test_a_group_that_a_resume_replays_is_counted_again_and_written_once(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 0.5).add(Position(7, 0), RAW, [rejected(2)])
    again = Quarantine(path, 0.5)
    again.add(Position(7, 0), RAW, [rejected(2)])
    again.add(Position(8, 0), RAW, [rejected(2)])
    assert [(entry["batch"], entry["group"]) for entry in entries(path)] == [(7, 2), (8, 2)]
    assert again.num_groups == 2


def test_up_to_the_allowed_share_of_20_batches_the_run_goes_on(tmp_path):
    # 0.1 x 20 = 2 whole batches: four halves.
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.1)
    for number in range(4):
        quarantine.add(Position(number, 0), RAW, [rejected(0), rejected(1)])
    with pytest.raises(AtroposProtocolError) as caught:
        quarantine.add(Position(4, 0), RAW, [rejected(0, env_id=1, reason="scores")])
    # (4 x 0.5 + 0.25) / 20
    assert caught.value.what.startswith(
        "Refused groups make 11.2% of the last 20 batches (environment 0: 8 x masks, environment 1: 1 x scores)"
    )
    assert str(quarantine.path) in caught.value.why
    assert "--max_dropped_fraction (0.1)" in caught.value.fix
    assert len(entries(quarantine.path)) == 9


def test_only_the_last_20_batches_count(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.05)
    for start in range(0, 84, 21):
        # One whole batch of 20 is allowed; after 20 good ones it is forgotten.
        quarantine.add(Position(start, 0), RAW, [rejected(i) for i in range(4)])
        for number in range(start + 1, start + 21):
            quarantine.add(Position(number, 0), RAW, [])
    assert quarantine.num_groups == 16


def test_with_0_the_first_refused_group_ends_the_run_and_is_written_before(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.0)
    with pytest.raises(AtroposProtocolError, match="Refused groups make 1"):
        quarantine.add(Position(0, 0), RAW, [rejected(0)])
    assert len(entries(quarantine.path)) == 1


def test_a_batch_that_the_api_lost_counts_as_a_whole(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.05)
    quarantine.add_lost_batch(AtroposBatchLost("Lost.", "It was NaN.", "Mend the score."))
    with pytest.raises(AtroposProtocolError, match=r"make 10\.0% of the last 20 batches; the last one: Lost"):
        quarantine.add_lost_batch(AtroposBatchLost("Lost.", "It was NaN.", "Mend the score."))


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    quarantine = Quarantine(tmp_path / "file" / "quarantine.jsonl", 0.5)
    with pytest.raises(JournalError, match="--output_dir"):
        quarantine.add(Position(0, 0), RAW, [rejected(0)])
