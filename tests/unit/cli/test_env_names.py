"""`trl-atropos env ECOSYSTEM:NAME` and `env list`: what is passed on, and what ends at once with a sentence."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from tiny_models import byte_tokenizer

from trl_atropos.envs.ecosystems import ECOSYSTEMS
from trl_atropos.envs.environment import SourceEnv


pytestmark = pytest.mark.usefixtures("undone")


@pytest.fixture
def told(run, tmp_path, monkeypatch, capsys):
    """Runs `trl-atropos env ARGUMENTS` to where the environment would begin, and returns what it was given."""
    tokenizer = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(tokenizer)

    async def tell(env):
        task = env.source.open(env.source.make_task(0)).messages[0]["content"]
        print("TOLD", json.dumps({"task": task, "name": env.config.wandb_name, **env.config.model_dump(mode="json")}))

    for name in ("env_manager", "process_manager"):
        monkeypatch.setattr(SourceEnv, name, tell)

    def run_environment(*arguments: str):
        code = run(
            *arguments, "--env.tokenizer_name", str(tokenizer), "--env.data_path_to_save_groups", str(tmp_path / "g")
        )
        captured = capsys.readouterr()
        lines = [line.removeprefix("TOLD ") for line in captured.out.splitlines() if line.startswith("TOLD ")]
        return {"code": code, "err": captured.err, **(json.loads(lines[0]) if lines else {})}

    return run_environment


@pytest.mark.parametrize("command", ["serve", "process"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_name_is_an_environment_with_the_options_of_every_other(told, command, joined):
    options = '{"min_terms": 5, "max_terms": 5}'
    args = [f"--args={options}"] if joined else ["--args", options]
    given = told("reasoning-gym:chain_sum", *args, command, "--env.group_size", "3", "--env.max_turn_tokens", "9")
    assert given["code"] == 0
    assert given["name"] == "reasoning-gym:chain_sum"
    assert (given["group_size"], given["max_turn_tokens"], given["use_wandb"]) == (3, 9, False)
    assert given["task"].count(" + ") + given["task"].count(" - ") == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reasoning-gym:chain_som", "serve"], "Did you mean `chain_sum`?"),
        (["nemo-gym:x", "serve"], "There is no ecosystem 'nemo-gym'."),
        (["reasoning-gym:chain_sum", "--args", "{", "serve"], "is no JSON"),
        (["reasoning-gym:chain_sum", "--args", "[1]", "serve"], "is no JSON object"),
        (["reasoning-gym:chain_sum", "--args"], "is no JSON"),
        (["list", "textarenas"], "Did you mean `textarena`?"),
    ],
)
def test_what_cannot_be_run_ends_at_once(run, capsys, arguments, said):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Loading" not in error


def test_ecosystems_are_listed_with_what_installs_them(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    monkeypatch.setattr(type(ECOSYSTEMS["textarena"]), "is_installed", property(lambda row: row.name != "textarena"))
    assert run("list") == 0
    listed = capsys.readouterr().out
    assert "reasoning-gym   procedural tasks" in listed
    assert "not installed: pip install 'trl-atropos[textarena]'" in listed
    assert listed.count("not installed") == 1


def test_the_names_of_an_ecosystem_are_listed_as_they_are_typed(run, capsys):
    assert run("list", "reasoning-gym") == 0
    names = capsys.readouterr().out.splitlines()
    assert "reasoning-gym:chain_sum" in names
    assert len(names) == len(ECOSYSTEMS["reasoning-gym"].task_names())
    assert run("list", "a", "b") == 2


def test_the_status_that_atropos_logs_ten_times_a_second_is_not_shown(told, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    async def log(env):
        atropos = logging.getLogger("atroposlib.envs.base")
        atropos.info("env_manager: Status dict: {}")
        atropos.warning("Batch size not set by config or server!")
        logging.getLogger("trl_atropos.envs").info("Registered.")

    monkeypatch.setattr(SourceEnv, "process_manager", log)
    error = told("reasoning-gym:chain_sum", "process")["err"]
    assert "Status dict" not in error
    assert "Batch size not set" in error and "Registered." in error
