"""docs/architecture.md against the code: what it names exists where it says, and its tables are those of the code.

And of all documents: what they name inside of the package is there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trl_atropos
from trl_atropos.report.metric_help import METRICS


PACKAGE = Path(trl_atropos.__file__).parent
ROOT = PACKAGE.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
DRAWING = re.compile(r"^```\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:/|\.py|\.md)")
# `file.py` (`A`, `B`); names of the package's surface are bold.
NAMED_TOGETHER = re.compile(r"`([\w/]+\.py)`\s+\(((?:\**`[\w.]+`\**(?:,\s+)?)+)\)")
# In the drawing: a file, one name, and a gap.
DRAWN = re.compile(r"([\w/]+\.py) ([A-Za-z_][\w.]*)(?=  |$)", re.M)
IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")
# Of vLLM, of the shell, and of the drawing.
FOREIGN = {"run-api", "<-", "trl-atropos"}


def find(path: str) -> Path | None:
    """The file or folder of this name in the package, or else in the repository."""
    return next((base / path for base in (PACKAGE, ROOT) if (base / path).exists()), None)


def defined_in(path: Path) -> set[str]:
    """Top-level names of a file, and `Class.name` of what stands in the body of a class."""
    names: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    add(ast.parse(path.read_text()).body, "")
    return names


def identifiers() -> set[str]:
    """Every name, attribute, argument and one-word string of the package, and its modules."""
    found = {part for path in PACKAGE.rglob("*.py") for part in path.relative_to(PACKAGE).with_suffix("").parts}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for field in ("id", "attr", "arg", "name"):
                value = getattr(node, field, None)
                if isinstance(value, str):
                    found.add(value)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


IDENTIFIERS = identifiers()


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = re.findall(r"^\|(.+)\|$", section(title), re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def missing_paths(text: str) -> list[str]:
    spans = [span for span in SPAN.findall(DRAWING.sub("", text)) if PATH.fullmatch(span)]
    drawn = [path for drawing in DRAWING.findall(text) for path in re.findall(r"[\w/]+/\w+\.py", drawing)]
    return [path for path in [*spans, *drawn] if find(path) is None]


def named_together(text: str) -> Iterator[tuple[str, str]]:
    """`(file, name)` wherever the page says that a name is defined in a file."""
    for drawing in DRAWING.findall(text):
        yield from DRAWN.findall(drawing)
    for path, names in NAMED_TOGETHER.findall(DRAWING.sub("", text)):
        for name in SPAN.findall(names):
            yield path, name


def misplaced(text: str) -> list[str]:
    found = []
    for path, name in named_together(text):
        file = find(path)
        if file is None or name not in defined_in(file):
            found.append(f"{path} {name}")
    return found


def unknown_words(text: str) -> list[str]:
    """What stands in backquotes and looks like a name or a metric, and is none."""
    unused = {word for row in rows("Words") for word in SPAN.findall(row[2])}
    imported = {word for row in rows("Who may import whom") for cell in row[:2] for word in SPAN.findall(cell)}
    found = []
    for span in SPAN.findall(DRAWING.sub("", text)):
        if span in unused | imported | FOREIGN or PATH.fullmatch(span):
            continue
        if "/" in span and not span.startswith("/") and " " not in span:
            found += [] if span in METRICS else [span]
        elif IDENTIFIER.fullmatch(span):
            found += [] if set(span.split(".")) <= IDENTIFIERS else [span]
    return found


def test_every_path_exists():
    assert missing_paths(TEXT) == []


def test_every_name_is_defined_in_the_file_that_it_stands_with():
    assert misplaced(TEXT) == []
    assert len(list(named_together(TEXT))) > 100


def test_every_name_in_backquotes_is_one_of_the_code():
    assert unknown_words(TEXT) == []


def test_everything_in_the_drawing_is_a_file_with_one_name_or_not_ours():
    (drawing,) = DRAWING.findall(section("One optimizer step"))
    assert len(DRAWN.findall(drawing)) == len(re.findall(r"[\w/]+/\w+\.py", drawing)) > 25


def imports_of() -> dict[str, set[str]]:
    """`IMPORTS_OF` of the test that enforces it."""
    tree = ast.parse((ROOT / "tests" / "unit" / "test_import_rules.py").read_text())
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "IMPORTS_OF" for name in node.targets)
    ]
    assert isinstance(value, ast.Dict)
    # `set()` is no literal.
    values = [set() if isinstance(node, ast.Call) else ast.literal_eval(node) for node in value.values]
    return {ast.literal_eval(key): names for key, names in zip(value.keys, values, strict=True) if key is not None}


def test_the_table_of_imports_is_the_one_that_is_enforced():
    table = rows("Who may import whom")
    shown = {package.strip("`"): set(SPAN.findall(allowed)) for package, allowed, _ in table}
    assert shown == imports_of()
    assert len(shown) == len(table)
    assert all(why for _, _, why in table)


def test_every_package_and_every_file_of_the_ground_has_its_paragraph():
    paragraphs = re.findall(r"^ *- `([\w./]+)`", section("Packages"), re.M)
    packages = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("*/__init__.py")}
    ground = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert sorted(paragraphs) == sorted(packages | ground)


def test_the_public_names_are_those_in_bold():
    bold = re.findall(r"\*\*`(\w+)`\*\*", section("Packages"))
    assert sorted(bold) == sorted(set(trl_atropos.__all__) - {"__version__"})


def test_words_that_are_not_used_are_not_used():
    # As a name of their own, or as a part of one.
    unused = {word for row in rows("Words") for word in SPAN.findall(row[2])}
    assert len(unused) > 8
    names = [name for name in IDENTIFIERS if IDENTIFIER.fullmatch(name)]
    assert [(word, name) for word in sorted(unused) for name in names if f"_{word}_" in f"_{name.lower()}_"] == []


def test_every_folder_of_tests_has_its_row():
    folders = {f"tests/{path.parent.name}/" for path in (ROOT / "tests").glob("*/test_*.py")}
    assert {SPAN.findall(row[0])[0] for row in rows("Tests")} == folders


def is_best_name(dotted: str) -> bool:
    """Whether a name inside of the package exists: a public one without its module, a module, or what a module defines."""
    module, _, name = dotted.rpartition(".")
    if name in trl_atropos.__all__:
        return not module
    if find(f"{dotted.replace('.', '/')}.py") is not None:
        return True
    file = find(f"{module.replace('.', '/')}.py")
    return file is not None and name in defined_in(file)


def wrong_dotted_names(text: str) -> list[str]:
    """Names such as `trl_atropos.wire.client.AtroposClient` that are none, or that have a shorter, public name."""
    found = re.findall(r"\btrl_atropos\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", text)
    return [dotted for dotted in found if not is_best_name(dotted)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_dotted_names_in_documents_are_public_names_or_those_of_modules(document):
    assert wrong_dotted_names(document.read_text()) == []


def test_the_page_of_the_api_has_every_public_name():
    shown = re.findall(r"^::: trl_atropos\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    # The options have a page of their own.
    assert sorted([*shown, "AtroposConfig", "__version__"]) == sorted([*trl_atropos.__all__, "errors"])


@pytest.mark.parametrize(
    ("find_wrong", "text", "wrong"),
    [
        (missing_paths, "`loss/no_such_file.py`, `loss/losses.py`, `weight_sync/`", ["loss/no_such_file.py"]),
        (missing_paths, "`no_such_package/` and `docs/losses.md`", ["no_such_package/"]),
        (missing_paths, "```\nall ranks  loss/gone.py Gone  what\n```", ["loss/gone.py"]),
        (misplaced, "`loss/losses.py` (`policy_loss`,\n**`LossGone`**)", ["loss/losses.py LossGone"]),
        (misplaced, "`loss/step.py` (`LossWatch.check`, `LossWatch.gone`)", ["loss/step.py LossWatch.gone"]),
        (misplaced, "`loss/gone.py` (`policy_loss`)", ["loss/gone.py policy_loss"]),
        (misplaced, "```\nall ranks  loss/step.py policy_loss  what\n```", ["loss/step.py policy_loss"]),
        (unknown_words, "`LossGone`, `LossInputs`, `perf/gone_s`, `/batch`", ["LossGone", "perf/gone_s"]),
        (wrong_dotted_names, "trl_atropos.loss.losses.LossInputs, trl_atropos.LossInputs", ["loss.losses.LossInputs"]),
        (wrong_dotted_names, "trl_atropos.losses.total, trl_atropos.loss.metrics.total", ["losses.total"]),
        (wrong_dotted_names, "`trl_atropos.loss.metrics.gone` of trl_atropos.loss.metrics", ["loss.metrics.gone"]),
    ],
)
def test_what_is_wrong_is_found(find_wrong, text, wrong):
    # Guards the guards above.
    assert find_wrong(text) == wrong
