from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from trl_atropos.errors import PreflightError
from trl_atropos.verl import installed
from trl_atropos.verl.installed import VERL_VERSION, check_verl


def pretend(monkeypatch: pytest.MonkeyPatch, verl: str | None, *, has_trl: bool) -> None:
    def version(name: str) -> str:
        if name == "verl" and verl is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return {"verl": verl, "trl": "1.16.0"}[name]

    monkeypatch.setattr(installed, "version", version)
    monkeypatch.setattr(installed, "find_spec", lambda name: object() if has_trl else None)


def test_the_version_it_is_written_for_passes(monkeypatch):
    pretend(monkeypatch, VERL_VERSION, has_trl=False)
    check_verl()


@pytest.mark.parametrize(
    ("verl", "has_trl", "message"),
    [
        (None, False, "verl is not installed"),
        ("0.9.2", False, "verl 0.9.2 is installed"),
        (VERL_VERSION, True, "TRL 1.16.0 is installed beside verl"),
    ],
)
def test_anything_else_is_refused_with_what_to_install(verl, has_trl, message, monkeypatch):
    pretend(monkeypatch, verl, has_trl=has_trl)
    with pytest.raises(PreflightError, match=message) as caught:
        check_verl()
    assert "requirements/verl.txt" in caught.value.fix or f"verl=={VERL_VERSION}" in caught.value.fix


def test_the_trainer_says_so_where_verl_is_missing():
    # This environment has TRL, beside which verl is refused, too.
    with pytest.raises(PreflightError, match="verl"):
        importlib.import_module("trl_atropos.verl.atropos_sft_trainer")


def test_the_pinned_environment_has_this_version_and_no_trl():
    pins = (Path(__file__).resolve().parents[3] / "requirements" / "verl.txt").read_text().splitlines()
    assert f"verl=={VERL_VERSION}" in pins
    assert [pin for pin in pins if pin.startswith("trl==")] == []
