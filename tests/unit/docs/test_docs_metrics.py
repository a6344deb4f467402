"""docs/metrics.md against the tables of `metric_help.py`, and `METRICS` against the code that makes metrics.

Whether environments and evaluations report what their tables say: test_environment_metrics.py and test_evaluation.py.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import trl_atropos
from trl_atropos.report.metric_help import ENVIRONMENT_METRICS, EVALUATION_METRICS, METRICS


PACKAGE = Path(trl_atropos.__file__).parent
ROOT = PACKAGE.parent
# The dictionaries of the first say how metrics are shown; the second has metrics, and a page, of its own.
OTHERS = {PACKAGE / "cli", PACKAGE / "api"}
CONSTRUCTORS = {"mean_of", "total", "minimum_of", "maximum_of", "Metric"}
# Ratios and weights have no unit.
UNIT_OR_RANGE = re.compile(
    r"in (nats|seconds|bytes|MB per second|versions|the environment's unit)\b|\b0 to 1\b|^1 if .*, 0 else|^1 if .*, else 0"
    r"|\bCount\.|\btokens of\b|\bper token\b|\bratio\b|^Mean of exp\(|^Mean weight\b|^Weight sets\b"
)


def metrics_doc() -> ModuleType:
    # A script, and its folder has the name of a distribution that everything depends on.
    spec = importlib.util.spec_from_file_location("metrics_doc", ROOT / "packaging" / "metrics_doc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _makes_metric(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) in CONSTRUCTORS


def _identifier(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _strings(nodes: list[ast.expr | None]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def metric_names(source: str) -> set[str]:
    """Names under which the functions of a module make metrics.

    Those are the keys of a dictionary that holds a metric, or that a function named `...metrics` makes; what is assigned to
    `metrics[...]`; and any other key with a slash inside.
    """
    names: set[str] = set()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Dict):
                is_metrics = function.name.endswith("metrics") or any(map(_makes_metric, node.values))
                names.update(key for key in _strings(node.keys) if is_metrics or "/" in key)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Subscript):
                        is_metrics = _identifier(target.value).endswith("metrics")
                        names.update(key for key in _strings([target.slice]) if is_metrics or "/" in key)
    return names


def names_in_package() -> set[str]:
    files = [path for path in PACKAGE.rglob("*.py") if not OTHERS & set(path.parents)]
    assert len(files) > 20
    return set().union(*(metric_names(path.read_text()) for path in files))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f():\n    return {'reward': mean_of(x), 'other': y}", {"reward", "other"}),
        ("def f():\n    metrics['kl'] = mean_of(kl)", {"kl"}),
        ("def f(self):\n    self._metrics['kl'] = 1.0", {"kl"}),
        ("def f():\n    logs['perf/x_s'] = 1.0", {"perf/x_s"}),
        ("class C:\n    def metrics(self):\n        return {'a': 1, **more}", {"a"}),
        ("def f():\n    return {'perf/x_s': 1.0}", {"perf/x_s"}),
        ("SHOWN = {'perf/x_s': 'seconds'}\ndef f():\n    batch['targets'] = 1\n    return {'a': 1}", set()),
    ],
)
def test_names_are_found_in_every_form(source, names):
    assert metric_names(source) == names


def test_every_metric_that_the_code_makes_is_described():
    assert names_in_package() - set(METRICS) == set()


def test_every_described_metric_is_made():
    assert set(METRICS) - names_in_package() == set()


@pytest.mark.parametrize(
    "description",
    [
        pytest.param(description, id=name)
        for table in (METRICS, ENVIRONMENT_METRICS, EVALUATION_METRICS)
        for name, description in table.items()
    ],
)
def test_a_description_ends_with_a_period_and_names_a_unit_or_a_range(description):
    assert description.endswith(".")
    assert UNIT_OR_RANGE.search(description)


def test_the_page_is_what_the_script_makes_of_the_descriptions():
    script = metrics_doc()
    assert script.TARGET == ROOT / "docs" / "metrics.md"
    assert script.TARGET.read_text() == script.render(), "run `python packaging/metrics_doc.py`"


def test_the_page_has_every_metric_under_its_heading():
    # Of the text alone, not of the function that made it.
    found: dict[str, dict[str, str]] = {}
    for part in (ROOT / "docs" / "metrics.md").read_text().split("\n## ")[1:]:
        heading, _, table = part.partition("\n")
        rows = re.findall(r"^\| `(\S+)` \| (.+) \|$", table, re.MULTILINE)
        assert rows, heading
        found[heading] = {name: meaning.replace("\\|", "|") for name, meaning in rows}
    assert found.pop("Each environment: `env/<name>/`") == ENVIRONMENT_METRICS
    assert found.pop("Evaluations: `eval_`") == EVALUATION_METRICS
    for heading, names in found.items():
        assert {f"`{name.split('/')[0]}/`" if "/" in name else "Without a prefix" for name in names} == {heading}
    assert {name: meaning for names in found.values() for name, meaning in names.items()} == METRICS
