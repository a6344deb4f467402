"""`trl-atropos api` as the protocol tests use it: the application in a thread, or the command as a process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

import trl_atropos
from trl_atropos.api.app import TrajectoryApp
from trl_atropos.api.options import ApiOptions


ROOT = Path(trl_atropos.__file__).parent.parent


@contextmanager
def served(options: ApiOptions) -> Iterator[tuple[str, TrajectoryApp]]:
    """The application in a thread: its root URL, and itself."""
    app = TrajectoryApp(options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "uvicorn did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
    assert not thread.is_alive()


class ApiProcess:
    """`trl-atropos api` as a process of its own, on a port that stays the same over restarts."""

    def __init__(self, directory: Path, *arguments: str, port: int = 0):
        self.log = directory / "api.log"
        self.arguments = ["--db", str(directory / "api.db"), *arguments]
        self.process = self._start(port)
        self.port = self._announced_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def _start(self, port: int) -> subprocess.Popen[bytes]:
        self.log.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "trl_atropos.cli.main", "api", "--port", str(port), *self.arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def _announced_port(self) -> int:
        deadline = time.monotonic() + 30
        while not (found := re.search(r"Trajectory API on http://127\.0\.0\.1:(\d+)", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        return int(found[1])

    def restart(self) -> None:
        """Start it again on the same port, after it has ended."""
        self.process = self._start(self.port)
        assert self._announced_port() == self.port

    def end(self) -> int:
        """End it as a launcher does, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=15)
