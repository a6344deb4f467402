"""docs/config.md against the fields of the configuration."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest

from trl_atropos.trainer.atropos_config import AtroposConfig


ROOT = Path(__file__).parents[3]
CLASSES = [cls for cls in AtroposConfig.__mro__ if cls.__module__.startswith("trl_atropos.")]
NAMES = {field.name for field in fields(AtroposConfig)}
OPTIONS = [name for cls in CLASSES for name in cls.__annotations__ if name in NAMES]


def test_the_page_is_made_from_the_fields():
    spec = importlib.util.spec_from_file_location("config_doc", ROOT / "packaging" / "config_doc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == module.render(), "run `python packaging/config_doc.py`"
    assert all(f"| `{name}` |" in page for name in OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_says_what_it_does(name):
    # `--help` shows the same text.
    text = AtroposConfig.__dataclass_fields__[name].metadata["help"]
    assert text.endswith(".")
