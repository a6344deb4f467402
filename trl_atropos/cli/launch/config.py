"""The file of `trl-atropos launch`, read strictly."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...errors import PreflightError, did_you_mean
from ...trainer.yaml_file import read_yaml


EXTERNAL = "external"
"""Value of `environments`, `trainer_command` or `api`: somebody else starts them."""

DURABLE_API = "trl-atropos"
"""Value of `api`: `trl-atropos api`, with its database in the run directory."""

ATROPOS_API = "run-api"
"""Value of `api`: Atropos' own, which forgets everything when it ends."""

APIS = (DURABLE_API, ATROPOS_API, EXTERNAL)

VLLM, SGLANG = "vllm", "sglang"
SERVERS = (VLLM, SGLANG)
"""Values of `server`, and of `--openai.server_type` of an environment."""

OTHER_SERVERS_KEYS = {VLLM: ("sglang_args", "sglang_env", "sglang_python"), SGLANG: ("vllm_args", "vllm_env")}
"""Value of `server` -> the keys that say nothing about such a server."""

RESTART, STOP, CONTINUE = "restart", "stop", "continue"
ON_EXITS = (RESTART, STOP, CONTINUE)
"""Values of `on_exit`: what becomes of the run when a part of it ends."""

API_PART, SERVER_PART, GATEWAY_PART = "api", "server", "gateway"
ENVIRONMENTS_PART, AGENTS_PART = "environments", "agents"
PARTS = (API_PART, SERVER_PART, GATEWAY_PART, ENVIRONMENTS_PART, AGENTS_PART)
"""Keys of `on_exit`: the parts that are not the trainer."""

RESERVED_NAMES = frozenset({"api", *SERVERS, GATEWAY_PART, "trainer", "launch", "combined"})
"""Names of the other processes and logs."""

NUMBERED_SERVER = re.compile(rf"(?:{'|'.join(SERVERS)})-\d+")
"""Names of servers where there are several."""

GATEWAY_COUNTS_DIR = "gateway_counts"
"""In the run directory: what gateways in the processes of environments have counted."""

EXAMPLE = "examples/configs/quickstart_launch.yaml"


@dataclass(frozen=True)
class EnvironmentConfig:
    """One environment or agent of a launch: its command line without addresses and model, variables, 1 or more processes.

    `on_exit` is one of `ON_EXITS`, None for that of all environments or agents.
    """

    command: str
    env: dict[str, str] = field(default_factory=dict)
    num_copies: int = 1
    on_exit: str | None = None


@dataclass(frozen=True)
class LaunchConfig:
    """What one launch runs. docs/launch.md explains each key.

    An `api_url` or `vllm_url` that is not None is a server that runs already; `vllm_url` can name several, with commas between them.
    `server`, one of `SERVERS`, is the kind of the `num_servers` inference servers that are started, and `vllm_url`, `vllm_port` and `vllm_gpus` are those of either kind. `sglang_python` is the
    interpreter that has SGLang, None for this one. Of what is started, a port of 0 is any free one. `environments` is empty and `trainer_command` is `EXTERNAL` where somebody else starts them.
    `agents` and environments reach the model through a gateway, which is started where there are agents or several servers, unless
    `gateway` says so or otherwise. `gateway_args` are arguments of `trl-atropos gateway`.
    `api` is one of `APIS`; with an `api_url` it is external. `startup_timeout_s` is in seconds, for the API and the inference server together.
    `on_exit` has values of `ON_EXITS` for some of `PARTS`. A part is started again at most `max_restarts` times within
    `restart_window_s` seconds.
    """

    model_name_or_path: str
    run_dir: str
    environments: dict[str, EnvironmentConfig]
    trainer_command: str
    agents: dict[str, EnvironmentConfig] = field(default_factory=dict)
    trainer_args: str = ""
    api: str = DURABLE_API
    api_url: str | None = None
    server: str = VLLM
    num_servers: int = 1
    vllm_url: str | None = None
    api_port: int = 0
    vllm_port: int = 0
    gateway: bool | None = None
    gateway_port: int = 0
    gateway_args: dict[str, Any] = field(default_factory=dict)
    vllm_args: dict[str, Any] = field(default_factory=dict)
    vllm_env: dict[str, str] = field(default_factory=dict)
    sglang_python: str | None = None
    sglang_args: dict[str, Any] = field(default_factory=dict)
    sglang_env: dict[str, str] = field(default_factory=dict)
    trainer_env: dict[str, str] = field(default_factory=dict)
    vllm_gpus: str | None = None
    trainer_gpus: str | None = None
    on_exit: dict[str, str] = field(default_factory=dict)
    max_restarts: int = 5
    restart_window_s: float = 600.0
    startup_timeout_s: float = 600.0
    show_all_logs: bool = False
    prompts: list[str] = field(default_factory=list)
    completion_args: dict[str, Any] = field(default_factory=dict)

    @property
    def trainer_output_dir(self) -> Path:
        """Where the trainer saves the model and its state."""
        return Path(self.run_dir) / "model"

    @property
    def api_database(self) -> Path:
        """The database of `trl-atropos api`."""
        return Path(self.run_dir) / "api.db"

    @property
    def has_gateway(self) -> bool:
        """Whether the launch starts a gateway."""
        return bool(self.agents) or self.has_several_servers if self.gateway is None else self.gateway

    @property
    def external_server_urls(self) -> list[str]:
        """The inference servers that run already."""
        return [] if self.vllm_url is None else [url.strip() for url in self.vllm_url.split(",")]

    @property
    def has_several_servers(self) -> bool:
        """Whether there is more than one inference server, started or external."""
        return max(self.num_servers, len(self.external_server_urls)) > 1

    @property
    def server_names(self) -> list[str]:
        """Names of the inference servers, which are those of their logs."""
        num_servers = len(self.external_server_urls) or self.num_servers
        return [self.server] if num_servers == 1 else [f"{self.server}-{i}" for i in range(1, num_servers + 1)]

    @property
    def gateway_key_file(self) -> Path:
        """Holds the key of the gateway's control routes, which agents get."""
        return Path(self.run_dir) / "gateway.key"

    @property
    def environment_key_file(self) -> Path:
        """Holds the key with which environments generate through the gateway."""
        return Path(self.run_dir) / "environment.key"

    @property
    def gateway_counts_dir(self) -> Path:
        """`GATEWAY_COUNTS_DIR` of this run, wherever an environment works."""
        return Path(self.run_dir).absolute() / GATEWAY_COUNTS_DIR

    @property
    def server_env(self) -> dict[str, str]:
        """Variables of the inference server."""
        return self.sglang_env if self.server == SGLANG else self.vllm_env

    def on_exit_of(self, part: str) -> str:
        """What becomes of the run when one of `PARTS` ends. What `run-api` held is lost with it."""
        default = STOP if part == API_PART and self.api == ATROPOS_API else RESTART
        return self.on_exit.get(part, default)

    @property
    def is_local_model(self) -> bool:
        """Whether the model is a directory of this machine."""
        return Path(self.model_name_or_path).is_dir()

    @property
    def has_trainer(self) -> bool:
        """Whether the launch starts the trainer."""
        return self.trainer_command != EXTERNAL


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "bool | None": (bool, type(None)),
    "list[str]": (list,),
}


def load_launch_config(path: Path, overrides: Mapping[str, Any]) -> LaunchConfig:
    """Read a launch file, with the values of the command line instead of its own where these are not None.

    Raises:
        PreflightError: The file cannot be read, has an unknown key or a value of the wrong kind, or lacks a key.
    """
    where = f"the launch file {path}"
    values = {**_read(path), **{key: value for key, value in overrides.items() if value is not None}}
    for key in ("vllm_gpus", "trainer_gpus"):
        # YAML reads a single GPU as a number.
        if type(values.get(key)) is int:
            values[key] = str(values[key])
    environments = values.get("environments", {} if values.get("agents") else None)
    if environments == EXTERNAL or (environments == {} and values.get("agents")):
        values["environments"] = {}
    elif not environments and environments is not None:
        raise PreflightError(
            f"`environments` in {where} is {environments!r}.",
            "Without an environment there is nothing to train on.",
            f"Name one, as in {EXAMPLE}, or write `environments: {EXTERNAL}` if they are started elsewhere.",
        )
    _check(where, values, LaunchConfig)
    for key in (ENVIRONMENTS_PART, AGENTS_PART):
        values[key] = {
            str(name): _environment(where, key, str(name), content) for name, content in values.get(key, {}).items()
        }
    for key in ("vllm_env", "sglang_env", "trainer_env"):
        values[key] = _as_text(values.get(key, {}))
    config = LaunchConfig(**values)
    _check_values(where, config)
    return config


def _read(path: Path) -> dict[str, Any]:
    content = read_yaml(
        path,
        f"The launch file {path}",
        "It names the commands to start.",
        f"Pass an existing YAML file with `-c`, for example {EXAMPLE}.",
    )
    if not isinstance(content, dict):
        raise PreflightError(
            f"The launch file {path} holds a {type(content).__name__}, not a mapping.",
            "Each option is one `key: value`.",
            f"Compare it with {EXAMPLE}.",
        )
    return {str(key): value for key, value in content.items()}


def _environment(where: str, key: str, name: str, content: Any) -> EnvironmentConfig:
    where = f"`{key}.{name}` of {where}"
    is_taken = name in RESERVED_NAMES or NUMBERED_SERVER.fullmatch(name) is not None
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or is_taken:
        raise PreflightError(
            f"{where} cannot be the name of a process.",
            f"It names a log file beside {', '.join(sorted(RESERVED_NAMES))}.",
            "Use letters, digits, `_`, `.` and `-`.",
        )
    if not isinstance(content, dict):
        raise PreflightError(
            f"{where} is {content!r}, a {type(content).__name__}.",
            "It is a mapping with `command`, and `env`, `num_copies` and `on_exit` if needed.",
            f"Compare it with {EXAMPLE}.",
        )
    values = {str(key): value for key, value in content.items()}
    _check(where, values, EnvironmentConfig)
    if values.get("num_copies", 1) < 1 or not values["command"].strip():
        raise PreflightError(
            f"{where} runs {values.get('num_copies', 1)} copies of the command {values['command']!r}.",
            "It needs a command and at least one process.",
            "Correct it, or remove it.",
        )
    _check_exit(f"`on_exit` of {where}", values.get("on_exit", RESTART))
    return EnvironmentConfig(**{**values, "env": _as_text(values.get("env", {}))})


def _as_text(variables: Mapping[Any, Any]) -> dict[str, str]:
    # YAML reads 1 and true as numbers and booleans; an environment holds text.
    return {str(name): str(value) for name, value in variables.items()}


def _check(where: str, values: Mapping[str, Any], kind: type[LaunchConfig] | type[EnvironmentConfig]) -> None:
    annotations = {known.name: str(known.type) for known in fields(kind)}
    for key, value in values.items():
        if key not in annotations:
            raise PreflightError(
                f"{where[0].upper()}{where[1:]} has the unknown key `{key}`.",
                "A misspelled option would be ignored otherwise.",
                f"{did_you_mean(key, annotations)} All keys: {', '.join(annotations)}.",
            )
        expected = _TYPES.get(annotations[key], (dict,))
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise PreflightError(
                f"`{key}` in {where} is {value!r}, a {type(value).__name__}.",
                f"It must be of type {annotations[key]}.",
                "Correct the value.",
            )
    missing = [
        known.name
        for known in fields(kind)
        if known.default is MISSING and known.default_factory is MISSING and known.name not in values
    ]
    if missing:
        raise PreflightError(
            f"{where[0].upper()}{where[1:]} lacks {', '.join(f'`{name}`' for name in missing)}.",
            "There is no sensible default.",
            "Add the key to the file.",
        )


def _check_values(where: str, config: LaunchConfig) -> None:
    if config.api not in APIS or (config.api == EXTERNAL and config.api_url is None):
        raise PreflightError(
            f"`api` in {where} is {config.api!r}, `api_url` is {config.api_url!r}.",
            "It says which API is started; one that runs already has an address.",
            f"Choose one of: {', '.join(APIS)}; with {EXTERNAL} give `api_url`, too.",
        )
    _check_server(where, config)
    _check_gateway(where, config)
    _check_exits(where, config)
    _check_url(where, "api_url", config.api_url)
    for url in config.external_server_urls:
        _check_url(where, "vllm_url", url)
    for key in ("api_port", "vllm_port", "gateway_port"):
        if not 0 <= getattr(config, key) < 65536:
            raise PreflightError(
                f"`{key}` in {where} is {getattr(config, key)}.",
                "A port lies in 1..65535.",
                "Choose another one, or 0 for one that is free.",
            )
    if (
        not config.environments
        and not config.has_trainer
        and not config.has_gateway
        and config.api_url
        and config.vllm_url
    ):
        raise PreflightError(
            f"Every part in {where} is external.",
            "There is nothing to launch.",
            "Leave out `api_url` or `vllm_url`, or give `trainer_command` or `environments` a command.",
        )


def _check_server(where: str, config: LaunchConfig) -> None:
    if config.server not in SERVERS:
        raise PreflightError(
            f"`server` in {where} is {config.server!r}.",
            "It says which inference server is started, and which kind environments ask.",
            f"Choose one of: {', '.join(SERVERS)}.",
        )
    if config.num_servers < 1 or (config.num_servers > 1 and (config.vllm_url is not None or config.vllm_port)):
        raise PreflightError(
            f"`num_servers` in {where} is {config.num_servers}, `vllm_url` is {config.vllm_url!r}, `vllm_port` is {config.vllm_port}.",
            "It counts the inference servers that are started, each on a free port.",
            "Set it to 1 or more; name servers that run already in `vllm_url`, with commas between them.",
        )
    unused = [key for key in OTHER_SERVERS_KEYS[config.server] if getattr(config, key)]
    if unused:
        raise PreflightError(
            f"{', '.join(f'`{key}`' for key in unused)} in {where} is given, and `server` is {config.server}.",
            "It is about the other kind of server, and would be ignored.",
            f"Remove it, or set `server` to {unused[0].partition('_')[0]}.",
        )
    if config.sglang_python is not None and shutil.which(config.sglang_python) is None:
        raise PreflightError(
            f"`sglang_python` in {where} is {config.sglang_python!r}, which is no program.",
            "It is the interpreter of the environment in which SGLang is installed.",
            "Correct the path, such as /opt/sglang/bin/python, or leave it out if SGLang is installed beside the trainer.",
        )


def _check_gateway(where: str, config: LaunchConfig) -> None:
    if config.agents and not config.has_gateway:
        raise PreflightError(
            f"`gateway` in {where} is false, and there are `agents`: {', '.join(config.agents)}.",
            "They reach the model through a gateway alone.",
            "Remove `gateway`, or make environments of them.",
        )
    if config.environments and config.has_several_servers and not config.has_gateway:
        raise PreflightError(
            f"`gateway` in {where} is false, and there are several inference servers.",
            "An environment of Atropos is given one, and the others would idle.",
            "Remove `gateway`, or start the environments elsewhere.",
        )
    twice = sorted(config.environments.keys() & config.agents.keys())
    if twice:
        raise PreflightError(
            f"`{twice[0]}` in {where} is an environment and an agent.",
            "Both would write the same log.",
            "Rename one of them.",
        )
    if (config.gateway_args or config.gateway_port) and not config.has_gateway:
        raise PreflightError(
            f"`gateway_args` or `gateway_port` in {where} is given, and no gateway is started.",
            "It would be ignored.",
            "Remove it, name `agents`, or set `gateway` to true.",
        )
    ours = {"servers", "api_url", "host", "port", "key_file", "environment_key_file"}
    given = sorted(ours & {name.replace("-", "_") for name in config.gateway_args})
    if given:
        raise PreflightError(
            f"`gateway_args` in {where} has {', '.join(f'`{name}`' for name in given)}.",
            "The launch gives the gateway its addresses and its keys.",
            "Remove it; `gateway_port` chooses the port.",
        )


def _check_exit(what: str, on_exit: Any) -> None:
    if on_exit not in ON_EXITS:
        raise PreflightError(
            f"{what[0].upper()}{what[1:]} is {on_exit!r}.",
            "It says what becomes of the run when this part ends.",
            f"Choose one of: {', '.join(ON_EXITS)}.",
        )


def _check_exits(where: str, config: LaunchConfig) -> None:
    external = {
        API_PART: config.api_url is not None,
        SERVER_PART: config.vllm_url is not None,
        GATEWAY_PART: not config.has_gateway,
        ENVIRONMENTS_PART: not config.environments,
        AGENTS_PART: not config.agents,
    }
    for part, on_exit in config.on_exit.items():
        if part not in PARTS:
            raise PreflightError(
                f"`on_exit` in {where} names the unknown part `{part}`.",
                "A misspelled part would end the run, or be started again, unasked.",
                f"{did_you_mean(part, PARTS)} All parts: {', '.join(PARTS)}.",
            )
        _check_exit(f"`on_exit.{part}` in {where}", on_exit)
        if external[part]:
            raise PreflightError(
                f"`on_exit.{part}` in {where} is {on_exit}, and the launch starts no such part.",
                "It does not see the end of what runs elsewhere.",
                f"Remove `{part}` from `on_exit`.",
            )
    if config.api == ATROPOS_API and config.on_exit_of(API_PART) == RESTART:
        raise PreflightError(
            f"`on_exit.{API_PART}` in {where} is {RESTART}, and `api` is {ATROPOS_API}.",
            "It keeps queue and registrations in memory: environments end when it does not know them any more.",
            f"Set `api` to {DURABLE_API}, which loses nothing when it is started again, or `on_exit.{API_PART}` to {STOP}.",
        )
    if config.max_restarts < 1 or config.restart_window_s <= 0:
        raise PreflightError(
            f"`max_restarts` in {where} is {config.max_restarts}, `restart_window_s` is {config.restart_window_s:g}.",
            "They bound how often a part is started again, and are above 0.",
            f"Correct them, or set `on_exit` to {STOP} for a part that is not to be started again.",
        )


def _check_url(where: str, key: str, url: str | None) -> None:
    if url is None:
        return
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise PreflightError(
            f"`{key}` in {where} is {url!r}.",
            "It must be the root of a server, such as http://127.0.0.1:8000, without a path.",
            "Correct it, or leave it out to have the server started.",
        )
