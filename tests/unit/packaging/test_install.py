"""packaging/install.sh up to where it installs, with interpreters and a uv that are shell scripts; pip's settings for uv."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "packaging"))

from pip_settings import parse_pip_config, translate  # noqa: E402


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_python(path: Path, identity: str, pip: str) -> Path:
    """Make an interpreter that says `identity` and whose virtual environments answer `-m pip` with `pip`."""
    inside = f'case "$*" in "-m pip "*) {pip} ;; *pip_settings.py) echo "uv_flags=()" ;; -c*) echo {identity} ;; esac'
    body = f"""case "$2" in
venv) /bin/mkdir -p "$3/bin"; /bin/cp "$0.inside" "$3/bin/python" ;;
*) echo {identity} ;;
esac"""
    script(path.with_name(f"{path.name}.inside"), inside)
    return script(path, body)


def install(venv: Path, python: Path, *first_on_path: Path) -> subprocess.CompletedProcess[str]:
    # Without the folders of this environment, where a real uv may lie.
    path = os.pathsep.join([*map(str, first_on_path), "/usr/bin", "/bin"])
    command = ["packaging/install.sh", str(venv), str(python)]
    return subprocess.run(command, cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("identity", ["cpython 3.10.13", "cpython 3.14.0", "cpython 3.13.1t", "pypy 3.11.5"])
def test_python_without_pins_is_refused_at_once(tmp_path: Path, identity: str) -> None:
    result = install(tmp_path / "venv", fake_python(tmp_path / "python", identity, "exit 1"))
    assert result.returncode == 1
    assert f"is {identity}, and requirements/cpu.txt is pinned for CPython 3.11, 3.12 and 3.13." in result.stderr
    assert "make install PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_interpreter_that_does_not_run_is_named(tmp_path: Path) -> None:
    result = install(tmp_path / "venv", tmp_path / "python3.11")
    assert result.returncode == 1
    assert f"{tmp_path}/python3.11 does not run. Name an interpreter" in result.stderr


def test_environment_of_another_python_is_left_alone(tmp_path: Path) -> None:
    script(tmp_path / "venv" / "bin" / "python", "echo cpython 3.11.9")
    result = install(tmp_path / "venv", fake_python(tmp_path / "python", "cpython 3.12.1", "exit 1"))
    assert result.returncode == 1
    assert "holds cpython 3.11.9" in result.stderr
    assert "make install VENV=.venv-3.12.1" in result.stderr


def test_without_uv_pip_goes_on_and_says_why(tmp_path: Path) -> None:
    pip = 'case "$*" in *" uv=="*) echo "ERROR: no index" >&2; exit 1 ;; *) exit 0 ;; esac'
    result = install(tmp_path / "venv", fake_python(tmp_path / "python", "cpython 3.11.0", pip))
    assert result.returncode == 0, result.stderr
    assert (
        "uv is neither on PATH nor to be had from the package index (ERROR: no index); going on with" in result.stderr
    )
    assert "pinned packages, with pip" in result.stdout


def test_uv_that_fails_gives_way_to_pip(tmp_path: Path) -> None:
    uv = script(
        tmp_path / "bin" / "uv", 'case "$*" in *--dry-run*) ;; *) echo "error: No such index" >&2; exit 2 ;; esac'
    )
    python = fake_python(tmp_path / "python", "cpython 3.12.0", "exit 0")
    result = install(tmp_path / "venv", python, uv.parent)
    assert result.returncode == 0, result.stderr
    assert "uv could not install them (error: No such index); going on with pip" in result.stderr
    assert "pinned packages, with pip" in result.stdout


def test_cuda_build_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    uv = script(tmp_path / "bin" / "uv", f'echo "$*" >>{tmp_path}/calls; echo " + torch==2.13.0" >&2')
    python = fake_python(tmp_path / "python", "cpython 3.13.0", "exit 0")
    result = install(tmp_path / "venv", python, uv.parent)
    assert result.returncode == 1
    assert "torch 2.13.0 for cpython 3.13.0 would be a CUDA build" in result.stderr
    assert "PIP_EXTRA_INDEX_URL=" in result.stderr
    assert [call for call in (tmp_path / "calls").read_text().splitlines() if "--dry-run" not in call] == []


CONFIG = """\
:env:.find-links='/wheels /more'
global.cert='/ca.pem'
global.extra-index-url='\\nhttps://cpu.example/whl\\nfile:///nowhere/simple'
global.find-links='/replaced'
global.index-url='https://mirror.example/simple'
install.no-index='true'
"""


def test_what_pip_is_set_up_with_reaches_uv() -> None:
    variables, flags, left_out = translate(parse_pip_config(CONFIG), {})
    assert variables == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://cpu.example/whl",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/ca.pem",
    }
    assert flags == ["--no-index"]
    assert left_out == ["pip's extra-index-url file:///nowhere/simple is no folder; it is left out."]


def test_variables_of_uv_win_over_pip() -> None:
    own = {"UV_INDEX_URL": "https://own.example", "UV_EXTRA_INDEX_URL": "https://x.example", "UV_FIND_LINKS": "/own"}
    variables, _, _ = translate(parse_pip_config(CONFIG), own | {"UV_INDEX_STRATEGY": "first-index"})
    assert variables == {"SSL_CERT_FILE": "/ca.pem"}


def test_no_settings_of_pip_leave_uv_as_it_is() -> None:
    assert translate(parse_pip_config(""), {}) == ({}, [], [])
