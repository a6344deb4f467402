"""What `AtroposTrainer` chooses for the kinds of attention there are, on this device, and whether it trains the same there.

Each architecture is a process, and all run at the same time; `architecture.py` is what they run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from .architecture import ARCHITECTURES, TINY_ARCHITECTURES
from .bench import Bench
from .sharded import ROOT, environment, result_of


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as directory:
        processes = {}
        for name in TINY_ARCHITECTURES if bench.is_tiny else ARCHITECTURES:
            command = [sys.executable, "-m", "gpu_sections.architecture", name, str(Path(directory) / name)]
            processes[name] = subprocess.Popen(
                [*command, bench.device.type],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(),
                cwd=ROOT,
            )
        for name, process in processes.items():
            bench.attempt(lambda p=process: result_of(p), architecture=name)
