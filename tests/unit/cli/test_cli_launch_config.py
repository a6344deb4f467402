"""The launch file is read strictly, and the command lines follow from it."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_atropos.cli.launch.command_lines import (
    agent_env,
    build_api_command,
    build_env_command,
    build_gateway_command,
    build_server_command,
    build_trainer_command,
    environment_env,
    flag_value,
    trainer_option,
)
from trl_atropos.cli.launch.config import EnvironmentConfig, LaunchConfig, load_launch_config
from trl_atropos.cli.launch.run import run_launch
from trl_atropos.cli.main import main
from trl_atropos.errors import PreflightError


ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = EnvironmentConfig("env serve")
FILE = {
    "model_name_or_path": "m",
    "run_dir": "r",
    "environments": {"first": {"command": "env serve"}},
    "trainer_command": "train",
}
REQUIRED = {**FILE, "environments": {"first": ENVIRONMENT}}
API, VLLM = "http://127.0.0.1:1", "http://127.0.0.1:2"


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def flags_of(command: list[str]) -> dict[str, str]:
    return {command[i]: command[i + 1] for i in range(len(command) - 1) if command[i].startswith("--")}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "configs").glob("*launch*.yaml")), ids=lambda path: path.stem
)
def test_shipped_launch_files_load_and_name_files_that_exist(path: Path) -> None:
    config = load_launch_config(path, {})
    players = [*config.environments.values(), *config.agents.values()]
    commands = [config.trainer_command, *(player.command for player in players)]
    named = [part for command in commands for part in command.split() if part.startswith("examples/")]
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_numbers_of_the_shipped_launch_file_reach_its_processes_as_text() -> None:
    config = load_launch_config(ROOT / "examples" / "configs" / "quickstart_launch.yaml", {})
    assert config.vllm_env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert config.environments["capitals"].env == {"OMP_NUM_THREADS": "1"}


def test_every_key_of_the_shipped_launch_file_has_a_comment() -> None:
    lines = (ROOT / "examples" / "configs" / "quickstart_launch.yaml").read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if line and line[0].isalpha()]
    assert len(keys) == 11
    assert all(lines[i - 1].startswith("#") for i in keys)


def test_every_key_has_a_row_in_the_documentation_and_every_row_a_key() -> None:
    text = (ROOT / "docs" / "launch.md").read_text().partition("## Keys of the file")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    named = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(known.name for known in fields(LaunchConfig))


def test_command_line_overrides_the_file_and_none_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "l.yaml", FILE)
    config = load_launch_config(path, {"run_dir": "other", "trainer_args": None, "environments": None})
    assert (config.run_dir, config.trainer_args, config.environments) == ("other", "", {"first": ENVIRONMENT})
    config = load_launch_config(path, {"environments": {"env": {"command": "mine"}}})
    assert config.environments == {"env": EnvironmentConfig("mine")}


def test_several_environments_keep_their_names_variables_and_copies(tmp_path: Path) -> None:
    environments = {"a": {"command": "x"}, "b-2": {"command": "y", "env": {"N": 1, "T": True}, "num_copies": 3}}
    config = load_launch_config(write(tmp_path / "l.yaml", {**FILE, "environments": environments}), {})
    assert config.environments == {
        "a": EnvironmentConfig("x", {}, 1),
        "b-2": EnvironmentConfig("y", {"N": "1", "T": "True"}, 3),
    }


def test_what_can_be_started_again_is_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    assert LaunchConfig(**REQUIRED).on_exit_of("gateway") == "restart"

    def exits(**change: Any) -> list[str]:
        config = load_launch_config(write(tmp_path / "l.yaml", {**FILE, **change}), {})
        return [config.on_exit_of(part) for part in ("api", "server", "environments")]

    assert exits() == ["restart", "restart", "restart"]
    assert exits(api="run-api") == ["stop", "restart", "restart"]
    assert exits(on_exit={"api": "continue", "environments": "stop"}) == ["continue", "restart", "stop"]
    content = {**FILE, "environments": {"a": {"command": "x", "on_exit": "continue"}}}
    config = load_launch_config(write(tmp_path / "l.yaml", content), {})
    assert config.environments["a"].on_exit == "continue"


def test_external_parts_are_not_started(tmp_path: Path) -> None:
    content = {**FILE, "environments": "external", "trainer_command": "external", "api_url": "http://host:8000"}
    config = load_launch_config(write(tmp_path / "l.yaml", content), {})
    assert (config.environments, config.has_trainer, config.api_url) == ({}, False, "http://host:8000")


ENVIRONMENTS = "environments"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer_arg": "x"}, "Did you mean `trainer_args`"),
        ({"prompt": []}, "Did you mean `prompts`"),
        ({"env_command": "e"}, "unknown key `env_command`"),
        ({"model_name_or_path": None}, "is None, a NoneType"),
        ({"prompts": "one"}, "`prompts` in the launch file .* is 'one', a str"),
        ({"startup_timeout_s": True}, "is True, a bool"),
        ({"vllm_args": ["--max_model_len"]}, "a list"),
        ({ENVIRONMENTS: {"a": {"comand": "x"}}}, "`environments.a` of .* `comand`.*Did you mean `command`"),
        ({ENVIRONMENTS: {"a": {"num_copies": 2}}}, "`environments.a` of .* lacks `command`"),
        ({ENVIRONMENTS: {"a": {"command": "x", "num_copies": 0}}}, "runs 0 copies"),
        ({ENVIRONMENTS: {"a": {"command": " "}}}, "of the command ' '"),
        ({ENVIRONMENTS: {"a": {"command": "x", "num_copies": True}}}, "`num_copies` .* is True, a bool"),
        ({ENVIRONMENTS: {"a": "python x.py"}}, "is 'python x.py', a str"),
        ({ENVIRONMENTS: {"vllm": {"command": "x"}}}, "cannot be the name"),
        ({ENVIRONMENTS: {"../up": {"command": "x"}}}, "cannot be the name"),
        ({ENVIRONMENTS: {}}, "nothing to train on"),
        ({ENVIRONMENTS: "python x.py"}, "`environments` in the launch file .* is 'python x.py'"),
        ({"on_exit": {"api": "ignore"}}, "`on_exit.api` in .* is 'ignore'.*Choose one of: restart, stop, continue"),
        (
            {"on_exit": {"vllm": "stop"}},
            "names the unknown part `vllm`.*All parts: api, server, gateway, environments, agents",
        ),
        ({ENVIRONMENTS: {"a": {"command": "x", "on_exit": "go"}}}, "`on_exit` of `environments.a` .* is 'go'"),
        (
            {"on_exit": {"server": "stop"}, "vllm_url": "http://h:1"},
            "`on_exit.server` in .* the launch starts no such part",
        ),
        ({"on_exit": {"gateway": "stop"}}, "`on_exit.gateway` in .* the launch starts no such part"),
        ({"gateway": False, "agents": {"a": {"command": "x"}}}, "`gateway` in .* is false, and there are `agents`: a"),
        ({"gateway": "yes"}, "`gateway` in .* is 'yes', a str"),
        ({"gateway_args": {"group_size": 4}}, "and no gateway is started"),
        ({"gateway": False, "num_servers": 2}, "`gateway` in .* is false, and there are several inference servers"),
        ({"num_servers": 0}, "`num_servers` in .* is 0"),
        ({"num_servers": 2, "vllm_port": 9001}, "`num_servers` in .* is 2, .* `vllm_port` is 9001"),
        ({"num_servers": 2, "vllm_url": "http://h:1"}, "`vllm_url` is 'http://h:1'.*with commas between them"),
        ({"vllm_url": "http://h:1, http://h:2/v1"}, "`vllm_url` in .* is 'http://h:2/v1'"),
        ({"gateway": True, "gateway_args": {"environment_key_file": "k"}}, "has `environment_key_file`"),
        ({ENVIRONMENTS: {"vllm-2": {"command": "x"}}}, "cannot be the name"),
        ({"gateway": True, "gateway_args": {"key-file": "k"}}, "`gateway_args` in .* has `key_file`"),
        ({"agents": {"first": {"command": "x"}}}, "`first` in .* is an environment and an agent"),
        ({"agents": {"gateway": {"command": "x"}}}, "`agents.gateway` of .* cannot be the name"),
        ({"agents": {"a": {"num_copies": 2}}}, "`agents.a` of .* lacks `command`"),
        ({"api": "run-api", "on_exit": {"api": "restart"}}, "`api` is run-api.*Set `api` to trl-atropos"),
        ({"max_restarts": 0}, "`max_restarts` in .* is 0"),
        ({"restart_window_s": 0}, "`restart_window_s` is 0"),
        ({"api_url": "localhost:8000"}, "must be the root of a server"),
        ({"vllm_url": "http://localhost:8001/v1"}, "must be the root of a server"),
        ({"api": "run_api"}, "Choose one of: trl-atropos, run-api, external"),
        ({"api": "external"}, "with external give `api_url`, too"),
        ({"server": "sgl"}, "`server` in .* is 'sgl'.*Choose one of: vllm, sglang"),
        (
            {"sglang_args": {"tp-size": 2}},
            "`sglang_args` in .* is given, and `server` is vllm.*set `server` to sglang",
        ),
        (
            {"server": "sglang", "vllm_args": {"a": 1}, "vllm_env": {"B": 2}},
            "`vllm_args`, `vllm_env` in .* is given, and `server` is sglang",
        ),
        ({"server": "sglang", "sglang_python": "/nowhere/python"}, "'/nowhere/python', which is no program"),
        ({ENVIRONMENTS: {"sglang": {"command": "x"}}}, "cannot be the name"),
        ({"api_port": 65536}, r"lies in 1\.\.65535"),
        (
            {
                ENVIRONMENTS: "external",
                "trainer_command": "external",
                "api_url": "http://a:1",
                "vllm_url": "http://a:2",
            },
            "nothing to launch",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_launch_file_is_refused_with_the_reason(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        load_launch_config(write(tmp_path / "l.yaml", {**FILE, **change}), {})


@pytest.mark.parametrize("key", FILE)
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    content = {name: value for name, value in FILE.items() if name != key}
    with pytest.raises(PreflightError, match=f"lacks `{key}`"):
        load_launch_config(write(tmp_path / "l.yaml", content), {})


def test_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="holds a list, not a mapping"):
        load_launch_config(write(tmp_path / "l.yaml", ["a", "list"]), {})


def test_absent_and_malformed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="cannot be read"):
        load_launch_config(tmp_path / "absent.yaml", {})
    # A date of month 13, which YAML tries to make.
    (tmp_path / "date.yaml").write_text("run_dir: 2026-13-01\n")
    with pytest.raises(PreflightError, match=r"date\.yaml cannot be read: month must be in 1\.\.12"):
        load_launch_config(tmp_path / "date.yaml", {})
    malformed = tmp_path / "l.yaml"
    malformed.write_text("run_dir: [")
    with pytest.raises(PreflightError, match="cannot be read"):
        load_launch_config(malformed, {})


def test_servers_are_bound_to_the_loopback_address() -> None:
    config = LaunchConfig(**REQUIRED)
    address = {"--host": "127.0.0.1", "--port": "1234"}
    durable = build_api_command(config, 1234)
    assert durable[:2] == ["trl-atropos", "api"]
    assert flags_of(durable) == {**address, "--db": "r/api.db"}
    of_atropos = build_api_command(LaunchConfig(**REQUIRED, api="run-api"), 1234)
    assert of_atropos[0] == "run-api"
    assert flags_of(of_atropos) == address
    flags = flags_of(build_server_command(config, 1234))
    assert (flags["--host"], flags["--port"], flags["--model"]) == ("127.0.0.1", "1234", "m")


def test_vllm_arguments_have_our_transport_and_route_unless_the_file_names_others() -> None:
    flags = flags_of(build_server_command(LaunchConfig(**REQUIRED), 1))
    assert json.loads(flags["--weight-transfer-config"]) == {"backend": "trl_atropos_shm"}
    assert flags["--middleware"] == "trl_atropos.serving.generate_endpoint.GenerateEndpoint"
    args = {"weight-transfer-config": {"backend": "nccl"}, "enforce_eager": True, "enable-log-requests": None}
    command = build_server_command(LaunchConfig(**REQUIRED, vllm_args=args), 1)
    assert json.loads(flags_of(command)["--weight-transfer-config"]) == {"backend": "nccl"}
    assert flags_of(command)["--enforce_eager"] == "True"
    assert command[-1] == "--enable-log-requests"


def test_sglang_is_started_as_it_is_by_its_own_interpreter_and_environments_are_told(tmp_path: Path) -> None:
    args = {"tp-size": 2, "disable-overlap-schedule": None, "json-model-override-args": {"a": 1}}
    content = {
        **FILE,
        "server": "sglang",
        "sglang_python": sys.executable,
        "sglang_args": args,
        "sglang_env": {"N": 1},
    }
    config = load_launch_config(write(tmp_path / "l.yaml", content), {})
    command = build_server_command(config, 1234)
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert flags_of(command) == {
        "--model-path": "m",
        "--host": "127.0.0.1",
        "--port": "1234",
        "--tp-size": "2",
        "--disable-overlap-schedule": "--json-model-override-args",
        "--json-model-override-args": '{"a": 1}',
    }
    assert config.server_env == {"N": "1"}
    assert flags_of(build_env_command(config, ENVIRONMENT, API, VLLM))["--openai.server_type"] == "sglang"
    # Installed beside the trainer.
    beside = LaunchConfig(**REQUIRED, server="sglang")
    assert build_server_command(beside, 1)[0] == sys.executable


def test_a_gateway_is_started_where_there_are_agents_with_what_it_shares_with_the_trainer(tmp_path: Path) -> None:
    content = {name: value for name, value in FILE.items() if name != "environments"}
    content |= {"agents": {"a": {"command": "x"}}, "trainer_args": "--temperature 0.7 --scale_rewards none"}
    config = load_launch_config(write(tmp_path / "l.yaml", content), {})
    assert config.has_gateway and config.environments == {} and not LaunchConfig(**REQUIRED).has_gateway
    command = build_gateway_command(config, 1234, API, VLLM)
    assert command[:2] == ["trl-atropos", "gateway"]
    assert flags_of(command) == {
        **{"--servers": VLLM, "--api_url": API, "--host": "127.0.0.1", "--port": "1234", "--scale_rewards": "none"},
        **{"--key_file": "r/gateway.key", "--environment_key_file": "r/environment.key", "--temperature": "0.7"},
    }
    assert agent_env(config, "http://g", "k") == {
        **{"TRL_ATROPOS_GATEWAY_URL": "http://g", "TRL_ATROPOS_GATEWAY_KEY": "k"},
        "TRL_ATROPOS_GROUP_SIZE": "8",
    }
    content |= {"trainer_args": "--max_length 64", "gateway_args": {"group-size": 2, "temperature": 1.5}}
    config = load_launch_config(write(tmp_path / "l.yaml", content), {})
    flags = flags_of(build_gateway_command(config, 1234, API, VLLM))
    assert (flags["--max_rollout_tokens"], flags["--group_size"], flags["--temperature"]) == ("64", "2", "1.5")
    assert agent_env(config, "http://g", "k")["TRL_ATROPOS_GROUP_SIZE"] == "2"


@pytest.mark.parametrize("change", [{"agents": {"a": {"command": "x"}}}, {"gateway": True}], ids=str)
def test_a_gateway_of_agents_refuses_to_scale_by_a_batch_that_it_does_not_see(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    content = {**FILE, **change, "trainer_args": "--scale_rewards batch"}
    config = load_launch_config(write(tmp_path / "l.yaml", content), {})
    with pytest.raises(
        PreflightError, match=r"--scale_rewards batch.* `scale_rewards: group` or `none` in `gateway_args`"
    ):
        build_gateway_command(config, 1234, API, VLLM)
    # Before anything is started.
    with pytest.raises(PreflightError, match="--scale_rewards batch"):
        run_launch(config)
    content["gateway_args"] = {"scale-rewards": "group"}
    config = load_launch_config(write(tmp_path / "l.yaml", content), {})
    assert flags_of(build_gateway_command(config, 1234, API, VLLM))["--scale_rewards"] == "group"


def test_a_gateway_of_environments_alone_scales_nothing(tmp_path: Path) -> None:
    content = {**FILE, "num_servers": 2, "trainer_args": "--scale_rewards batch"}
    config = load_launch_config(write(tmp_path / "l.yaml", content), {})
    assert config.has_gateway
    assert "--scale_rewards" not in flags_of(build_gateway_command(config, 1234, API, VLLM))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_servers": 2}, ["vllm-1", "vllm-2"]),
        ({"vllm_url": "http://a:1, http://b:2"}, ["vllm-1", "vllm-2"]),
        ({}, ["vllm"]),
    ],
)
def test_a_gateway_is_started_where_there_are_several_servers(
    tmp_path: Path, change: dict[str, Any], names: list[str]
) -> None:
    config = load_launch_config(write(tmp_path / "l.yaml", {**FILE, **change}), {})
    assert (config.has_gateway, config.server_names) == (len(names) > 1, names)
    assert not load_launch_config(
        write(tmp_path / "l.yaml", {**FILE, ENVIRONMENTS: "external", **change, "gateway": False}), {}
    ).has_gateway


def test_an_environment_gets_the_key_of_the_gateway_and_no_other_server_does() -> None:
    config = LaunchConfig(**REQUIRED)
    flags = flags_of(build_env_command(config, ENVIRONMENT, API, "http://g", "secret"))
    assert (flags["--openai.base_url"], flags["--openai.api_key"]) == ("http://g/v1", "secret")
    for given in ("--openai.base_url U", "--openai.base_url=U", "--openai.api_key own"):
        command = build_env_command(config, EnvironmentConfig(f"python e.py serve {given}"), API, "http://g", "secret")
        assert "secret" not in command


def test_an_agent_in_an_environment_is_told_what_a_gateway_shares_with_the_trainer(tmp_path: Path) -> None:
    # An environment may work in another directory.
    counts = {"TRL_ATROPOS_GATEWAY_COUNTS": str(Path.cwd() / "r" / "gateway_counts")}
    assert environment_env(LaunchConfig(**REQUIRED)) == counts
    told = {**counts, "TRL_ATROPOS_TEMPERATURE": "0.7", "TRL_ATROPOS_SCALE_REWARDS": "none"}
    assert environment_env(LaunchConfig(**REQUIRED, trainer_args="--temperature 0.7 --scale_rewards none")) == told
    # As TRL says it.
    path = write(tmp_path / "trainer.yaml", {"temperature": 0.7, "scale_rewards": False})
    of_file = {**REQUIRED, "trainer_command": f"train --config {path}"}
    assert environment_env(LaunchConfig(**of_file)) == told
    assert environment_env(LaunchConfig(**{**REQUIRED, "trainer_command": "external"})) == counts


def test_environments_of_a_launch_with_vllm_ask_vllm() -> None:
    assert (
        flags_of(build_env_command(LaunchConfig(**REQUIRED), ENVIRONMENT, API, VLLM))["--openai.server_type"] == "vllm"
    )


def test_environment_gets_addresses_and_model_but_keeps_the_flags_of_the_user() -> None:
    environment = EnvironmentConfig("python e.py serve --env.total_steps 7 --openai.base_url=U")
    command = build_env_command(LaunchConfig(**REQUIRED), environment, API, VLLM)
    assert command[:3] == ["python", "e.py", "serve"]
    flags = flags_of(command)
    assert flags["--env.rollout_server_url"] == API
    assert flags["--env.tokenizer_name"] == flags["--openai.model_name"] == flags["--openai.tokenizer_name"] == "m"
    assert flags["--env.total_steps"] == "7"
    assert [part for part in command if part.startswith("--openai.base_url")] == ["--openai.base_url=U"]


def test_trainer_arguments_of_the_user_are_split_like_a_shell_does() -> None:
    config = LaunchConfig(**REQUIRED, trainer_args="--use_peft --output_dir o --model_init_kwargs '{\"a\": 1}'")
    command = build_trainer_command(config, API, VLLM)
    assert command[:6] == ["train", "--use_peft", "--output_dir", "o", "--model_init_kwargs", '{"a": 1}']
    assert flags_of(command[6:]) == {
        "--model_name_or_path": "m",
        "--atropos_api_url": API,
        "--vllm_server_base_url": VLLM,
    }


def test_value_of_a_flag_is_found_in_every_spelling_and_the_last_one_wins() -> None:
    command = ["a", "--x", "1", "--y=2", "--x=3", "--z", "--x", "4", "--last"]
    assert [flag_value(command, flag) for flag in ("--x", "--y", "--z", "--last", "--w")] == [
        "4",
        "2",
        "true",
        "true",
        None,
    ]


def test_option_of_the_trainer_is_read_from_its_arguments_and_then_its_file(tmp_path: Path) -> None:
    options = write(tmp_path / "t.yaml", {"max_length": 128, "max_steps": 5})
    config = LaunchConfig(**{**REQUIRED, "trainer_command": f"train --config {options}"}, trainer_args="--max_steps 7")
    assert [trainer_option(config, name) for name in ("max_length", "max_steps", "seed")] == [128, "7", None]
    absent = LaunchConfig(**{**REQUIRED, "trainer_command": f"train --config {tmp_path / 'absent.yaml'}"})
    with pytest.raises(PreflightError, match=r"absent\.yaml of the trainer's --config cannot be read"):
        trainer_option(absent, "max_length")


def test_second_launch_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    config = LaunchConfig(**{**REQUIRED, "run_dir": str(tmp_path)})
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PreflightError, match="Another launch is using"):
            run_launch(config)
    assert not (tmp_path / "logs").exists()


def test_command_line_shows_an_error_in_one_line_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "-c", str(tmp_path / "absent.yaml"), "--", "python", "env.py", "serve"]) == 1
    assert "PreflightError: The launch file" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["torch", "vllm", "transformers", "requests", "rich"])
def test_importing_the_command_line_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, trl_atropos.cli.main; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
