"""A real SGLang server on a CPU, with the shims beside this file."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from servers import HOST, wait_until_healthy

from trl_atropos.cli.launch.processes import free_port


SGLANG_PYTHON = os.environ.get("TRL_ATROPOS_SGLANG_PYTHON")
SHIMS = Path(__file__).with_name("shims") / "launch_server.py"
ARGUMENTS = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-overlap-schedule": None,
    "sleep-on-idle": None,
    "mem-fraction-static": 0.3,
    "max-total-tokens": 8192,
    "context-length": 256,
    "tool-call-parser": "qwen25",
    "reasoning-parser": "qwen3",
}
"""What a server on a CPU is started with, as `sglang_args` of a launch file has it."""

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


class SGLangServer:
    """SGLang on the same port after every start.

    Args:
        model_dir (`Path`):
            The checkpoint.
        log_path (`Path`):
            Where the newest process writes.
    """

    def __init__(self, model_dir: Path, log_path: Path):
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self.model_dir = model_dir
        self.log_path = log_path
        self.process: subprocess.Popen[bytes] | None = None
        self.command = [str(SGLANG_PYTHON), str(SHIMS), "--model-path", str(model_dir)]
        self.command += ["--host", HOST, "--port", str(port)]
        for name, value in ARGUMENTS.items():
            self.command += [f"--{name}"] if value is None else [f"--{name}", str(value)]

    def start(self) -> None:
        """Return when it is healthy."""
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
        wait_until_healthy(self.url, self.process, self.log_path)

    def kill(self) -> None:
        """End all of its processes at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def write_interpreter(path: Path) -> Path:
    """Write what can stand as `sglang_python` in a launch file: the Python with SGLang, which starts it with the shims."""
    path.write_text(
        f"""#!/bin/sh
if [ "$1" = -m ] && [ "$2" = sglang.launch_server ]; then shift 2; set -- "{SHIMS}" "$@"; fi
exec "{SGLANG_PYTHON}" "$@"
"""
    )
    path.chmod(0o755)
    return path
