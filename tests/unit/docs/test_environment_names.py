"""docs/environment_names.md, which a sweep beside a server writes, has the names that there are."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from trl_atropos.envs.ecosystems import ECOSYSTEMS


ROOT = Path(__file__).parents[3]
FILE = ROOT / "docs" / "environment_names.md"
WITH_NAMES = [name for name in ECOSYSTEMS if name != "openenv"]


@pytest.fixture(scope="module")
def sweep():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("environments")
        # The name is a common one.
        del sys.modules["environments"]


@pytest.mark.parametrize("ecosystem", WITH_NAMES)
def test_every_name_has_a_row(sweep, ecosystem):
    rows = sweep.read_tables(FILE)[ecosystem]
    assert all(name.startswith(f"{ecosystem}:") for name in rows)
    if ECOSYSTEMS[ecosystem].is_installed:
        assert list(rows) == [f"{ecosystem}:{name}" for name in ECOSYSTEMS[ecosystem].task_names()]


def test_at_least_150_delivered_a_group_within_20_minutes(sweep):
    came = [row for rows in sweep.read_tables(FILE).values() for row in rows.values()]
    num_delivered = sum(row.what == sweep.DELIVERED for row in came)
    assert num_delivered >= 150
    assert sum(row.seconds for row in came) <= 20 * 60
    page = (ROOT / "docs" / "environments.md").read_text()
    assert f"{num_delivered} of {len(came)} delivered one" in page


def test_a_section_is_replaced_and_the_others_stay(sweep, tmp_path):
    path = tmp_path / "names.md"
    came, failed = sweep.Answer("yes", 30.0), sweep.Answer("It needs data.", 0.1)
    sweep.write_table(path, "textarena", {"textarena:B": came, "textarena:A": failed})
    sweep.write_table(path, "reasoning-gym", {"reasoning-gym:x": came})
    sweep.write_table(path, "textarena", {"textarena:A": came})
    assert sweep.read_tables(path) == {"reasoning-gym": {"reasoning-gym:x": came}, "textarena": {"textarena:A": came}}
    lines = path.read_text().splitlines()
    assert "1 of 1 delivered a group, in 0.5 minutes." in lines
    assert any(line.startswith("2 of 2 delivered a group, in 1.0 minutes") for line in lines)
    # Nothing is written by hand.
    assert FILE.read_text().startswith(sweep.TITLE.format(group_size=sweep.GROUP_SIZE, max_turns=sweep.MAX_TURNS))
