"""The processes of `trl-atropos api`: one that listens, and one that answers and is started again when it is killed.

An environment gives up when its API refuses connections for some two seconds. So the socket is held by a process that does
nothing else: while the server is started again, connections wait in it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn

from ..errors import PreflightError
from ..network import listening_socket
from .app import TrajectoryApp
from .options import ApiOptions


logger = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that may wait while the server is started again."""

SWITCH_INTERVAL_S = 0.001
"""How long a thread that reads a post may keep the interpreter from answering `/status`."""

LONG_LIFE_S = 1.0
"""A server that ran for so long was well: the next one is started at once."""

MAX_PAUSE_S = 0.3
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG = 1


class JsonLines(logging.Formatter):
    """Log records as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        values: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values)


def configure_logging(is_json: bool) -> None:
    """Log to standard error, for people or, with `is_json`, for programs."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if is_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def listen(options: ApiOptions) -> socket.socket:
    """Open the socket.

    Raises:
        PreflightError: The address cannot be had.
    """
    try:
        return listening_socket(options.host, options.port, backlog=BACKLOG)
    except OSError as exc:
        raise PreflightError(
            f"The API cannot listen on {options.host}:{options.port}: {exc}.",
            "Another program has the port, or this machine has no such address.",
            "Name another with `--port` or `--host`; port 0 is any free one.",
        ) from exc


def serve(options: ApiOptions, listener: socket.socket) -> None:
    """Answer requests on this socket until SIGTERM or SIGINT.

    Raises:
        ApiDatabaseError: The database cannot be used.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    app = TrajectoryApp(options)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listener])


def supervise(options: ApiOptions, listener: socket.socket) -> int:
    """Keep a server running on this socket; return its exit code when it ends by itself, 0 after a signal to this process.

    Returns in the process of the server, too, and raises what `serve` raises there. A server that another signal ends, such as SIGKILL for lack of memory, is followed by another one at once, and after a
    pause if it did not live for long.
    """
    parent = os.getpid()
    stop_requests: list[int] = []
    child = 0

    def stop(number: int, _frame: FrameType | None) -> None:
        stop_requests.append(number)
        if child:
            os.kill(child, signal.SIGTERM)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    pause_s = 0.0
    while True:
        start = time.monotonic()
        # A signal of this moment waits until it is clear whose it is: a child that has not yet a way of its own to take it
        # would note it and go on.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        child = os.fork()
        if child == 0:
            _become_child(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if child == 0:
            serve(options, listener)
            return 0
        if stop_requests:
            os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code >= 0 or stop_requests:
            return 0 if stop_requests else code
        lived_s = time.monotonic() - start
        pause_s = 0.0 if lived_s >= LONG_LIFE_S else min(max(2 * pause_s, 0.05), MAX_PAUSE_S)
        logger.error("event=server_killed signal=%d lived_s=%.1f pause_s=%.2f", -code, lived_s, pause_s)
        time.sleep(pause_s)


def _become_child(parent: int) -> None:
    """Take signals as any process does, and end with the parent: nobody else would end this process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            # It ended before that.
            os.kill(os.getpid(), signal.SIGTERM)
