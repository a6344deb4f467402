"""The servers of a launch: those that it starts, and those that run already."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import requests

from ...checks.machine import port_obstacle
from ...errors import PreflightError
from ...network import proxies_for
from .command_lines import HOST
from .output import LaunchOutput
from .processes import ManagedProcess, ProcessGroup, failure_of, free_port


MAX_PORT_ATTEMPTS = 3
POLL_S = 0.2
PROBE_TIMEOUT_S = 2.0


class Service:
    """A server of the launch: started on a free port, and on another one if that port was taken meanwhile.

    `health_path`, such as `"/health"`, answers once the server is ready; `build_command` makes its command line for a
    port. A `port` other than 0 is the only one that it may have; the launch file tells it as `port_key`, by default that
    of the name.

    Raises:
        PreflightError: `port` is taken.
    """

    def __init__(
        self,
        name: str,
        health_path: str,
        build_command: Callable[[int], list[str]],
        log_path: Path,
        env: Mapping[str, str],
        group: ProcessGroup,
        output: LaunchOutput,
        port: int = 0,
        port_key: str | None = None,
    ):
        self.name = name
        self.health_path = health_path
        self._build_command = build_command
        self._log_path = log_path
        self._env = env
        self._group = group
        self._output = output
        self._told_port = port
        self._num_attempts = 0
        if port:
            check_port(port_key or f"{name}_port", port)
        self._start_anywhere()

    def _start_anywhere(self) -> None:
        self._num_attempts += 1
        self._port = self._told_port or free_port()
        self.url = f"http://{HOST}:{self._port}"
        self.start_again()

    def start_again(self) -> None:
        """Start it at its address, where the others look for it."""
        self.process = ManagedProcess(self.name, self._build_command(self._port), self._log_path, self._env)
        self._group.add(self.process)
        self._output.follow(self.name, self._log_path)

    def is_ready(self) -> bool:
        """Return whether the server answers, at its first start. One that lost the race for its port is started again.

        Raises:
            ProcessFailedError: It ended for another reason, or lost `MAX_PORT_ATTEMPTS` ports.
        """
        if self.process.poll() is not None:
            lost_port = "address already in use" in self.process.log_tail().lower()
            if self._told_port or not lost_port or self._num_attempts >= MAX_PORT_ATTEMPTS:
                raise failure_of(self.process, still_running=[name for name in self._group.names if name != self.name])
            self._group.discard(self.process)
            self._start_anywhere()
            return False
        return self.answers()

    def answers(self) -> bool:
        """Return whether the server answers."""
        return answers(self.url + self.health_path)

    def state(self) -> str:
        """Return what a slow start is busy with: the newest line of the log."""
        return f"The last line of its log: {self.process.log_tail(1)}"


class ExternalService:
    """A server that runs already. The launch asks it, and neither starts nor ends it."""

    def __init__(self, name: str, url: str, health_path: str):
        self.name = name
        self.url = url.rstrip("/")
        self.health_path = health_path

    def is_ready(self) -> bool:
        """Return whether the server answers."""
        return self.answers()

    def answers(self) -> bool:
        """Return whether the server answers."""
        return answers(self.url + self.health_path)

    def state(self) -> str:
        """Return what is known of it."""
        return f"{self.url} is external: the launch does not start it, and {self.health_path} does not answer there."


AnyService = Service | ExternalService


class Environment:
    """An environment of the launch. It serves nobody, so that nothing tells whether it is ready.

    `start(name)` starts its process.
    """

    def __init__(self, name: str, start: Callable[[str], ManagedProcess]):
        self.name = name
        self._start = start
        self.start_again()

    def start_again(self) -> None:
        """Start it as it was started before."""
        self.process = self._start(self.name)

    def answers(self) -> bool:
        """Return True: it is there when its process is."""
        return True


def answers(url: str) -> bool:
    """Return whether a GET of this address succeeds."""
    try:
        return requests.get(url, timeout=PROBE_TIMEOUT_S, proxies=proxies_for(url)).ok
    except (requests.ConnectionError, requests.Timeout):
        return False


def check_port(key: str, port: int) -> None:
    """Refuse a loopback port, the value of a key of the launch file, that somebody listens on.

    Raises:
        PreflightError: It is taken, or this user may not have it.
    """
    obstacle = port_obstacle(port)
    if obstacle is not None:
        raise PreflightError(
            f"Port {port} of {HOST}, the `{key}`, cannot be taken: {obstacle}.",
            "Another program listens there, perhaps a server of an earlier run.",
            f"`ss -ltnp 'sport = :{port}'` names it; or set `{key}` to another port, or to 0 for a free one.",
        )


def wait_until_ready(
    services: Sequence[AnyService], timeout_s: float, group: ProcessGroup, output: LaunchOutput
) -> None:
    """Wait for all services.

    Raises:
        PreflightError: One is not ready in time.
        ProcessFailedError: One ended.
    """
    for service in services:
        is_external = isinstance(service, ExternalService)
        output.say(service.name, f"external, at {service.url}" if is_external else "starting")
    waiting = list(services)
    deadline = time.monotonic() + timeout_s
    while waiting:
        names = [service.name for service in waiting]
        output.wait_for("launch", f"waiting for {', '.join(names)}", names)
        while not (ready := [service for service in waiting if service.is_ready()]):
            if time.monotonic() >= deadline:
                raise PreflightError(
                    f"`{waiting[0].name}` was not ready after {timeout_s:.0f} s.",
                    waiting[0].state(),
                    "Raise `startup_timeout_s` in the launch file if it was still loading the model.",
                )
            time.sleep(POLL_S)
        for service in ready:
            output.say(service.name, f"ready at {service.url}")
            waiting.remove(service)
    group.check()
