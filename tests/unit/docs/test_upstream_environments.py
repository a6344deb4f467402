"""docs/upstream_environments.md, which a run on a clone of upstream writes, has a row for each file, as the script makes them."""

from __future__ import annotations

import re
from pathlib import Path

import page
import pytest
from recipes import CANNOT_RUN, NEEDS_MORE, RECIPES


FILE = Path(__file__).parents[3] / "docs" / "upstream_environments.md"
NUM_FEASIBLE = 46
"""Files that need nothing but packages, a model and small data; the judges of two and the soundings of one come on top."""


@pytest.fixture(scope="module")
def rows():
    return page.read_page(FILE)


def test_nothing_is_written_by_hand(rows):
    assert page.render_page(rows) == FILE.read_text(encoding="utf-8")


def test_no_directory_of_a_machine_is_shown():
    assert re.findall(r"site-packages|(?<![\w.])/(?:tmp|home|root|work)/", FILE.read_text(encoding="utf-8")) == []


def test_every_file_is_in_one_section_and_has_its_recipe_or_its_reason(rows):
    files = [file for section in rows.values() for file in section]
    assert len(files) == len(set(files))
    without = {file for name in (page.TRAINED, page.DELIVERED) for file in rows[name]} - set(RECIPES)
    assert without == set()
    assert set(rows[page.NEEDS]) == set(NEEDS_MORE)
    assert set(rows[page.CANNOT]) == set(CANNOT_RUN)
    assert set(RECIPES) <= set(files)


def test_most_of_those_that_can_were_trained_on(rows):
    assert len(rows[page.TRAINED]) >= NUM_FEASIBLE - 4


def result(outcome: str, **more: object) -> dict[str, object]:
    return {"outcome": outcome, "options": ["--env.group_size", "4"], "shims": ["wandb"], **more}


def test_a_page_is_made_of_results():
    trained, delivered, needs, cannot = (
        "gsm8k_server.py",
        "rlaif_server.py",
        next(iter(NEEDS_MORE)),
        next(iter(CANNOT_RUN)),
    )
    step = {"grad_norm": 1.0, "sampling/sampling_logp_difference/max": 1.2e-6}
    results = {
        trained: result("trained", rewards=[1.0, 0.0], step=step, temperature=0.8),
        delivered: result("delivered", rewards=[1.0], step={"refused": "a | b"}),
        needs: result("nothing", said=["It said <that>."]),
        cannot: result(
            "nothing", said=["an error in /somewhere/environments/x.py", "(/a/.venv/site-packages/b/c.py)"]
        ),
    }
    made = page.make_page({**dict.fromkeys(results, False), "eval_environments/x_eval.py": True}, results)
    assert made[page.TRAINED][trained][1:] == ("`--env.group_size 4`", "wandb", "1, 0", "1e-06 at 0.8")
    assert made[page.DELIVERED][delivered][-1] == "a / b"
    assert made[page.NEEDS][needs] == (NEEDS_MORE[needs], "It said &lt;that>.")
    assert made[page.CANNOT][cannot][-1] == "an error in environments/x.py (b/c.py)"
    assert made[page.EVALUATES] == {"eval_environments/x_eval.py": ()}


def test_what_was_not_run_or_not_understood_has_no_row():
    with pytest.raises(ValueError, match=r"new_env\.py was not run"):
        page.make_page({"new_env.py": False}, {})
    with pytest.raises(ValueError, match=r"does not say why. It said: no key"):
        page.make_page({"new_env.py": False}, {"new_env.py": result("nothing", said=["no key"])})
