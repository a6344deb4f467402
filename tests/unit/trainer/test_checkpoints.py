"""Which checkpoint is resumed from: never one in the middle of which the trainer was killed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from trl_atropos.errors import PreflightError
from trl_atropos.trainer.checkpoints import find_checkpoint, forget_checkpoint


STATE = {"next_batch": 3, "policy_version": 3}
WHOLE = json.dumps({"global_step": 3, "stateful_callbacks": {"AtroposTrainer": STATE}})


def save(directory: Path, text: str | None) -> Path:
    directory.mkdir(parents=True)
    if text is not None:
        (directory / "trainer_state.json").write_text(text)
    return directory


def test_the_newest_by_number_is_found_with_its_state(tmp_path):
    for step in (9, 10, 2):
        save(tmp_path / f"checkpoint-{step}", WHOLE)
    assert find_checkpoint(tmp_path, True) == (str(tmp_path / "checkpoint-10"), STATE)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        WHOLE[:-1],
        "[]",
        json.dumps({"global_step": 6}),
        json.dumps({"stateful_callbacks": {"AtroposTrainer": 1}}),
    ],
    ids=["missing", "empty", "cut off", "not an object", "without our state", "state is not an object"],
)
def test_an_incomplete_one_is_passed_over_and_said(tmp_path, caplog, text):
    save(tmp_path / "checkpoint-3", WHOLE)
    save(tmp_path / "checkpoint-6", text)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, True) == (str(tmp_path / "checkpoint-3"), STATE)
    assert "checkpoint-6 is not complete" in caplog.text


@pytest.mark.parametrize("names", [[], ["checkpoint-x"], ["other"]])
def test_without_a_checkpoint_the_run_starts_at_step_0(tmp_path, names):
    for name in names:
        save(tmp_path / name, WHOLE)
    assert find_checkpoint(tmp_path, True) == (None, {})
    assert find_checkpoint(tmp_path / "missing", True) == (None, {})


@pytest.mark.parametrize("value", [None, False])
def test_a_run_that_does_not_resume_looks_for_none(tmp_path, value):
    save(tmp_path / "checkpoint-3", WHOLE)
    assert find_checkpoint(tmp_path, value) == (None, {})


def test_a_checkpoint_that_is_named_must_be_complete(tmp_path):
    directory = save(tmp_path / "checkpoint-7", WHOLE)
    assert find_checkpoint(tmp_path, str(directory)) == (str(directory), STATE)
    forget_checkpoint(tmp_path, 7)
    with pytest.raises(PreflightError, match="checkpoint-7 is not complete"):
        find_checkpoint(tmp_path, str(directory))
    # There may be nothing to forget.
    forget_checkpoint(tmp_path, 7)
