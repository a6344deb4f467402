"""Starts Python programs as forks of a process that has imported torch, transformers, TRL, vLLM and trl_atropos.

A program that imports them takes a dozen seconds of a core until its first line; as a fork it takes a tenth of one. It is a process
of its own all the same, with its own arguments, environment, directory and files, and ends as Python ends. Only what is read
while these libraries are imported (`HF_ENDPOINT`, `HF_HOME`, `OMP_NUM_THREADS`) holds as it was when the server started.

    python fork_server.py PROGRAM...

runs a program so on behalf of a launcher that starts processes itself: signals go through to it, its status comes back.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn


ADDRESS = "TRL_ATROPOS_FORK_SERVER"
"""Environment variable with the socket of the server, which all processes of a test run share."""

PROGRAM = str(Path(__file__).resolve())
START_TIMEOUT_S = 240.0

PRELOADED = (
    "trl_atropos.trainer.atropos_trainer",
    "trl_atropos.serving.generate_endpoint",
    "trl_atropos.cli.main",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "mixtral", "qwen3")),
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "atroposlib.api.server",
    "atroposlib.envs.base",
    "accelerate.commands.launch",
    "torch.distributed.run",
    # Accelerate imports it with the first step.
    "deepspeed",
)

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
}

_LENGTH_BYTES = 4
_NUM_FDS = 3


def start() -> str:
    """Start the server of this test run, unless there is one, and return its address. It ends with this process."""
    if ADDRESS not in os.environ:
        directory = tempfile.mkdtemp(prefix="forks-")
        address = os.environ[ADDRESS] = str(Path(directory) / "socket")
        # Unbuffered, as programs that tests start have to be, so that what a killed one printed is not lost. It ends when the
        # other end of its standard input is closed.
        server = subprocess.Popen(
            [sys.executable, "-u", PROGRAM, "--serve", address],
            stdin=subprocess.PIPE,
            # No cache and no configuration of this user.
            env={**os.environ, **_ENVIRONMENT, "HF_HOME": directory},
        )

        def stop() -> None:
            assert server.stdin is not None
            server.stdin.close()
            server.wait()
            shutil.rmtree(directory, ignore_errors=True)

        atexit.register(stop)
    return os.environ[ADDRESS]


class ForkedProcess:
    """A program that the server runs; the methods are those of `subprocess.Popen`. It is killed if this object goes.

    Args:
        command (`Sequence[str]`):
            Of Python: `sys.executable` with a file or with `-m` and a module, or a script that pip installed.
        stdout, stderr (file or file descriptor, *optional*):
            `subprocess.STDOUT` and `subprocess.DEVNULL` mean what they mean there.
        env (`Mapping[str, str]`, *optional*):
            The whole environment; by default that of this process.
        cwd (`Path`, *optional*), start_new_session (`bool`, *optional*, defaults to `False`):
            As of `subprocess.Popen`.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        start_new_session: bool = False,
    ):
        self.args = [str(word) for word in command]
        self.returncode: int | None = None
        request = {
            "argv": _program_of(self.args),
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or os.getcwd()),
            "start_new_session": start_new_session,
        }
        self._connection = _connect(start())
        with open(os.devnull, "r+b") as nothing:
            out = _fileno(stdout, 1, nothing)
            err = out if stderr == subprocess.STDOUT else _fileno(stderr, 2, nothing)
            _send(self._connection, request, [nothing.fileno(), out, err])
        self.pid = _receive_number(self._connection)

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        try:
            return self.wait(timeout=0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(_receive_number(self._connection))
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def __del__(self) -> None:
        self._connection.close()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(command: Sequence[str | Path], *, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return what it printed. `options`: `env` and `cwd` of [`ForkedProcess`]."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = ForkedProcess(command, stdout=out, stderr=err, **options)
        try:
            process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode())
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, *printed)


def _program_of(command: Sequence[str]) -> list[str]:
    """A command without its interpreter: `["-m", MODULE, ...]` or `[FILE, ...]`."""
    words = list(command[1:] if command[0] == sys.executable else command)
    return words[1:] if words[0] == "-u" else words


def _fileno(file: IO[Any] | int | None, inherited: int, nothing: IO[bytes]) -> int:
    if file is None:
        return inherited
    if isinstance(file, int):
        return nothing.fileno() if file == subprocess.DEVNULL else file
    return file.fileno()


def _connect(address: str) -> socket.socket:
    """Connect to the server, which may still be importing."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            assert time.monotonic() < deadline and Path(address).parent.exists(), "the fork server did not start"
            time.sleep(0.05)


def _send(connection: socket.socket, request: dict[str, Any], files: list[int]) -> None:
    body = json.dumps(request).encode()
    socket.send_fds(connection, [len(body).to_bytes(_LENGTH_BYTES, "big")], files)
    connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, files, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, _NUM_FDS)
    return json.loads(_read(connection, int.from_bytes(head, "big"))), files


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        piece = connection.recv(num_bytes - len(data))
        if not piece:
            raise ConnectionError("the fork server has ended")
        data += piece
    return data


def _send_number(connection: socket.socket, number: int) -> None:
    connection.sendall(number.to_bytes(_LENGTH_BYTES, "big"))


def _receive_number(connection: socket.socket) -> int:
    return int.from_bytes(_read(connection, _LENGTH_BYTES), "big")


class Server:
    """Forks a program for each connection, and answers it with the process id and, later, the status of its end."""

    def __init__(self, address: str):
        # A fork has this thread alone, and hangs where another one held a lock.
        # jemalloc's alone, that of pyarrow, knows of forks.
        threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
        assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, f"an import started one of {threads}"
        self.children: dict[int, socket.socket] = {}
        self.leaders: set[int] = set()
        self.woken, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        self.handlers = {
            signal.SIGCHLD: signal.signal(signal.SIGCHLD, lambda number, frame: None),
            # From the terminal; it is for the tests.
            signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        }
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.selector = selectors.DefaultSelector()
        for file in (self.listener, self.woken, sys.stdin):
            self.selector.register(file, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any]:
        """Serve until the tests end; returns in a child, with what it is to run."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    self.end()
                elif key.fileobj is self.woken:
                    self.woken.recv(4096)
                    self.reap()
                elif key.fileobj is self.listener:
                    request = self.fork(self.listener.accept()[0])
                    if request is not None:
                        return request
                else:
                    # Whoever had it started is gone.
                    self.selector.unregister(key.fileobj)
                    self.kill(key.data)

    def fork(self, connection: socket.socket) -> dict[str, Any] | None:
        """Fork a child, and return its request there."""
        request, files = _receive(connection)
        pid = os.fork()
        if pid == 0:
            self.leave(connection)
            for target, file in enumerate(files):
                os.dup2(file, target)
                os.close(file)
            if request["start_new_session"]:
                os.setsid()
            return request
        for file in files:
            os.close(file)
        self.children[pid] = connection
        if request["start_new_session"]:
            self.leaders.add(pid)
        self.selector.register(connection, selectors.EVENT_READ, pid)
        _send_number(connection, pid)
        return None

    def leave(self, connection: socket.socket) -> None:
        """Undo in a child what makes this process a server."""
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.selector.close()
        for opened in (self.listener, self.woken, self.waker, connection, *self.children.values()):
            opened.close()

    def reap(self) -> None:
        """Say of each child that has ended how it did."""
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self.children.pop(pid)
            self.leaders.discard(pid)
            with contextlib.suppress(KeyError):
                self.selector.unregister(connection)
            with contextlib.suppress(BrokenPipeError):
                _send_number(connection, status)
            connection.close()

    def kill(self, pid: int) -> None:
        """Kill a child, with its session if that is its own."""
        if pid in self.children:
            (os.killpg if pid in self.leaders else os.kill)(pid, signal.SIGKILL)

    def end(self) -> NoReturn:
        """End with all children."""
        for pid in self.children:
            self.kill(pid)
        os._exit(0)


def become(request: dict[str, Any]) -> NoReturn:
    """Run a program in this process and end, as Python does that is given the words of `argv`.

    What is not done at the end is to take all modules apart, which takes longer than most programs here.
    """
    status = 0
    try:
        _run(request)
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(request: dict[str, Any]) -> None:
    inherited = _searched_first()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    # Otherwise all children draw the same numbers.
    sys.modules["numpy"].random.seed()
    sys.argv = request["argv"]
    own = [entry for entry in sys.path if entry not in inherited]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        # Not twice: it runs as `__main__`.
        sys.modules.pop(sys.argv[0], None)
        sys.path[:] = [os.getcwd(), *_searched_first()[1:], *own]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = [str(Path(sys.argv[0]).resolve().parent), *_searched_first()[1:], *own]
        runpy.run_path(sys.argv[0], run_name="__main__")


def _searched_first() -> list[str]:
    """Where this program's imports are searched before those of the installation."""
    return [str(Path(PROGRAM).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def stand_in(command: list[str]) -> NoReturn:
    """Run a program as a fork and end as it ends; what a launcher starts in place of it."""
    process = ForkedProcess([sys.executable, *command], stdout=1, stderr=2)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: os.kill(process.pid, received))
    status = process.wait()
    if status < 0:
        with contextlib.suppress(OSError):
            # SIGKILL has no handler.
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def main() -> None:
    if sys.argv[1] != "--serve":
        stand_in(sys.argv[1:])
    for name in PRELOADED:
        importlib.import_module(name)
    # What is here for good is neither looked at by a child's garbage collector nor copied for it.
    gc.collect()
    gc.freeze()
    become(Server(sys.argv[2]).serve())


if __name__ == "__main__":
    main()
