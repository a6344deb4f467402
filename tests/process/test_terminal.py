"""A run on a terminal, ended by Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path


def test_ctrl_c_gives_the_terminal_back(tmp_path):
    script = (
        "import time, pathlib, watched_runs, trl_atropos\n"
        "from transformers import TrainerCallback\n"
        "trl_atropos.AtroposTrainer.training_step = lambda self, *args, **kwargs: time.sleep(600)\n"
        "watched_runs.trained(pathlib.Path('.'), report_to='none')\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(terminal)
    try:
        output = read_until(main, "forward and backward passes")
        process.send_signal(signal.SIGINT)
        output += read_until(main, "KeyboardInterrupt")
        assert process.wait(60) != 0
        output += read_until(main, None)
    finally:
        process.kill()
        process.wait()
        os.close(main)
    # The cursor was hidden for the panel, and is shown at the end.
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")


def read_until(terminal: int, text: str | None, timeout_s: float = 120.0) -> str:
    """What a terminal shows until a text, or until nobody writes any more."""
    output, deadline = "", time.monotonic() + timeout_s
    while (text is None or text not in output) and time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            if text is None:
                break
            continue
        try:
            chunk = os.read(terminal, 65536)
        except OSError:
            break
        if not chunk:
            break
        output += chunk.decode(errors="replace")
    assert text is None or text in output, output
    return output
