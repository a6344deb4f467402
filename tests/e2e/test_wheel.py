"""What is installed from the wheel works without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from servers import ROOT


TIMEOUT_S = 300
# Of the pure layers, the command line and the import rules: they look at the package, not at the checkout's copy.
TESTS = (
    "test_errors",
    "test_import_rules",
    "cli/test_cli_model",
    "loss/test_advantages",
    "loss/test_losses",
    "wire/test_journal",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    # Of a copy: building leaves a directory behind.
    source = directory / "source"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(directory),
    ]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    (path,) = directory.glob("*.whl")
    return path


def test_it_holds_every_module_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "trl_atropos"
    files = [package / "py.typed", *(path for kind in ("py", "j2", "yaml") for path in package.rglob(f"*.{kind}"))]
    assert names == {path.relative_to(ROOT).as_posix() for path in files}


def test_unit_tests_pass_with_what_it_installs(wheel, tmp_path):
    installed = tmp_path / "installed"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(installed),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_S)
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(ROOT / f"tests/unit/{name}.py") for name in TESTS)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:]
    # PYTHONPATH comes before the editable install.
    where = subprocess.run(
        [sys.executable, "-c", "import trl_atropos; print(trl_atropos.__file__)"],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(installed))
    assert (installed / "bin" / "trl-atropos").is_file()
