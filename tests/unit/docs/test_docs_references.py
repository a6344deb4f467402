"""Documents that say "this is tested" name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[3]
TESTS = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
REFERENCE = re.compile(r"`((?:[\w/]+\.py)?(?:::)?(?:(?:Test\w+|test_\w+)(?:::test_\w+)?)?)`")


def references(text: str) -> list[tuple[str, list[str]]]:
    """`(file, names)` of everything in backquotes that looks like a test."""
    found = []
    for reference in REFERENCE.findall(text):
        file, *names = [reference] if ".py" not in reference else reference.split("::")
        if ".py" not in file:
            file, names = "", reference.split("::")
        if file.rpartition("/")[2].startswith(("test_", "transport_contract")) or any(names):
            found.append((file, [name for name in names if name]))
    return found


def is_there(file: str, names: list[str]) -> bool:
    texts = [text for path, text in TESTS.items() if not file or str(path).endswith(f"/{file.removeprefix('tests/')}")]
    return any(all(re.search(rf"(def|class) {name}\b", text) for name in names) for text in texts)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document):
    assert [reference for reference in references(document.read_text()) if not is_there(*reference)] == []


def test_references_are_found_in_every_form():
    text = (
        "`unit/test_a.py`, `tests/unit/test_a.py::TestB::test_c`, `test_d`, `TestE::test_f`, `losses.py`, `vllm serve`"
    )
    assert references(text) == [
        ("unit/test_a.py", []),
        ("tests/unit/test_a.py", ["TestB", "test_c"]),
        ("", ["test_d"]),
        ("", ["TestE", "test_f"]),
    ]
    assert not is_there("unit/docs/test_docs_references.py", ["test_that_nobody_wrote"])
    assert not is_there("unit/test_that_is_no_file.py", [])
