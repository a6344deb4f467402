"""The documentation as a site: it builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[3]
REMOTE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=source,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    built = build(ROOT, directory)
    assert built.returncode == 0, built.stderr
    return directory


def test_every_page_is_built(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.glob("*.html"):
        found = [tag for tag in REMOTE.findall(page.read_text()) if 'rel="canonical"' not in tag]
        assert not found, page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:)?//|@import", sheet.read_text()), sheet.name
    assert REMOTE.findall('<script src="https://example.com/a.js"></script><img alt="" src=//example.com/a.png>')


def test_formulas_and_types_have_lost_their_notation(site):
    losses = (site / "losses.html").read_text()
    # As many as the page has in GitHub's notation, and none is left.
    text = (ROOT / "docs" / "losses.md").read_text()
    assert losses.count("<math") == len(re.findall(r"\$`[^`\n]+`\$|^```math$", text, re.M)) > 0
    assert "$<code>" not in losses
    api = (site / "api.html").read_text()
    assert "*optional*" not in api and "<code>~" not in api
    assert "compute_advantage_weighted_sft_loss" in api


def test_a_link_to_nowhere_ends_the_build(tmp_path):
    for name in ("mkdocs.yml", "docs", "packaging", "trl_atropos"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "citing.md").open("a") as page:
        page.write("\n[Nothing](losses.md#no-such-heading)\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert "no-such-heading" in built.stderr
