"""The launch file is read strictly, and the command lines follow from it."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_atropos.cli.launch import run_launch
from trl_atropos.cli.launch_config import (
    LaunchConfig,
    build_api_command,
    build_env_command,
    build_trainer_command,
    build_vllm_command,
    load_launch_config,
)
from trl_atropos.cli.main import main
from trl_atropos.errors import PreflightError


ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {"model_name_or_path": "m", "run_dir": "r", "env_command": "env serve", "trainer_command": "train"}
API, VLLM = "http://127.0.0.1:1", "http://127.0.0.1:2"


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def flags_of(command: list[str]) -> dict[str, str]:
    return {command[i]: command[i + 1] for i in range(len(command) - 1) if command[i].startswith("--")}


def test_shipped_launch_file_loads_and_names_files_that_exist() -> None:
    config = load_launch_config(ROOT / "examples" / "configs" / "quickstart_launch.yaml", {})
    assert config.vllm_env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert (ROOT / config.env_command.split()[1]).is_file()
    assert all((ROOT / part).is_file() for part in config.trainer_command.split() if part.startswith("examples/"))


def test_every_key_of_the_shipped_launch_file_has_a_comment() -> None:
    lines = (ROOT / "examples" / "configs" / "quickstart_launch.yaml").read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if line and line[0].isalpha()]
    assert len(keys) == 12
    assert all(lines[i - 1].startswith("#") for i in keys)


def test_command_line_overrides_the_file_and_none_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "l.yaml", REQUIRED)
    config = load_launch_config(path, {"run_dir": "other", "trainer_args": None, "env_command": None})
    assert (config.run_dir, config.trainer_args, config.env_command) == ("other", "", "env serve")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**REQUIRED, "trainer_arg": "x"}, "Did you mean `trainer_args`"),
        ({**REQUIRED, "prompt": []}, "Did you mean `prompts`"),
        ({"run_dir": "r", "env_command": "e", "trainer_command": "t"}, "lacks `model_name_or_path`"),
        ({**REQUIRED, "prompts": "one"}, "`prompts` in the launch file .* is 'one', a str"),
        ({**REQUIRED, "startup_timeout_s": True}, "is True, a bool"),
        ({**REQUIRED, "vllm_args": ["--max_model_len"]}, "a list"),
        (["a", "list"], "holds a list, not a mapping"),
    ],
    ids=["misspelled", "singular", "missing", "str for list", "bool for float", "list for mapping", "not a mapping"],
)
def test_bad_launch_file_is_refused_with_the_reason(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        load_launch_config(write(tmp_path / "l.yaml", content), {})


def test_absent_and_malformed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="cannot be read"):
        load_launch_config(tmp_path / "absent.yaml", {})
    malformed = tmp_path / "l.yaml"
    malformed.write_text("run_dir: [")
    with pytest.raises(PreflightError, match="cannot be read"):
        load_launch_config(malformed, {})


def test_servers_are_bound_to_the_loopback_address() -> None:
    config = LaunchConfig(**REQUIRED)
    assert flags_of(build_api_command(1234)) == {"--host": "127.0.0.1", "--port": "1234"}
    flags = flags_of(build_vllm_command(config, 1234))
    assert (flags["--host"], flags["--port"], flags["--model"]) == ("127.0.0.1", "1234", "m")


def test_vllm_arguments_have_our_transport_and_route_unless_the_file_names_others() -> None:
    flags = flags_of(build_vllm_command(LaunchConfig(**REQUIRED), 1))
    assert json.loads(flags["--weight-transfer-config"]) == {"backend": "trl_atropos_shm"}
    assert flags["--middleware"] == "trl_atropos.serving.generate_endpoint.GenerateEndpoint"
    args = {"weight-transfer-config": {"backend": "nccl"}, "enforce_eager": True, "enable-log-requests": None}
    command = build_vllm_command(LaunchConfig(**REQUIRED, vllm_args=args), 1)
    assert json.loads(flags_of(command)["--weight-transfer-config"]) == {"backend": "nccl"}
    assert flags_of(command)["--enforce_eager"] == "True"
    assert command[-1] == "--enable-log-requests"


def test_environment_gets_addresses_and_model_but_keeps_the_flags_of_the_user() -> None:
    config = LaunchConfig(**{**REQUIRED, "env_command": "python e.py serve --env.total_steps 7 --openai.base_url=U"})
    command = build_env_command(config, API, VLLM)
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


@pytest.mark.parametrize("module", ["torch", "vllm", "transformers", "requests"])
def test_importing_the_command_line_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, trl_atropos.cli.main; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
