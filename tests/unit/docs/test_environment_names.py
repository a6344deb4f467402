"""docs/environment_names.md, which a sweep beside a server writes, has the names that there are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from trl_atropos.envs.ecosystems import ECOSYSTEMS


ROOT = Path(__file__).parents[3]
FILE = ROOT / "docs" / "environment_names.md"
WITH_NAMES = [name for name in ECOSYSTEMS if name != "openenv"]


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("environment_sweep", ROOT / "benchmarks" / "environments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ecosystem", WITH_NAMES)
def test_every_name_has_a_row(sweep, ecosystem):
    rows = sweep.read_tables(FILE)[ecosystem]
    assert all(name.startswith(f"{ecosystem}:") for name in rows)
    if ECOSYSTEMS[ecosystem].is_installed:
        assert list(rows) == [f"{ecosystem}:{name}" for name in ECOSYSTEMS[ecosystem].task_names()]


def test_at_least_150_delivered_a_group(sweep):
    came = [what for rows in sweep.read_tables(FILE).values() for what in rows.values()]
    assert sum(what == sweep.DELIVERED for what in came) >= 150


def test_a_section_is_replaced_and_the_others_stay(sweep, tmp_path):
    path = tmp_path / "names.md"
    sweep.write_table(path, "textarena", {"textarena:B": "yes", "textarena:A": "It needs data."})
    sweep.write_table(path, "reasoning-gym", {"reasoning-gym:x": "yes"})
    sweep.write_table(path, "textarena", {"textarena:A": "yes"})
    assert sweep.read_tables(path) == {
        "reasoning-gym": {"reasoning-gym:x": "yes"},
        "textarena": {"textarena:A": "yes"},
    }
    assert "1 of 1 delivered a group." in path.read_text()
    # Nothing is written by hand.
    assert FILE.read_text().startswith(sweep.TITLE.format(group_size=sweep.GROUP_SIZE, max_turns=sweep.MAX_TURNS))
