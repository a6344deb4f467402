"""Parts of a launch that end: started again within bounds, or forgotten, or the end of the run. Small commands, real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import requests

from trl_atropos.cli.launch import restarts
from trl_atropos.cli.launch.output import LaunchOutput
from trl_atropos.cli.launch.processes import ManagedProcess, ProcessFailedError, ProcessGroup
from trl_atropos.cli.launch.restarts import RestartLimit, Supervisor
from trl_atropos.cli.launch.services import Environment, Service, wait_until_ready
from trl_atropos.errors import PreflightError


SLEEP = [sys.executable, "-c", "import time; print('alive', flush=True); time.sleep(300)"]
DEADLINE_S = 30.0


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.01)


class Parts:
    """A group of processes and who looks after them, in a directory of the test."""

    def __init__(self, directory: Path, group: ProcessGroup, output: LaunchOutput, max_restarts: int):
        self.directory = directory
        self.group = group
        self.output = output
        self.supervisor = Supervisor(RestartLimit(max_restarts, 600.0), 30.0, group, output)

    def start(self, name: str, command: Sequence[str]) -> ManagedProcess:
        process = ManagedProcess(name, command, self.directory / f"{name}.log")
        self.group.add(process)
        self.output.follow(name, process.log_path)
        return process

    def environment(
        self, name: str, command: Sequence[str], on_exit: str, needs: Sequence[Service] = ()
    ) -> Environment:
        started = Environment(name, lambda name: self.start(name, command))
        self.supervisor.add(started, on_exit, needs, is_environment=True)
        return started

    def service(self, command: Callable[[int], list[str]], on_exit: str = "restart") -> Service:
        service = Service("api", "/", command, self.directory / "api.log", {}, self.group, self.output)
        wait_until_ready([service], DEADLINE_S, self.group, self.output)
        self.supervisor.add(service, on_exit)
        return service

    def check_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert not self.supervisor.check("trainer")
            assert time.monotonic() < deadline, "the condition did not become true in time"
            time.sleep(0.02)

    def check_until_said(self, text: str) -> None:
        combined = self.directory / "combined.log"
        self.check_until(lambda: text in combined.read_text())


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with LaunchOutput(tmp_path / "combined.log") as output, ProcessGroup() as group:
        yield Parts(tmp_path, group, output, max_restarts=2)


def http_server(port: int) -> list[str]:
    return [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]


def kill_child_of(process: ManagedProcess) -> None:
    """Kill the process behind a guard, as somebody would who runs out of memory."""
    deadline = time.monotonic() + DEADLINE_S
    while not (children := psutil.Process(process._guard.pid).children()):
        assert time.monotonic() < deadline, "the guard started nothing"
        time.sleep(0.02)
    os.kill(children[0].pid, signal.SIGKILL)


def test_pauses_double_and_restarts_within_the_window_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 1.0)
    limit = RestartLimit(max_restarts=3, window_s=100.0)
    assert limit.pause_s([], now=0.0) == 1.0
    assert limit.pause_s([0.0], now=10.0) == 2.0
    assert limit.pause_s([0.0, 10.0], now=20.0) == 4.0
    assert limit.pause_s([0.0, 10.0, 20.0], now=30.0) is None
    # The end at 0 is forgotten at 100.
    assert limit.pause_s([0.0, 10.0, 20.0], now=100.0) == 4.0
    assert RestartLimit(max_restarts=99, window_s=100.0).pause_s([0.0] * 50, now=1.0) == restarts.MAX_PAUSE_S


def test_a_killed_environment_is_started_again_said_and_counted_and_its_log_goes_on(parts: Parts) -> None:
    environment = parts.environment("env", SLEEP, "restart")
    first = environment.process
    parts.check_until(lambda: "alive" in first.log_tail())
    kill_child_of(first)
    parts.check_until(lambda: environment.process is not first and "alive" in environment.process.log_tail())
    parts.check_until_said("env      | is there again")
    assert parts.supervisor.num_restarts == {"env": 1}
    assert environment.process.log_path.read_text() == "alive\n\n=== started again ===\nalive\n"
    # 128 + 9; the pause of the first restart.
    parts.check_until_said(
        "ended with exit code 137 and is started again in 0.01 s (restart 1; at most 2 times within 600 s). The last line of "
        "its log: alive"
    )
    assert parts.group.names == ["env"]


def test_a_part_that_ends_again_and_again_ends_the_run_with_its_last_log(parts: Parts) -> None:
    environment = parts.environment("env", [sys.executable, "-c", "raise SystemExit('no such task')"], "restart")
    steady = parts.start("trainer", SLEEP)
    with pytest.raises(ProcessFailedError) as caught:
        parts.check_until(lambda: False)
    message = str(caught.value)
    assert "`env` ended with exit code 1 while the run needed it" in message
    assert (
        "It was started again 2 times within 600 s (`max_restarts`). The last lines of its log:\nno such task"
        in message
    )
    assert "The launch has ended trainer;" in message
    assert parts.supervisor.num_restarts == {"env": 2}
    assert environment.process.log_path.read_text().count("no such task") == 3
    assert steady.poll() is None


def test_a_command_that_does_not_exist_is_not_tried_again(parts: Parts) -> None:
    parts.environment("env", ["no-such-program"], "restart")
    with pytest.raises(ProcessFailedError, match=r"exit code 127(.|\n)*cannot start no-such-program"):
        parts.check_until(lambda: False)
    assert parts.supervisor.num_restarts == {}


def test_a_killed_server_is_started_again_at_its_address_and_those_that_need_it_wait_for_it(parts: Parts) -> None:
    started = []

    def command(port: int) -> list[str]:
        started.append(port)
        return http_server(port)

    service = parts.service(command)
    environment = parts.environment("env", SLEEP, "restart", needs=[service])
    first, first_environment = service.process, environment.process
    parts.check_until(lambda: "alive" in first_environment.log_tail())
    # Both at once: the environment comes back when the server answers.
    kill_child_of(first)
    kill_child_of(first_environment)
    parts.check_until(lambda: environment.process is not first_environment)
    assert requests.get(service.url, timeout=10).ok
    parts.check_until(lambda: not parts.supervisor.awaits(service))
    assert len(started) == 2 and len(set(started)) == 1
    assert parts.supervisor.num_restarts == {"api": 1, "env": 1}
    # In the order of their first start: when both are gone, the server is the cause.
    assert parts.group.names == ["api", "env"]


def test_a_server_that_does_not_answer_after_a_restart_ends_the_run(parts: Parts) -> None:
    commands = iter([http_server, lambda _: SLEEP])
    parts.supervisor = Supervisor(RestartLimit(2, 600.0), 0.2, parts.group, parts.output)
    service = parts.service(lambda port: next(commands)(port))
    kill_child_of(service.process)
    with pytest.raises(PreflightError, match="`api` was started again, and did not answer within 0 s"):
        parts.check_until(lambda: False)


def test_the_run_goes_on_without_what_may_end_while_an_environment_is_left(parts: Parts) -> None:
    service = parts.service(http_server, on_exit="continue")
    first = parts.environment("first", SLEEP, "continue")
    second = parts.environment("second", SLEEP, "continue")
    kill_child_of(service.process)
    kill_child_of(first.process)
    parts.check_until(lambda: parts.group.names == ["second"])
    parts.check_until_said("first    | ended with exit code 137; the run goes on with second.")
    parts.check_until_said("api      | ended with exit code 137; the run goes on without it.")
    assert not parts.supervisor.awaits(service) and parts.supervisor.num_restarts == {}
    kill_child_of(second.process)
    with pytest.raises(ProcessFailedError, match="`second` ended with exit code 137"):
        parts.check_until(lambda: False)


def test_a_part_without_which_the_run_stops_is_named_although_others_would_be_started_again(parts: Parts) -> None:
    service = parts.service(http_server, on_exit="stop")
    parts.environment("env", SLEEP, "restart", needs=[service])
    kill_child_of(service.process)
    with pytest.raises(ProcessFailedError, match="`api` ended with exit code 137"):
        parts.check_until(lambda: False)


def test_the_trainer_may_end_while_another_part_is_away(parts: Parts) -> None:
    environment = parts.environment("env", SLEEP, "restart", needs=[])
    parts.check_until(lambda: "alive" in environment.process.log_tail())
    trainer = parts.start("trainer", [sys.executable, "-c", ""])
    kill_child_of(environment.process)
    deadline = time.monotonic() + DEADLINE_S
    while trainer.poll() is None or environment.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert parts.supervisor.check("trainer")
