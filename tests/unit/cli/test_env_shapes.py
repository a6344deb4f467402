"""Shims for shapes of upstream's files: a small file of each shape, with and without its shim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import byte_tokenizer


pytestmark = pytest.mark.usefixtures("undone")

BASE_URL = "http://127.0.0.1:19999/v1"
HEAD = """
import json

from atroposlib.envs.base import APIServerConfig, BaseEnv, BaseEnvConfig


class TellEnv(BaseEnv):
    name = "tell"

    async def setup(self):
        pass

    async def get_next_item(self):
        return None

    async def evaluate(self):
        pass

    async def env_manager(self):
        servers = [server.config for server in self.server.servers]
        print("TOLD", json.dumps({
            "urls": [str(server.base_url) for server in servers],
            "keys": [server.api_key for server in servers],
            "config": type(self.config).__name__,
            **({"level": self.config.level} if hasattr(self.config, "level") else {}),
        }))

    process_manager = env_manager
"""
SERVER = 'APIServerConfig(model_name="m", base_url="http://localhost:{port}/v1", server_type="vllm"{key})'
ONE = "[" + SERVER.format(port=9001, key=', api_key="x"') + "]"
SEVERAL = (
    HEAD
    + f"""
    @classmethod
    def config_init(cls):
        return BaseEnvConfig(), [{", ".join(SERVER.format(port=port, key=', api_key="x"') for port in (9001, 9002))}]

TellEnv.cli()
"""
)
OWN_CONFIG = (
    HEAD
    + f"""
    @classmethod
    def config_init(cls):
        return OwnConfig(level=1), {ONE}

class OwnConfig(BaseEnvConfig):
    level: int = 0

TellEnv.cli()
"""
)
NO_KEY = (
    HEAD
    + f"""
    @classmethod
    def config_init(cls):
        return BaseEnvConfig(), [{SERVER.format(port=9001, key="")}]

TellEnv.cli()
"""
)
IN_SIGNATURE = (
    HEAD.replace(
        "class TellEnv(BaseEnv):",
        """class OwnConfig(BaseEnvConfig):
    level: int


class TellEnv(BaseEnv):
    def __init__(self, config: OwnConfig, server_configs, slurm=True, testing=False):
        super().__init__(config, server_configs, slurm, testing)
""",
    )
    + """
TellEnv.cli()
"""
)
NO_CLI = HEAD
ONE_A_ROLLOUT = (
    HEAD.replace(
        "async def env_manager",
        """async def env_manager(self):
        async def post(session, url, payload, **_):
            print("TOLD", json.dumps({"advantages": payload["advantages"]}))

        self._send_scored_data_to_api = lambda group: post(None, None, group)
        group = {"tokens": [[1, 2, 3]], "masks": [[-100, 2, 3]], "scores": [1], "advantages": [1]}
        await self.handle_send_to_api(group, None)

    async def unused""",
    ).replace("process_manager = env_manager", "")
    + f"""
    @classmethod
    def config_init(cls):
        config = BaseEnvConfig(group_size=1, ensure_scores_are_not_same=False, max_token_length=99)
        return config, {ONE}

TellEnv.cli()
"""
)
UNSCORED = ONE_A_ROLLOUT[: ONE_A_ROLLOUT.index("        async def post")] + (
    """        async def post(group):
            print("TOLD", json.dumps({"scores": group["scores"]}))

        self._send_scored_data_to_api = post
        self.running_items["id"] = {"item": 1}
        await self.handle_env("id")

    async def collect_trajectories(self, item):
        return [("question", "right"), ("question", "wrong")], []

    async def score(self, trajectories):
        scores = [float(answer == "right") for _, answer in trajectories]
        return {"tokens": [[1, 2]] * 2, "masks": [[-100, 2]] * 2, "scores": scores}
"""
    + ONE_A_ROLLOUT[ONE_A_ROLLOUT.index("\n    @classmethod") :].replace("group_size=1", "group_size=2")
)
OLD_NAME = (
    HEAD
    + """
    @classmethod
    def config_init(cls):
        from atroposlib.envs.base import OpenaiConfig

        return BaseEnvConfig(), [OpenaiConfig(model_name="m", base_url="http://localhost:9001/v1", api_key="x")]

TellEnv.cli()
"""
)
RELATIVE = (
    HEAD
    + f"""

from .rules import LEVEL


class RuledEnv(TellEnv):
    @classmethod
    def config_init(cls):
        return BaseEnvConfig(group_size=LEVEL), {ONE}

if __name__ == "__main__":
    RuledEnv.cli()
"""
)


@pytest.fixture
def told(tmp_path, run, capsys):
    """Runs a file and returns its exit code, what it was given, and the lines of shims."""
    tokenizer = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(tokenizer)
    (tmp_path / "rules.py").write_text("LEVEL = 3\n")

    def run_file(program: str, *options: str, without: str | None = None, command: str = "serve") -> dict[str, Any]:
        path = Path(tmp_path / "env.py")
        path.write_text(program)
        given = ["--env.tokenizer_name", str(tokenizer), *options]
        if command == "process":
            given += ["--env.data_path_to_save_groups", str(tmp_path / "groups.jsonl")]
        code = run(*(["--no-shim", without] if without else []), str(path), command, *given)
        lines = [
            line.removeprefix("TOLD ") for line in capsys.readouterr().out.splitlines() if line.startswith("TOLD ")
        ]
        return {"code": code, **(json.loads(lines[0]) if lines else {})}

    return run_file


@pytest.fixture
def acted(caplog):
    """Names of the shims that said that they acted."""
    caplog.set_level("INFO", logger="trl_atropos.cli.env_shims")
    return lambda: [record.getMessage().split(":")[0] for record in caplog.records if "shim " in record.getMessage()]


@pytest.mark.parametrize("command", ["serve", "process"])
def test_of_several_default_servers_the_first_is_the_one_that_was_named(told, acted, command):
    assert told(SEVERAL, "--openai.base_url", BASE_URL, command=command)["urls"] == [BASE_URL]
    assert "shim one_server" in acted()


def test_several_default_servers_stay_when_none_is_named(told, acted):
    assert told(SEVERAL)["urls"] == [f"http://localhost:{port}/v1" for port in (9001, 9002)]
    assert "shim one_server" not in acted()


def test_without_its_shim_the_named_server_is_not_asked(told):
    given = told(SEVERAL, "--openai.base_url", BASE_URL, without="one_server")
    assert given.get("urls") != [BASE_URL]


def test_an_own_configuration_needs_no_shim(told):
    # The file does not set `env_config_cls`; Atropos takes the class of what `config_init` returns.
    given = told(OWN_CONFIG, "--env.level", "7")
    assert (given["config"], given["level"]) == ("OwnConfig", 7)


@pytest.mark.parametrize("command", ["serve", "process"])
def test_the_configuration_of_the_signature_is_the_one_of_the_command_line(told, acted, command):
    given = told(IN_SIGNATURE, "--openai.base_url", BASE_URL, "--env.level", "7", command=command)
    assert (given["config"], given["level"], given["urls"]) == ("OwnConfig", 7, [BASE_URL])
    assert "shim env_config_cls" in acted()


def test_without_its_shim_the_options_of_the_signature_are_refused(told):
    assert told(IN_SIGNATURE, "--env.level", "7", without="env_config_cls")["code"] == 2


def test_one_advantage_a_rollout_counts_for_each_of_its_tokens(told, acted):
    assert told(ONE_A_ROLLOUT)["advantages"] == [[1.0, 1.0, 1.0]]
    assert "shim advantages" in acted()


def test_without_its_shim_one_advantage_a_rollout_is_sent(told):
    assert told(ONE_A_ROLLOUT, without="advantages")["advantages"] == [1]


def test_trajectories_that_nobody_scored_are_scored(told, acted):
    assert told(UNSCORED)["scores"] == [1.0, 0.0]
    assert "shim score" in acted()


def test_trajectories_with_a_backlog_are_scored_too(told):
    with_backlog = UNSCORED.replace(
        "    async def score",
        "    async def postprocess_histories(self, found):\n        return found, []\n\n    async def score",
    )
    assert told(with_backlog)["scores"] == [1.0, 0.0]


def test_without_its_shim_nothing_is_sent(told, caplog):
    assert told(UNSCORED, without="score") == {"code": 0}
    # And it is said why.
    assert "handle_send_to_api failed" in caplog.text


def test_a_group_that_is_scored_is_left_alone(told, acted):
    scored = UNSCORED.replace(
        'return [("question", "right"), ("question", "wrong")], []',
        'return await self.score([("question", "right"), ("question", "wrong")]), []',
    )
    assert told(scored)["scores"] == [1.0, 0.0]
    assert "shim score" not in acted()


def test_a_file_that_never_starts_its_environment_is_told_so(told, caplog):
    assert told(NO_CLI) == {"code": 0}
    assert "made no environment" in caplog.text
    assert "cli()" in caplog.text


def test_the_key_of_the_variable_is_the_servers(told, acted, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert told(NO_KEY, "--openai.base_url", BASE_URL)["keys"] == ["secret"]
    assert "shim api_key" in acted()


def test_the_key_is_not_logged(told, caplog, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    caplog.set_level("INFO", logger="trl_atropos")
    told(NO_KEY, "--openai.base_url", BASE_URL)
    assert "OPENAI_API_KEY" in caplog.text
    assert "secret" not in caplog.text


def test_the_old_name_of_a_servers_configuration_is_found(told, acted):
    assert told(OLD_NAME)["urls"] == ["http://localhost:9001/v1"]
    assert "shim openai_config" in acted()


def test_without_its_shim_the_old_name_is_an_import_error(told):
    with pytest.raises(ImportError, match="OpenaiConfig"):
        told(OLD_NAME, without="openai_config")


def test_a_file_with_relative_imports_is_a_part_of_its_directory(told, acted):
    assert told(RELATIVE)["code"] == 0
    assert "shim relative_import" in acted()


def test_without_its_shim_a_relative_import_fails(told):
    with pytest.raises(ImportError, match="relative import"):
        told(RELATIVE, without="relative_import")


def test_a_file_that_does_without_its_relative_import_is_left_alone(told, acted):
    guarded = RELATIVE.replace(
        "from .rules import LEVEL",
        "try:\n    from .rules import LEVEL\nexcept ImportError:\n    from rules import LEVEL",
    )
    assert told(guarded)["code"] == 0
    assert "shim relative_import" not in acted()
