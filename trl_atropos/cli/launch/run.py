"""`trl-atropos launch`: the Atropos API, the inference server, environments and the trainer on one machine."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import requests
from rich.console import Console

from ...api.store import set_aside
from ...errors import AtroposConnectionError, PreflightError, WeightSyncError
from ...gateway.counts import GatewayCounts
from ...gateway.counts_file import read_counts
from ...network import proxies_for
from ...report.page import REPORT_FILE, write_report
from ...report.plots import save_reward_plot
from ...report.run_files import LAUNCH_SUMMARY_FILE, read_run_files
from ...weight_sync.health import find_kind, read_weight_version
from ...weight_sync.http import SGLANG as SGLANG_KIND
from ...weight_sync.http import UNKNOWN, ServerSession
from ...wire.client import UNREGISTERED, AtroposClient
from . import summary
from .command_lines import (
    agent_env,
    build_api_command,
    build_env_command,
    build_gateway_command,
    build_server_command,
    build_trainer_command,
    env_flags,
    environment_env,
    gateway_arguments,
    trainer_flags,
    trainer_option,
)
from .config import (
    AGENTS_PART,
    API_PART,
    DURABLE_API,
    ENVIRONMENTS_PART,
    GATEWAY_COUNTS_DIR,
    GATEWAY_PART,
    SERVER_PART,
    SGLANG,
    VLLM,
    EnvironmentConfig,
    LaunchConfig,
)
from .gpus import split_gpus
from .output import LaunchOutput
from .processes import ManagedProcess, ProcessGroup
from .restarts import RestartLimit, Supervisor
from .services import PROBE_TIMEOUT_S, AnyService, Environment, ExternalService, Service, wait_until_ready


POLL_S = 0.2
TRAINER = "trainer"
COMPLETION_TIMEOUT_S = 120.0


def run_launch(config: LaunchConfig) -> dict[str, Any] | None:
    """Start what is not external, wait for the trainer, end what was started, write the summary and return it.

    The logs of the processes, `summary.json`, `reward.png` and `completions.json` lie in `config.run_dir` afterwards,
    the model in its subdirectory `model`. However this function is left, no process of the launch is left behind. With
    an external trainer the others run until Ctrl-C, and None is returned: the model lies elsewhere.

    Raises:
        PreflightError: Another launch uses the directory, GPUs or a port cannot be had, a server did not start in time, or
            the run left no log.
        ProcessFailedError: One of the processes ended before the trainer did, or the trainer failed.
    """
    gpus = split_gpus(config)
    if config.has_gateway:
        # What it cannot follow is refused before servers load a model.
        gateway_arguments(config)
    run_dir = Path(config.run_dir)
    combined = run_dir / "logs" / "combined.log"
    with (
        _own_run_dir(run_dir),
        LaunchOutput(combined, config.show_all_logs) as output,
        ProcessGroup() as group,
    ):
        launch = _Launch(config, gpus, group, output)
        try:
            api, servers = launch.start_servers()
            launch.ask_external_servers()
            if not config.has_trainer:
                launch.serve(api, servers)
                return None
            # All of them hold the same policy.
            first = servers[0]
            before = launch.complete(first.url)
            gateway = launch.start_gateway(api, servers)
            launch.start_environments(api, servers, gateway)
            launch.wait_for_trainer(launch.start_trainer(api.url, _urls(servers)), gateway, api)
            wall_s = output.elapsed_s()
            launch.read_gateway(gateway)
            launch.wait_for_server(first)
            after = launch.complete(first.url)
            weight_version = _weight_version(first.url, first.name)
        finally:
            if group.names:
                output.say("launch", f"ending {', '.join(group.names)}")
                output.wait_for("launch", "waiting for them to end")
    return _write_results(config, before, after, weight_version, wall_s, launch.num_restarts, launch.of_gateway)


class _Launch:
    """The parts of one launch, which `group` ends. `gpus` is from [`~cli.launch.gpus.split_gpus`]."""

    def __init__(
        self, config: LaunchConfig, gpus: Mapping[str, Mapping[str, str]], group: ProcessGroup, output: LaunchOutput
    ):
        self._config = config
        self._gpus = gpus
        self._group = group
        self._output = output
        self._logs = Path(config.run_dir) / "logs"
        limit = RestartLimit(config.max_restarts, config.restart_window_s)
        self._supervisor = Supervisor(limit, config.startup_timeout_s, group, output)
        self.of_gateway: dict[str, Any] | None = None
        """What gateways counted, that of the launch and those of environments together; None if there is none."""
        self._has_agents = False

    @property
    def num_restarts(self) -> dict[str, int]:
        """How often each part was started again, by name; only those that were."""
        return self._supervisor.num_restarts

    def start_servers(self) -> tuple[AnyService, list[AnyService]]:
        """Start the Atropos API and the inference servers side by side, those of them that are not external; return when
        all answer.
        """
        config = self._config

        def api_command(port: int) -> list[str]:
            return build_api_command(config, port)

        def server_command(port: int) -> list[str]:
            return build_server_command(config, port)

        api: AnyService
        servers: list[AnyService]
        if config.api_url is not None:
            api = ExternalService("api", config.api_url, "/")
        else:
            if config.api == DURABLE_API:
                self._keep_earlier_database()
            env = self._child_env({})
            api = Service(
                "api", "/", api_command, self._log_path("api"), env, self._group, self._output, config.api_port
            )
        if config.vllm_url is not None:
            urls = config.external_server_urls
            servers = [
                ExternalService(name, url, "/health") for name, url in zip(config.server_names, urls, strict=True)
            ]
        else:
            servers = [
                Service(
                    name,
                    "/health",
                    server_command,
                    self._log_path(name),
                    self._child_env({**self._gpus.get(name.replace(SGLANG, VLLM), {}), **config.server_env}),
                    self._group,
                    self._output,
                    config.vllm_port,
                    port_key="vllm_port",
                )
                for name in config.server_names
            ]
        wait_until_ready([api, *servers], config.startup_timeout_s, self._group, self._output)
        for part, service in ((API_PART, api), *((SERVER_PART, server) for server in servers)):
            if isinstance(service, Service):
                self._supervisor.add(service, config.on_exit_of(part))
        return api, servers

    def ask_external_servers(self) -> None:
        """Find out which kind inference servers are that the launch did not start, so that environments are told."""
        for url in self._config.external_server_urls:
            with ServerSession(url, COMPLETION_TIMEOUT_S, os.environ.get("VLLM_API_KEY"), kind=UNKNOWN) as session:
                kind = SGLANG if find_kind(session, timeout_s=0.0) == SGLANG_KIND else VLLM
            self._config = replace(self._config, server=kind)

    def _keep_earlier_database(self) -> None:
        """Move the groups of an earlier run aside, as the trainer does with its journal; a run that resumes goes on with them."""
        database = self._config.api_database
        resumes = trainer_option(self._config, "resume_from_checkpoint")
        if not database.exists() or str(resumes).lower() not in ("none", "false"):
            return
        self._output.say("launch", f"the database of an earlier run is now {set_aside(database, 'api-{}.db')}")

    def start_gateway(self, api: AnyService, servers: Sequence[AnyService]) -> Service | None:
        """Start the gateway in front of the inference servers, if there is to be one; return when it answers."""
        config = self._config
        if not config.has_gateway:
            return None
        for key_file in (config.gateway_key_file, config.environment_key_file):
            # Without signs: a value of a command line must not look like an option.
            _write_secret(key_file, secrets.token_hex(24))
        command = functools.partial(build_gateway_command, config, api_url=api.url, vllm_url=_urls(servers))
        gateway = Service(
            GATEWAY_PART,
            "/healthz",
            command,
            self._log_path(GATEWAY_PART),
            self._child_env({}),
            self._group,
            self._output,
            config.gateway_port,
        )
        wait_until_ready([gateway], config.startup_timeout_s, self._group, self._output)
        self._supervisor.add(gateway, config.on_exit_of(GATEWAY_PART), needs=[api, *servers])
        return gateway

    def start_agents_in_time(self, gateway: Service | None, api: AnyService) -> None:
        """Start the agents once a trainer is registered: an API of Atropos' takes no registration after a group, and what is
        sampled before the first publish has no known policy.
        """
        if gateway is None or self._has_agents or not _has_trainer(api.url):
            return
        self._has_agents = True
        variables = agent_env(self._config, gateway.url, self._config.gateway_key_file.read_text(encoding="utf-8"))
        for name, agent in self._config.agents.items():
            start = functools.partial(self._start, command=shlex.split(agent.command), env={**variables, **agent.env})
            on_exit = agent.on_exit or self._config.on_exit_of(AGENTS_PART)
            self._start_copies(name, agent, start, on_exit, needs=[gateway])
        if not self._config.agents:
            self._output.say(
                "launch", f"agents find the gateway at {gateway.url}, and its key in {self._config.gateway_key_file}"
            )

    def read_gateway(self, gateway: Service | None) -> None:
        """Find out what gateways have done, for the summary: ask that of the launch, unless it is just away, and read what those in the
        processes of environments have written. A session is one of one gateway alone.
        """
        found = read_counts(self._config.gateway_counts_dir)
        if gateway is not None and gateway.answers():
            key = self._config.gateway_key_file.read_text(encoding="utf-8")
            found.append(GatewayCounts.of_values(_request("GET", f"{gateway.url}/status", {}, GATEWAY_PART, key)))
        if found:
            values = sum(found, GatewayCounts()).values()
            self.of_gateway = {name: values[name] for name in summary.OF_GATEWAY}

    def start_environments(self, api: AnyService, servers: Sequence[AnyService], gateway: Service | None) -> None:
        """Start the environments, which wait by themselves until the trainer has registered. With a gateway that is all that they
        see of the servers.
        """
        config = self._config
        model = servers[0] if gateway is None else gateway
        key = None if gateway is None else config.environment_key_file.read_text(encoding="utf-8")
        variables = environment_env(config)
        for name, environment in config.environments.items():
            command = build_env_command(config, environment, api.url, model.url, key)
            env = {**variables, **environment.env}
            start = functools.partial(self._start, command=command, env=env)
            on_exit = environment.on_exit or config.on_exit_of(ENVIRONMENTS_PART)
            self._start_copies(name, environment, start, on_exit, needs=[api, model])
        if not config.environments and not config.agents:
            flags = shlex.join(_flat(env_flags(config, api.url, model.url)))
            # Read where it is needed: what is said here is in logs.
            shown = (
                ""
                if gateway is None
                else f' --openai.api_key "$(cat {shlex.quote(str(config.environment_key_file))})"'
            )
            self._output.say("launch", f"start the environments with: python ENVIRONMENT.py serve {flags}{shown}")

    def _start_copies(
        self,
        name: str,
        environment: EnvironmentConfig,
        start: Callable[[str], ManagedProcess],
        on_exit: str,
        needs: Sequence[AnyService],
    ) -> None:
        """Start the processes of an environment or agent, of which `start` starts one by its name."""
        copies = range(1, environment.num_copies + 1)
        names = [f"{name}-{copy}" for copy in copies] if environment.num_copies > 1 else [name]
        for copy in names:
            started = Environment(copy, start)
            self._supervisor.add(started, on_exit, needs, is_environment=True)
            self._output.say(started.name, environment.command)

    def start_trainer(self, api_url: str, vllm_url: str) -> ManagedProcess:
        """Start the trainer."""
        command = build_trainer_command(self._config, api_url, vllm_url)
        env = {**self._gpus.get("trainer", {}), **self._config.trainer_env}
        trainer = self._start(TRAINER, command, env, shows_output=True)
        self._output.say("trainer", f"{self._config.trainer_command} (logs of all processes: {self._logs})")
        return trainer

    def wait_for_trainer(self, trainer: ManagedProcess, gateway: Service | None, api: AnyService) -> None:
        """Return when the trainer has ended with exit code 0 and all others that the run needs are there."""
        self._output.wait_for("launch", "training")
        while not self._supervisor.check(trainer.name):
            self.start_agents_in_time(gateway, api)
            time.sleep(POLL_S)
        self._output.say("trainer", "done")

    def wait_for_server(self, server: AnyService) -> None:
        """Return when the inference server answers, which may just be started again."""
        while not server.answers():
            self._supervisor.check(TRAINER)
            if not self._supervisor.awaits(server):
                return
            time.sleep(POLL_S)

    def serve(self, api: AnyService, servers: Sequence[AnyService]) -> None:
        """Keep servers and environments running for a trainer that somebody else starts, until Ctrl-C."""
        gateway = self.start_gateway(api, servers)
        self.start_environments(api, servers, gateway)
        flags = shlex.join(_flat(trainer_flags(self._config, api.url, _urls(servers))))
        self._output.say("launch", f"start the trainer with: python TRAINER.py {flags}")
        self._output.say("launch", "the others run until Ctrl-C")
        self._output.wait_for("launch", "serving", only_on_terminal=True)
        try:
            while True:
                self._supervisor.check()
                self.start_agents_in_time(gateway, api)
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            self._output.say("launch", "interrupted")

    def complete(self, vllm_url: str) -> list[list[str]]:
        """Let the server continue the configured prompts; return the completions of each."""
        prompts = self._config.prompts
        if not prompts:
            return []
        self._output.wait_for("launch", f"the server continues {len(prompts)} prompts")
        body = {"model": self._config.model_name_or_path, "prompt": prompts, **self._config.completion_args}
        key = os.environ.get("VLLM_API_KEY")
        choices = _request("POST", f"{vllm_url}/v1/completions", body, self._config.server_names[0], key)["choices"]
        texts = [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]
        # The choices of the first prompt come first, then those of the second.
        num_each = len(texts) // len(prompts)
        return [texts[start : start + num_each] for start in range(0, len(texts), num_each)]

    def _start(
        self, name: str, command: list[str], env: Mapping[str, str], shows_output: bool = False
    ) -> ManagedProcess:
        path = self._log_path(name)
        on_output = self._output.show if shows_output else None
        process = ManagedProcess(name, command, path, self._child_env(env), on_output)
        self._group.add(process)
        self._output.follow(name, path)
        return process

    def _log_path(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _child_env(self, extra: Mapping[str, str]) -> dict[str, str]:
        """Return what is added to a child's environment: this interpreter's commands first, output unbuffered."""
        env = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "COLUMNS": str(shutil.get_terminal_size().columns),
        }
        if self._config.is_local_model:
            env["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
        return {**env, **extra}


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
            LAUNCH_SUMMARY_FILE,
            "reward.png",
            "completions.json",
            "model/trainer_state.json",
            "model/report.html",
        ):
            (run_dir / name).unlink(missing_ok=True)
        for path in (*(run_dir / "logs").glob("*.log"), *(run_dir / GATEWAY_COUNTS_DIR).glob("*")):
            path.unlink()
        yield


def _urls(servers: Sequence[AnyService]) -> str:
    """Their addresses, as trainer and gateway take them."""
    return ",".join(server.url for server in servers)


def _flat(flags: Mapping[str, str]) -> list[str]:
    return [part for pair in flags.items() for part in pair]


def _has_trainer(api_url: str) -> bool:
    """Whether a trainer is registered. An API that does not answer now may be started again."""
    with AtroposClient(api_url, connect_timeout_s=PROBE_TIMEOUT_S, read_timeout_s=PROBE_TIMEOUT_S) as client:
        try:
            return client.info()[0] != UNREGISTERED
        except AtroposConnectionError:
            return False


def _write_secret(path: Path, secret: str) -> None:
    """Write a file that this user alone can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(secret)


def _request(method: str, url: str, body: Mapping[str, Any], name: str, key: str | None) -> dict[str, Any]:
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        response = requests.request(
            method, url, json=body, headers=headers, timeout=COMPLETION_TIMEOUT_S, proxies=proxies_for(url)
        )
        response.raise_for_status()
        return response.json()
    except requests.RequestException as exc:
        _raise_server_error(url, exc, name)


def _weight_version(url: str, name: str) -> str:
    """The name of the weights that an inference server of either kind holds; `name` is that of its log."""
    with ServerSession(url, COMPLETION_TIMEOUT_S, os.environ.get("VLLM_API_KEY"), kind=UNKNOWN) as session:
        try:
            return read_weight_version(session)
        except (PreflightError, WeightSyncError) as exc:
            raise PreflightError(
                exc.what,
                "It is asked at the end which policy it holds.",
                _read_log(name),
            ) from exc


def _read_log(name: str) -> str:
    return f"Read its log: logs/{name}.log in the run directory, unless it is external."


def _raise_server_error(url: str, exc: requests.RequestException, name: str) -> NoReturn:
    detail = f" {exc.response.text[:500]}" if exc.response is not None else ""
    raise PreflightError(
        f"{url} did not answer as expected: {exc}.{detail}",
        "The inference server is asked for completions before and after training, a gateway for what it has counted.",
        _read_log(name),
    ) from exc


def _write_results(
    config: LaunchConfig,
    before: list[list[str]],
    after: list[list[str]],
    weight_version: int | str | None,
    wall_s: float,
    num_restarts: dict[str, int],
    of_gateway: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write the files of the run directory and print the report."""
    run_dir = Path(config.run_dir)
    entries = summary.read_training_log(config.trainer_output_dir)
    result = summary.summarize(entries, weight_version, wall_s, num_restarts, of_gateway)
    (run_dir / LAUNCH_SUMMARY_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report = config.trainer_output_dir / REPORT_FILE
    if report.exists() and (num_restarts or of_gateway):
        # The trainer wrote it before these were known.
        write_report(read_run_files(config.trainer_output_dir), report)
    completions = [
        {"prompt": prompt, "before": first, "after": last}
        for prompt, first, last in zip(config.prompts, before, after, strict=True)
    ]
    (run_dir / "completions.json").write_text(json.dumps(completions, indent=2) + "\n", encoding="utf-8")
    save_reward_plot(config.trainer_output_dir, run_dir / "reward.png")
    summary.print_report(Console(), entries, config.prompts, before, after)
    print(
        f"reward   {result['reward_first']:.3f} (first {summary.WINDOW} steps) -> {result['reward_last']:.3f} (last)"
    )
    if num_restarts:
        print(f"restarts {', '.join(f'{name} {count}' for name, count in num_restarts.items())}")
    if of_gateway is not None:
        print(f"gateway  {summary.describe_gateway(of_gateway)}")
    print(f"model    {config.trainer_output_dir}")
    if report.exists():
        # A trainer of one's own may write none.
        print(f"report   {report}")
    print(f"summary  {run_dir / 'summary.json'}, {run_dir / 'reward.png'}, logs in {run_dir / 'logs'}", flush=True)
    return result
