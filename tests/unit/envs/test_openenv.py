"""A server that speaks OpenEnv's protocol: started from its directory, asked for sessions, and ended with the environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from trl_atropos.envs.ecosystems import open_source
from trl_atropos.errors import EpisodeError, PreflightError


STANDIN = Path(__file__).parents[2] / "openenv_standin"


@pytest.fixture
def served(monkeypatch):
    """Opens the stand-in with actions of text or of fields; its servers end with the test."""
    sources = []

    def open_standin(action: str, **options):
        monkeypatch.setenv("ACTION", action)
        sources.append(open_source(f"openenv:{STANDIN}", options))
        return sources[-1]

    yield open_standin
    for source in sources:
        source._server.stdin.close()
        assert source._server.wait(20) == 0


def test_text_is_the_only_field_of_an_action(served):
    source = served("text")
    assert (source.is_single_turn, source.max_episodes) == (False, 1)
    for number in range(2):
        # The session before is closed, and the server may need a moment to note it.
        episode = source.open(source.make_task(number))
        (message,) = episode.messages
        secret = message["content"].removeprefix("Say ").removesuffix(".")
        assert episode.step("no").observation == "Again."
        step = episode.step(f"It is {secret}")
        assert (step.observation, step.reward) == (None, 1.0)
        episode.close()
    # A URL is the same.
    assert open_source(f"openenv:{source._url}", {"sessions": 4}).max_episodes == 4


def test_an_action_with_fields_is_json_and_a_wrong_one_can_be_corrected(served):
    source = served("object")
    episode = source.open(source.make_task(3))
    asked = episode.messages[0]["content"]
    assert '"comment": {"type": "string"}' in asked
    secret = asked.removeprefix("Say ")[0]
    assert episode.step("no").observation.startswith("This is no JSON object")
    assert episode.step('{"number": "x"}').observation.startswith("number: an integer is required")
    step = episode.step(f'I say {{"number": {secret}}} now.')
    assert (step.observation, step.reward) == (None, 1.0)
    episode.close()
    episode = source.open(source.make_task(3))
    with pytest.raises(EpisodeError, match="it broke"):
        episode.step('{"number": 0, "comment": "break"}')
    episode.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("http://127.0.0.1:9", r"http://127\.0\.0\.1:9/schema does not answer.*correct the URL"),
        ("nowhere", "a directory with server/app.py"),
    ],
)
def test_what_is_not_there_is_said(name, said):
    with pytest.raises(PreflightError, match=said):
        open_source(f"openenv:{name}", {})


def test_a_server_that_does_not_start_names_the_interpreter(tmp_path):
    (tmp_path / "broken" / "server").mkdir(parents=True)
    (tmp_path / "broken" / "server" / "app.py").write_text("import no_such_module")
    with pytest.raises(PreflightError, match=r"ended with status 1.*name another interpreter"):
        open_source(f"openenv:{tmp_path / 'broken'}", {})


def test_its_server_ends_with_a_process_that_is_killed():
    program = (
        "from trl_atropos.envs.openenv import OpenEnv\nimport time\n"
        f"print(OpenEnv({str(STANDIN)!r}, {{}})._server.pid, flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        server = psutil.Process(int(process.stdout.readline()))
        process.kill()
    server.wait(20)
    assert not server.is_running()
