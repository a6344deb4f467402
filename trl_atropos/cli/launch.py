"""`trl-atropos launch`: the Atropos API, the inference server, an environment and the trainer on one machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import requests
from rich.console import Console

from ..errors import PreflightError
from . import summary
from .launch_config import (
    HOST,
    LaunchConfig,
    build_api_command,
    build_env_command,
    build_trainer_command,
    build_vllm_command,
)
from .processes import ManagedProcess, ProcessGroup, failure_of, free_port


MAX_PORT_ATTEMPTS = 3
POLL_S = 0.2
PROGRESS_S = 5.0
PROBE_TIMEOUT_S = 2.0
COMPLETION_TIMEOUT_S = 120.0


class Service:
    """A server of the launch: started on a free port, and on another one if that port was taken meanwhile."""

    def __init__(
        self,
        name: str,
        health_path: str,
        build_command: Callable[[int], list[str]],
        log_path: Path,
        env: Mapping[str, str],
        group: ProcessGroup,
    ):
        self.name = name
        self.health_path = health_path
        self._build_command = build_command
        self._log_path = log_path
        self._env = env
        self._group = group
        self._num_attempts = 0
        self._start()

    def _start(self) -> None:
        self._num_attempts += 1
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self._process = ManagedProcess(self.name, self._build_command(port), self._log_path, self._env)
        self._group.add(self._process)

    def is_ready(self) -> bool:
        """Return whether the server answers. One that lost the race for its port is started again.

        Raises:
            ProcessFailedError: It ended for another reason, or lost `MAX_PORT_ATTEMPTS` ports.
        """
        if self._process.poll() is not None:
            lost_port = "address already in use" in self._process.log_tail().lower()
            if not lost_port or self._num_attempts >= MAX_PORT_ATTEMPTS:
                raise failure_of(self._process)
            self._group.discard(self._process)
            self._start()
            return False
        try:
            return requests.get(self.url + self.health_path, timeout=PROBE_TIMEOUT_S).ok
        except (requests.ConnectionError, requests.Timeout):
            return False

    def last_log_line(self) -> str:
        """Return the newest line of the log, to show what a slow start is busy with."""
        return self._process.log_tail(1)


class Checklist:
    """One line per thing that the launch does, with the seconds since its start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def elapsed_s(self) -> float:
        """Seconds since the launch began."""
        return time.monotonic() - self._start

    def say(self, name: str, message: str) -> None:
        """Print one line."""
        print(f"[{self.elapsed_s():6.1f} s] {name:<8} {message}", flush=True)


def run_launch(config: LaunchConfig) -> dict[str, Any]:
    """Start the four processes, wait for the trainer, end the others, write the summary.

    The logs of the processes, `summary.json`, `reward.png` and `completions.json` lie in `config.run_dir` afterwards, the
    model in its subdirectory `model`. However this function is left, no process of the launch is left behind.

    Args:
        config ([`LaunchConfig`]):
            What to run.

    Returns:
        `dict[str, Any]`: The content of `summary.json`.

    Raises:
        PreflightError: Another launch uses the directory, a server did not start in time, or the run left no log.
        ProcessFailedError: One of the processes ended before the trainer did, or the trainer failed.
    """
    checklist = Checklist()
    run_dir = Path(config.run_dir)
    with _own_run_dir(run_dir), ProcessGroup() as group:
        api, vllm = _start_servers(config, run_dir, group)
        _wait_until_ready([api, vllm], config.startup_timeout_s, group, checklist)
        before = _complete(vllm.url, config)
        trainer = _start_clients(config, run_dir, group, api.url, vllm.url, checklist)
        _wait_for_trainer(group, trainer, checklist)
        wall_s = checklist.elapsed_s()
        after = _complete(vllm.url, config)
        weight_version = _request("GET", f"{vllm.url}/weight_info")["weight_version"]
        checklist.say("launch", "the trainer is done, ending the other processes")
    return _write_results(config, before, after, weight_version, wall_s)


@contextlib.contextmanager
def _own_run_dir(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this launch, and remove what an earlier one reported there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as lock:
        try:
            # Released by the kernel when this process ends, so a crash leaves no stale lock.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise PreflightError(
                f"Another launch is using {run_dir}.",
                "Two runs would overwrite each other's logs and model.",
                "Wait for it to end, or name another directory with `--run_dir`.",
            ) from exc
        for name in (
            "summary.json",
            "reward.png",
            "completions.json",
            "model/trainer_state.json",
        ):
            (run_dir / name).unlink(missing_ok=True)
        yield


def _child_env(config: LaunchConfig, extra: Mapping[str, str]) -> dict[str, str]:
    """Return what is added to a child's environment: this interpreter's commands first, output unbuffered."""
    env = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": str(shutil.get_terminal_size().columns),
    }
    if config.is_local_model:
        env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    return {**env, **extra}


def _start_servers(config: LaunchConfig, run_dir: Path, group: ProcessGroup) -> tuple[Service, Service]:
    """Start the Atropos API and the inference server side by side."""
    logs = run_dir / "logs"
    api = Service("api", "/", build_api_command, logs / "api.log", _child_env(config, {}), group)

    def vllm_command(port: int) -> list[str]:
        return build_vllm_command(config, port)

    vllm_env = _child_env(config, config.vllm_env)
    return api, Service("vllm", "/health", vllm_command, logs / "vllm.log", vllm_env, group)


def _wait_until_ready(
    services: Sequence[Service], timeout_s: float, group: ProcessGroup, checklist: Checklist
) -> None:
    """Wait for all services, with a line at least every `PROGRESS_S` seconds."""
    for service in services:
        checklist.say(service.name, "starting")
    waiting = list(services)
    next_line_s = checklist.elapsed_s() + PROGRESS_S
    deadline_s = checklist.elapsed_s() + timeout_s
    while waiting:
        for service in [service for service in waiting if service.is_ready()]:
            checklist.say(service.name, f"ready at {service.url}")
            waiting.remove(service)
            next_line_s = checklist.elapsed_s() + PROGRESS_S
        if not waiting:
            group.check()
            return
        if checklist.elapsed_s() >= deadline_s:
            raise PreflightError(
                f"`{waiting[0].name}` was not ready after {timeout_s:.0f} s.",
                f"The last line of its log: {waiting[0].last_log_line()}",
                "Raise `startup_timeout_s` in the launch file if it was still loading the model.",
            )
        if checklist.elapsed_s() >= next_line_s:
            for service in waiting:
                checklist.say(service.name, f"still starting: {service.last_log_line()[-100:]}")
            next_line_s += PROGRESS_S
        time.sleep(POLL_S)


def _start_clients(
    config: LaunchConfig, run_dir: Path, group: ProcessGroup, api_url: str, vllm_url: str, checklist: Checklist
) -> ManagedProcess:
    """Start the environment, which waits by itself until the trainer has registered, and the trainer; return it."""
    logs = run_dir / "logs"
    env_command = build_env_command(config, api_url, vllm_url)
    group.add(ManagedProcess("env", env_command, logs / "env.log", _child_env(config, config.env_env)))
    checklist.say("env", config.env_command)
    trainer_command = build_trainer_command(config, api_url, vllm_url)
    trainer_env = _child_env(config, config.trainer_env)
    trainer = ManagedProcess("trainer", trainer_command, logs / "trainer.log", trainer_env, live_output=True)
    group.add(trainer)
    checklist.say("trainer", f"{config.trainer_command} (logs of all processes: {logs})")
    return trainer


def _wait_for_trainer(group: ProcessGroup, trainer: ManagedProcess, checklist: Checklist) -> None:
    """Return when the trainer has ended with exit code 0 and all others still run."""
    next_line_s = checklist.elapsed_s() + PROGRESS_S
    while not group.check(may_finish=trainer.name):
        if not trainer.has_output.is_set() and checklist.elapsed_s() >= next_line_s:
            # Importing and loading take longer than a person waits in silence; then the trainer speaks for itself.
            checklist.say(trainer.name, f"starting: {trainer.log_tail(1).strip()[-100:]}")
            next_line_s += PROGRESS_S
        time.sleep(POLL_S)


def _complete(vllm_url: str, config: LaunchConfig) -> list[list[str]]:
    """Let the server continue the configured prompts; return the completions of each."""
    if not config.prompts:
        return []
    body = {"model": config.model_name_or_path, "prompt": config.prompts, **config.completion_args}
    choices = _request("POST", f"{vllm_url}/v1/completions", body)["choices"]
    texts = [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]
    # The choices of the first prompt come first, then those of the second.
    num_each = len(texts) // len(config.prompts)
    return [texts[start : start + num_each] for start in range(0, len(texts), num_each)]


def _request(method: str, url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    try:
        response = requests.request(method, url, json=body, timeout=COMPLETION_TIMEOUT_S)
        response.raise_for_status()
        return response.json()
    except requests.RequestException as exc:
        _raise_server_error(url, exc)


def _raise_server_error(url: str, exc: requests.RequestException) -> NoReturn:
    detail = f" {exc.response.text[:500]}" if exc.response is not None else ""
    raise PreflightError(
        f"{url} did not answer as expected: {exc}.{detail}",
        "The inference server is asked for completions before and after training.",
        "Read logs/vllm.log in the run directory.",
    ) from exc


def _write_results(
    config: LaunchConfig,
    before: list[list[str]],
    after: list[list[str]],
    weight_version: int | str | None,
    wall_s: float,
) -> dict[str, Any]:
    """Write the files of the run directory and print the report."""
    run_dir = Path(config.run_dir)
    entries = summary.read_training_log(config.trainer_output_dir)
    result = summary.summarize(entries, weight_version, wall_s)
    (run_dir / "summary.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    completions = [
        {"prompt": prompt, "before": first, "after": last}
        for prompt, first, last in zip(config.prompts, before, after, strict=True)
    ]
    (run_dir / "completions.json").write_text(json.dumps(completions, indent=2) + "\n", encoding="utf-8")
    summary.plot_reward(entries, run_dir / "reward.png")
    summary.print_report(Console(), entries, config.prompts, before, after)
    print(
        f"reward   {result['reward_first']:.3f} (first {summary.WINDOW} steps) -> {result['reward_last']:.3f} (last)"
    )
    print(f"model    {config.trainer_output_dir}")
    print(f"summary  {run_dir / 'summary.json'}, {run_dir / 'reward.png'}, logs in {run_dir / 'logs'}", flush=True)
    return result
