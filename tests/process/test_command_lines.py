"""Scripts and commands as a user starts them: processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from trl_atropos import AtroposConfig


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "scripts" / "atropos.py"
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


def test_help_of_the_training_script_lists_our_options(tmp_path):
    # Those in the bodies of our classes, as opposed to those of TrainingArguments.
    classes = [config for config in AtroposConfig.__mro__ if config.__module__.startswith("trl_atropos.")]
    ours = {name for config in classes for name in config.__annotations__ if not name.startswith("_")}
    assert len(ours) > 50
    # HOME: no cache of this user is read or written.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert [name for name in ours if f"--{name}" not in result.stdout] == []


def test_sigterm_ends_the_file_as_if_python_ran_it(tmp_path):
    program = tmp_path / "env.py"
    program.write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\n")
    command = [sys.executable, "-m", "trl_atropos.cli.main", "env", str(program)]
    result = subprocess.run(command, capture_output=True, timeout=120)
    assert result.returncode == -signal.SIGTERM, result.stderr


def test_the_line_that_tries_the_tutorials_environment_prints_what_the_page_says(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", TUTORIAL, flags=re.DOTALL)
    (tmp_path / "my_env.py").write_text(code)
    (line,) = re.findall(r'python -c "(import my_env; .*)"', TUTORIAL)
    printed = subprocess.run([sys.executable, "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert printed.returncode == 0, printed.stderr
    assert f"It prints `{printed.stdout.strip()}`." in TUTORIAL
