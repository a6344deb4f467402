"""Processes of a launch end together and leave nothing behind. Everything here is a real process."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil
import pytest

from trl_atropos.cli.launch.output import LaunchOutput
from trl_atropos.cli.launch.processes import (
    EPHEMERAL_PORTS,
    ManagedProcess,
    ProcessFailedError,
    ProcessGroup,
    free_port,
)
from trl_atropos.cli.launch.services import ExternalService, Service, check_port, wait_until_ready
from trl_atropos.errors import PreflightError


ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]

# Writes its own process id and those of two children: a plain one, and one in a session of its own, which is how a
# daemon escapes from its parent's process group.
FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
pids = [os.getpid(), subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
with open(sys.argv[1] + ".part", "w") as file:
    file.write(" ".join(map(str, pids)))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(300)
"""

# A launcher: starts two families and waits for them like `run_launch` does.
LAUNCHER = """
import sys, time
from pathlib import Path
from trl_atropos.cli.launch.processes import ManagedProcess, ProcessGroup
directory = Path(sys.argv[1])
with ProcessGroup() as group:
    for name in ("first", "second"):
        command = [sys.executable, "-c", sys.argv[2], str(directory / f"{name}.pids")]
        group.add(ManagedProcess(name, command, directory / f"{name}.log"))
    while not group.check():
        time.sleep(0.05)
"""


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def read_pids(path: Path) -> list[int]:
    wait_for(path.exists)
    return [int(pid) for pid in path.read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_ended(group: ProcessGroup) -> None:
    while not group.check():
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [
        (signal.SIGINT, -signal.SIGINT),  # Python re-raises an unhandled KeyboardInterrupt as the signal itself
        (signal.SIGKILL, -signal.SIGKILL),  # no handler, no `finally`: only the guards can notice
    ],
)
def test_launcher_ended_by_signal_leaves_no_process(tmp_path: Path, number: signal.Signals, exit_code: int) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), FAMILY], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    pids = read_pids(tmp_path / "first.pids") + read_pids(tmp_path / "second.pids")
    guards = [child.pid for child in psutil.Process(launcher.pid).children()]
    assert len(pids) == 6 and len(guards) == 2 and not any(map(is_gone, pids + guards))

    launcher.send_signal(number)

    assert launcher.wait(timeout=15) == exit_code
    wait_for(lambda: all(map(is_gone, pids + guards)))


def test_crash_ends_the_others_and_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    crash = "import sys, time; time.sleep(0.3); [print(f'line {i}.') for i in range(1, 41)]; sys.exit(3)"
    with pytest.raises(ProcessFailedError) as caught, ProcessGroup() as group:
        group.add(ManagedProcess("steady", [sys.executable, "-c", FAMILY, str(tmp_path / "pids")], tmp_path / "s.log"))
        pids = read_pids(tmp_path / "pids")
        group.add(ManagedProcess("crasher", [sys.executable, "-c", crash], tmp_path / "crasher.log"))
        wait_until_ended(group)

    message = str(caught.value)
    assert "`crasher` ended with exit code 3" in message
    assert "The launch has ended steady;" in message
    assert str(tmp_path / "crasher.log") in message
    # 40 lines were printed and the last 30 are shown: 11 to 40.
    assert "line 11." in message and "line 40." in message and "line 10." not in message
    assert all(map(is_gone, pids))


def test_process_killed_by_a_signal_is_reported_as_128_plus_n(tmp_path: Path) -> None:
    kill_self = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    with pytest.raises(ProcessFailedError, match="exit code 139"), ProcessGroup() as group:  # 128 + 11
        group.add(ManagedProcess("vllm", [sys.executable, "-c", kill_self], tmp_path / "vllm.log"))
        wait_until_ended(group)


def test_killed_guard_does_not_leave_its_process_behind(tmp_path: Path) -> None:
    # multiprocessing keeps a helper of its own once another test has used it.
    before = set(psutil.Process().children())
    with pytest.raises(ProcessFailedError, match="exit code 137"), ProcessGroup() as group:  # 128 + 9
        group.add(ManagedProcess("env", [sys.executable, "-c", FAMILY, str(tmp_path / "pids")], tmp_path / "env.log"))
        own, plain_child, _ = read_pids(tmp_path / "pids")
        (guard,) = set(psutil.Process().children()) - before
        guard.kill()
        wait_until_ended(group)
    wait_for(lambda: is_gone(own) and is_gone(plain_child))


def test_environment_that_exits_with_0_before_the_trainer_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailedError, match="`env` ended with exit code 0"), ProcessGroup() as group:
        group.add(ManagedProcess("env", [sys.executable, "-c", ""], tmp_path / "env.log"))
        group.add(ManagedProcess("trainer", SLEEP, tmp_path / "trainer.log"))
        while not group.check(may_finish="trainer"):
            time.sleep(0.02)


def test_trainer_that_exits_with_0_ends_the_wait_without_an_error(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with ProcessGroup() as group:
        group.add(ManagedProcess("env", SLEEP, tmp_path / "env.log"))
        group.add(
            ManagedProcess("trainer", [sys.executable, "-c", "import time; time.sleep(0.3)"], tmp_path / "t.log")
        )
        while not group.check(may_finish="trainer"):
            time.sleep(0.02)
        assert set(psutil.Process().children(recursive=True)) - before, "the environment still runs inside the context"
    assert not set(psutil.Process().children(recursive=True)) - before


def test_unknown_program_is_reported_like_a_crash(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailedError, match="cannot start no-such-program"), ProcessGroup() as group:
        group.add(ManagedProcess("env", ["no-such-program"], tmp_path / "env.log"))
        wait_until_ended(group)


def test_process_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(300)"
    parent = f"""
import subprocess, sys
from trl_atropos.cli.launch.guard import end_descendants
child = subprocess.Popen([sys.executable, "-c", {stubborn!r}], stdout=subprocess.PIPE)
child.stdout.readline()
end_descendants(grace_s=0.2)
print(child.wait())
"""
    result = subprocess.run(
        [sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, timeout=10, start_new_session=True
    )
    assert result.stdout.strip() == str(-signal.SIGKILL), result.stderr


def test_shared_memory_of_a_killed_process_is_removed() -> None:
    # The process neither ends on SIGTERM nor removes its segment: Python's resource tracker does, after its death.
    holder = """
import signal, time
from multiprocessing.shared_memory import SharedMemory
segment = SharedMemory(create=True, size=16)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(segment.name, flush=True)
time.sleep(300)
"""
    parent = f"""
import subprocess, sys
from trl_atropos.cli.launch.guard import end_descendants
child = subprocess.Popen([sys.executable, "-c", {holder!r}], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), flush=True)
end_descendants(grace_s=0.2)
"""
    result = subprocess.run(
        [sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, timeout=10, start_new_session=True
    )
    assert result.returncode == 0, result.stderr
    with pytest.raises(FileNotFoundError):
        SharedMemory(result.stdout.strip())


# Binds a socket as vLLM's processes do, writes where it is, and is killed.
KILLED_AT_A_SOCKET = """
import os, signal, socket, sys, uuid
directory = os.environ.get("VLLM_RPC_BASE_PATH", "")
if directory:
    socket.socket(socket.AF_UNIX).bind(f"{directory}/{uuid.uuid4()}")
with open(sys.argv[1], "w") as file:
    file.write(directory)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("length", [18, 49, 50])
def test_sockets_of_a_killed_server_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    # The address of a socket has at most 107 bytes: those of the temporary directory, 21 of the guard's in it ("/trl_atropos-" and
    # eight letters), 37 of a slash and a UUID.
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    with tempfile.TemporaryDirectory() as short:
        parent = Path(short) / ("x" * (length - 1 - len(short)))
        parent.mkdir()
        monkeypatch.setenv("TMPDIR", str(parent))
        process = ManagedProcess(
            "server", [sys.executable, "-c", KILLED_AT_A_SOCKET, str(tmp_path / "said")], tmp_path / "server.log"
        )
        wait_for(lambda: process.poll() == 137)
        process.wait_stopped()
        said = (tmp_path / "said").read_text()
        assert (Path(said).parent == parent) if length < 50 else said == "", (said, parent)
        assert list(parent.iterdir()) == []


def test_a_directory_for_sockets_that_somebody_named_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as named:
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", named)
        process = ManagedProcess(
            "server", [sys.executable, "-c", KILLED_AT_A_SOCKET, str(tmp_path / "said")], tmp_path / "server.log"
        )
        wait_for(lambda: process.poll() == 137)
        process.wait_stopped()
        assert (tmp_path / "said").read_text() == named
        assert len(list(Path(named).iterdir())) == 1


def test_standard_output_is_passed_on_and_logged_and_standard_error_only_logged(tmp_path: Path) -> None:
    # One write: unbuffered, `print` writes a line and its end apart, and the two streams meet in the file.
    code = "import sys; print('step 1'); sys.stderr.write('a warning\\n'); print('step 2')"
    lines: list[str] = []
    process = ManagedProcess("trainer", [sys.executable, "-c", code], tmp_path / "trainer.log", on_output=lines.append)
    wait_for(lambda: process.poll() is not None)
    process.wait_stopped()
    assert process.poll() == 0
    assert lines == ["step 1", "step 2"]
    assert sorted(process.log_tail().splitlines()) == ["a warning", "step 1", "step 2"]


def test_log_of_an_earlier_process_is_kept_and_not_quoted_for_a_later_one(tmp_path: Path) -> None:
    for number in (1, 2):
        code = f"print('life {number}')"
        process = ManagedProcess("env", [sys.executable, "-c", code], tmp_path / "env.log")
        wait_for(lambda: process.poll() is not None)  # noqa: B023
        process.wait_stopped()
        assert process.log_tail() == f"life {number}"
    assert process.log_path.read_text() == "life 1\n\n=== started again ===\nlife 2\n"


def test_end_of_a_huge_log_is_read_without_the_rest(tmp_path: Path) -> None:
    process = ManagedProcess("env", [sys.executable, "-c", ""], tmp_path / "env.log")
    process.wait_stopped()
    process.log_path.write_text("x" * 10_000_000 + "\n" + "the cause\n" * 2)
    # Only 64 KiB of the long line are in what was read.
    assert len(process.log_tail()) < 100_000
    assert process.log_tail(2) == "the cause\nthe cause"


def test_environment_variables_are_added_to_those_of_the_launcher(tmp_path: Path) -> None:
    code = "import os; print(os.environ['ADDED'], os.environ['PATH'] != '')"
    process = ManagedProcess("api", [sys.executable, "-c", code], tmp_path / "api.log", env={"ADDED": "yes"})
    wait_for(lambda: process.poll() is not None)
    process.wait_stopped()
    assert process.log_tail() == "yes True"


def test_free_port_can_be_bound_and_is_none_that_a_connection_may_take() -> None:
    first, last = map(int, EPHEMERAL_PORTS.read_text().split())
    ports = {free_port() for _ in range(20)}
    assert len(ports) > 10
    assert not any(first <= port <= last for port in ports)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", ports.pop()))


def test_where_connections_may_take_any_port_it_is_one_that_the_system_names(monkeypatch, tmp_path) -> None:
    path = tmp_path / "range"
    path.write_text("1024\t65535\n")
    monkeypatch.setattr("trl_atropos.cli.launch.processes.EPHEMERAL_PORTS", path)
    assert free_port() > 0


class HttpServers:
    """Builds the command of a real HTTP server, on `taken_port` for the first `num_lost` attempts."""

    def __init__(self, taken_port: int, num_lost: int):
        self.taken_port = taken_port
        self.num_lost = num_lost
        self.num_attempts = 0

    def __call__(self, port: int) -> list[str]:
        self.num_attempts += 1
        used = self.taken_port if self.num_attempts <= self.num_lost else port
        return [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(used)]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.fixture
def output(tmp_path: Path) -> Iterator[LaunchOutput]:
    with LaunchOutput(tmp_path / "combined.log") as output:
        yield output


def test_service_that_loses_its_port_is_started_on_another(
    tmp_path: Path, taken_port: int, output: LaunchOutput
) -> None:
    commands = HttpServers(taken_port, num_lost=2)
    with ProcessGroup() as group:
        service = Service("api", "/", commands, tmp_path / "api.log", {}, group, output)
        wait_for(service.is_ready)
        group.check()
    assert commands.num_attempts == 3


def test_service_that_loses_every_port_is_an_error(tmp_path: Path, taken_port: int, output: LaunchOutput) -> None:
    commands = HttpServers(taken_port, num_lost=99)
    with pytest.raises(ProcessFailedError, match="Address already in use"), ProcessGroup() as group:
        service = Service("api", "/", commands, tmp_path / "api.log", {}, group, output)
        # The taken port listens but never answers, so is_ready can only become true by mistake.
        service.url = f"http://127.0.0.1:{free_port()}"
        wait_for(service.is_ready)
    assert commands.num_attempts == 3


def test_service_is_started_on_the_port_that_was_told_and_on_no_other(
    tmp_path: Path, taken_port: int, output: LaunchOutput
) -> None:
    commands = HttpServers(taken_port, num_lost=0)
    with ProcessGroup() as group:
        with pytest.raises(PreflightError, match=f"Port {taken_port} of 127.0.0.1, the `api_port`, cannot be taken"):
            Service("api", "/", commands, tmp_path / "api.log", {}, group, output, port=taken_port)
        assert commands.num_attempts == 0 and group.names == []
        port = free_port()
        service = Service("api", "/", commands, tmp_path / "api.log", {}, group, output, port=port)
        wait_for(service.is_ready)
        assert service.url == f"http://127.0.0.1:{port}"
    check_port("api_port", port)


def test_external_service_that_is_away_is_not_called_a_slow_start(output: LaunchOutput) -> None:
    service = ExternalService("vllm", f"http://127.0.0.1:{free_port()}/", "/health")
    with ProcessGroup() as group, pytest.raises(PreflightError, match="external: the launch does not start it"):
        wait_until_ready([service], 0.5, group, output)


def test_service_that_crashes_while_starting_is_not_retried(tmp_path: Path, output: LaunchOutput) -> None:
    attempts: list[int] = []

    def build_command(port: int) -> list[str]:
        attempts.append(port)
        return [sys.executable, "-c", "raise SystemExit('no such model')"]

    with pytest.raises(ProcessFailedError, match="no such model"), ProcessGroup() as group:
        wait_for(Service("vllm", "/health", build_command, tmp_path / "vllm.log", {}, group, output).is_ready)
    assert len(attempts) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_a_real_launch_ends_its_servers_and_exits_with_128_plus_n(
    tmp_path: Path, number: signal.Signals
) -> None:
    config = tmp_path / "launch.yaml"
    run_dir = tmp_path / "run"
    parts = "environments: {e: {command: e}}\ntrainer_command: t\n"
    config.write_text(f"model_name_or_path: {tmp_path}\nrun_dir: {run_dir}\n{parts}")
    command = [sys.executable, "-m", "trl_atropos.cli.main", "launch", "-c", str(config)]
    launcher = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Two guards, each with its server: the API and `trl vllm-serve`.
    wait_for(lambda: len(launcher.children(recursive=True)) >= 4)
    children = launcher.children(recursive=True)

    launcher.send_signal(number)

    assert launcher.wait(timeout=20) == 128 + number
    assert all(is_gone(child.pid) for child in children)
