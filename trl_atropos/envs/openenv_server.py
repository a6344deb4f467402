"""Serves an application of OpenEnv until the pipe of its standard input is closed, as it is when the process that started it ends
in any way. A script: it runs in the interpreter of the environment, which need not have trl_atropos.

Usage: python openenv_server.py MODULE:APPLICATION

Writes the port in one line. What the environment prints goes to standard error.
"""

from __future__ import annotations

import os
import sys
import threading

import uvicorn


def _end_with_the_starter() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    # What the environment prints, also while it is imported, is not the port.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    # Its own directory is that of this file, whose modules have the names of packages that environments import.
    sys.path[0] = os.getcwd()
    config = uvicorn.Config(sys.argv[1], host="127.0.0.1", port=0, log_level="warning")
    config.load()
    bound = config.bind_socket()
    # From here on a request waits until the application answers.
    bound.listen()
    with answer:
        answer.write(f"{bound.getsockname()[1]}\n")
    uvicorn.Server(config).run([bound])
