"""The environment of docs/tutorial.md, as the page has it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "tutorial.md").read_text()


@pytest.fixture
def my_env(tmp_path: Path) -> ModuleType:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    path = tmp_path / "my_env.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("my_env", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("completion", "reward"), [(" cold", 1.0), ("Cold.", 1.0), (" cold as ice", 0.5), (" warm", 0.0), ("", 0.0)]
)
def test_its_scores(my_env, completion, reward):
    assert my_env.compute_reward(completion, "cold") == reward


def test_its_defaults_fit_the_quickstart(my_env):
    config, (server,) = my_env.OppositesEnv.config_init()
    assert config.group_size == 8
    assert server.server_type == "vllm"
    assert my_env.make_prompt("hot").endswith("Opposite:")
