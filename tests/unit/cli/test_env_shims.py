"""The shims of `trl-atropos env`, each with and without, on the real atroposlib and transformers; and the command itself."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs import base
from openai import OpenAIError
from tiny_models import byte_tokenizer
from transformers import BatchEncoding

import trl_atropos
from trl_atropos.cli.env_shims import SHIMS, select_shims


pytestmark = pytest.mark.usefixtures("undone")

Run = Callable[..., "str | int | None"]
DOCS = Path(trl_atropos.__file__).parent.parent / "docs" / "environments.md"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
BASE_URL = "http://127.0.0.1:19999/v1"
UPSTREAM_URLS = [f"http://localhost:{port}/v1" for port in (9004, 9005, 9006, 9007)]
# No hub has a name with three parts, so that looking for it fails without a network.
ALIAS = "no/such/model"
# Same shapes as gsm8k_server.py: a bare server configuration, W&B on. It says what it was given, and serves nothing.
ENVIRONMENT = f"""
import json

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig


class ShapeEnv(BaseEnv):
    name = "shape"

    @classmethod
    def config_init(cls):
        server = APIServerConfig(model_name="{ALIAS}", base_url="http://localhost:9001/v1", server_type="vllm")
        return BaseEnvConfig(use_wandb=True), server

    async def setup(self):
        pass

    async def get_next_item(self):
        return None

    async def env_manager(self):
        told = {{
            "urls": [server.config.base_url for server in self.server.servers],
            "tokenizers": {{server.config.tokenizer_name for server in self.server.servers}},
            "use_wandb": self.config.use_wandb,
            "wandb_name": self.config.wandb_name,
        }}
        print("TOLD", json.dumps(told, default=sorted))

    process_manager = env_manager

    async def evaluate(self):
        await self.env_manager()


class ManagedEnv(ShapeEnv):
    async def env_manager(self):
        try:
            async with self.server.managed_server(tokenizer=self.tokenizer):
                pass
        except Exception as exc:
            print("SWALLOWED", type(exc).__name__)


if __name__ == "__main__":
    import sys

    (ManagedEnv if "openai" in sys.argv else ShapeEnv).cli()
"""


@pytest.fixture
def told(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs the environment above and returns what it was given."""
    tokenizer = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(tokenizer)
    program = tmp_path / "shape.py"
    program.write_text(ENVIRONMENT)

    def run_environment(
        *options: str,
        command: str = "serve",
        without: str | None = None,
        overrides: tuple[str, ...] = ("--openai.base_url", BASE_URL),
    ) -> dict[str, Any]:
        shims = ["--no-shim", without] if without else []
        given = ["--env.tokenizer_name", str(tokenizer), *overrides, *options]
        if command == "process":
            given += ["--env.data_path_to_save_groups", str(tmp_path / "groups.jsonl")]
        code = run(*shims, str(program), command, *given)
        output = capsys.readouterr().out
        lines = [line.removeprefix("TOLD ") for line in output.splitlines() if line.startswith("TOLD ")]
        return (json.loads(lines[0]) if lines else {}) | {"code": code, "tokenizer": str(tokenizer), "out": output}

    return run_environment


@pytest.mark.parametrize("command", ["serve", "process", "evaluate"])
def test_settings_of_an_upstream_file_are_those_of_the_command_line(told, command):
    given = told(command=command)
    assert given["code"] == 0
    assert given["urls"] == [BASE_URL]
    assert given["use_wandb"] is False
    assert given["wandb_name"] == "shape"
    assert given["tokenizers"] == [given["tokenizer"]]


@pytest.mark.parametrize(
    ("without", "key", "value"),
    [("server_list", "urls", UPSTREAM_URLS), ("wandb", "use_wandb", True), ("wandb_name", "wandb_name", None)],
)
def test_without_its_shim_an_upstream_file_goes_wrong(told, without, key, value):
    assert told(without=without)[key] == value


def test_without_its_shim_the_tokenizer_is_looked_for_under_the_models_name(told):
    with pytest.raises(OSError, match=ALIAS):
        told(without="tokenizer_name")


def test_without_its_shim_an_empty_key_is_refused(told):
    with pytest.raises(OpenAIError, match="credentials"):
        told(without="api_key")


def test_a_tokenizer_that_was_named_stays(told, tmp_path):
    other = tmp_path / "other"
    byte_tokenizer().save_pretrained(other)
    assert told("--openai.tokenizer_name", str(other))["tokenizers"] == [str(other)]


@pytest.mark.parametrize("command", ["serve", "process", "evaluate"])
def test_wandb_is_on_for_who_asks_for_it(told, command):
    assert told("--env.use_wandb", "true", command=command)["use_wandb"] is True


def test_yaml_counts_like_the_command_line(told, tmp_path):
    path = tmp_path / "env.yaml"
    path.write_text("env:\n  use_wandb: true\n  wandb_name: mine\n")
    given = told("--config", str(path))
    assert (given["use_wandb"], given["wandb_name"]) == (True, "mine")


def test_several_servers_of_a_yaml_file_stay(told, tmp_path):
    path = tmp_path / "env.yaml"
    urls = ["http://127.0.0.1:19001/v1", "http://127.0.0.1:19002/v1"]
    servers = [f"  - {{base_url: '{url}', api_key: x, model_name: m}}\n" for url in urls]
    path.write_text("openai:\n" + "".join(servers))
    assert told("--config", str(path), overrides=())["urls"] == urls


def test_in_a_slurm_job_a_placeholder_url_does_not_replace_the_jobs_nodes(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-4]")
    for shim in select_shims():
        shim.install()
    server = base.APIServerConfig(base_url="http://localhost:9001/v1")
    arguments = {"yaml_config": {}, "logger": logging.getLogger(__name__)}
    resolved = base.resolve_openai_configs(
        default_server_configs=server, openai_config_dict=server.model_dump(), cli_passed_flags={}, **arguments
    )
    assert not isinstance(resolved, list)
    flags = {"openai.base_url": server.base_url}
    resolved = base.resolve_openai_configs(
        default_server_configs=server, openai_config_dict=server.model_dump(), cli_passed_flags=flags, **arguments
    )
    assert [config.base_url for config in resolved] == [server.base_url]


def test_a_server_without_tokens_ends_the_environment_with_the_flag(told):
    code = told("--openai.server_type", "openai")["code"]
    assert isinstance(code, str)
    assert "--openai.server_type vllm" in code


def test_without_its_shim_a_server_without_tokens_is_only_a_line_in_the_log(told):
    given = told("--openai.server_type", "openai", without="server_type")
    assert given["code"] == 0
    assert "SWALLOWED NotImplementedError" in given["out"]


def chat(**options: object) -> Any:
    messages = [{"role": "user", "content": "hi"}]
    return byte_tokenizer().apply_chat_template(messages, chat_template=TEMPLATE, **options)


def test_a_chat_template_gives_token_ids_again(caplog):
    ids = byte_tokenizer().encode("hi")
    # What transformers 5 does by itself; without this the shim has no reason to be.
    assert isinstance(chat(), BatchEncoding)
    (shim,) = [shim for shim in select_shims() if shim.name == "return_dict"]
    shim.install()
    with caplog.at_level(logging.INFO, logger="trl_atropos.cli.env_shims"):
        assert chat() == chat() == ids
    assert [record.message.partition(":")[0] for record in caplog.records] == ["shim return_dict"]
    assert isinstance(chat(return_dict=True), BatchEncoding)
    assert chat(tokenize=False) == "hi"


def test_an_unknown_shim_is_refused_with_the_nearest(run, capsys):
    assert run("--no-shim", "retrun_dict", "env.py", "serve") == 1
    assert "Did you mean `return_dict`?" in capsys.readouterr().err


def test_all_shims_are_listed_by_the_command_and_in_the_documentation(run, capsys):
    assert run("--list-shims") == 0
    listed = capsys.readouterr().out
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", DOCS.read_text(), re.MULTILINE)
    assert rows == [(shim.name, shim.why, shim.upstream) for shim in SHIMS]
    assert all(text in listed for row in rows for text in row)


def test_arguments_arrive_untouched_and_the_exit_code_is_the_files(run, tmp_path, capsys):
    program = tmp_path / "env.py"
    (tmp_path / "beside.py").write_text("CODE = 7\n")
    program.write_text("import sys\nimport beside\nprint(__name__, sys.argv)\nsys.exit(beside.CODE)\n")
    arguments = ["serve", "--env.x", "1", "--help", "--no-shim", "wandb", "--", "-x"]
    assert run(str(program), *arguments) == 7
    assert capsys.readouterr().out == f"__main__ {[str(program), *arguments]}\n"


@pytest.mark.parametrize(
    ("module", "fix"),
    [("sklearn.metrics", "pip install scikit-learn."), ("math_verify", "pip install math-verify.")],
)
def test_a_missing_module_is_named_with_its_package(run, tmp_path, capsys, module, fix):
    program = tmp_path / "env.py"
    program.write_text(f"raise ModuleNotFoundError(name={module!r})\n")
    assert run(str(program), "serve") == 1
    error = capsys.readouterr().err
    assert f"imports {module}" in error
    assert fix in error


def test_a_module_of_the_files_own_repository_is_found_above_it(run, tmp_path, capsys):
    directory = tmp_path / "environments_of_mine" / "games"
    directory.mkdir(parents=True)
    (directory / "env.py").write_text("import environments_of_mine.games.rules\n")
    assert run(str(directory / "env.py"), "serve") == 1
    assert f"Run it with PYTHONPATH={tmp_path}." in capsys.readouterr().err


def test_a_module_of_another_version_of_a_package_is_said_to_be_one(run, tmp_path, capsys):
    (tmp_path / "env.py").write_text("import atroposlib.envs.of_another_version\n")
    assert run(str(tmp_path / "env.py"), "serve") == 1
    error = capsys.readouterr().err
    assert "atroposlib.envs.of_another_version, which the installed atroposlib does not have" in error
    assert "pip install" not in error


def test_without_atroposlib_the_command_says_what_to_install(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "env.py").write_text("")
    monkeypatch.setitem(sys.modules, "atroposlib.envs.base", None)
    assert run(str(tmp_path / "env.py"), "serve") == 1
    assert "pip install 'trl-atropos[atropos]'" in capsys.readouterr().err


def test_a_file_that_is_not_there(run, capsys):
    assert run("nowhere.py", "serve") == 1
    assert "There is no file nowhere.py." in capsys.readouterr().err
    assert run() == 2
