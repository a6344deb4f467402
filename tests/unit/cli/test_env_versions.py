"""The shim that sends on which policies SGLang says sampled a rollout. With a real server: tests/sglang/test_sglang_rollouts.py."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs import base
from atroposlib.envs.server_handling.sglang_server import SGLangServer
from tiny_models import byte_tokenizer

from trl_atropos.cli.env_shims.versions import PolicyVersion


pytestmark = pytest.mark.usefixtures("undone")

PROMPT = [5, 6]


class Server(ThreadingHTTPServer):
    """Answers `/generate` with what `completions` say, in order: the tokens of each and its `weight_versions`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.completions: list[tuple[list[int], Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = [self.server.completions.pop(0) for _ in range(asked["sampling_params"].get("n", 1))]
        answers = [
            {
                "meta_info": {
                    "output_token_logprobs": [[-0.5, token, None] for token in ids],
                    "finish_reason": {"type": "length"},
                    **({} if versions is None else {"weight_versions": [{"version": str(v)} for v in versions]}),
                }
            }
            for ids, versions in found
        ]
        body = json.dumps(answers if len(answers) > 1 else answers[0]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class Environment:
    """What an environment does with SGLang: it asks for tokens, and sends groups."""

    def __init__(self, server: Server, tokenizer: Path):
        self.server = server
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        config = base.APIServerConfig(base_url=url, model_name="m", tokenizer_name=str(tokenizer), api_key="x")
        self.client = SGLangServer(config)
        self.sent: list[Any] = []

    def sample(self, prompt: list[int], *completions: tuple[list[int], Any]) -> None:
        self.server.completions = list(completions)
        ask = self.client._tokens_and_logprobs_completion_wrapper
        asyncio.run(ask(model="m", prompt="", input_ids=prompt, n=len(completions), max_tokens=4))

    def send(self, *rollouts: list[list[int]], **fields: Any) -> Any:
        """Send a group of rollouts, each of them parts of tokens that are given and sampled in turn."""
        parts = [[(token, i % 2) for i, part in enumerate(rollout) for token in part] for rollout in rollouts]
        group = {
            "tokens": [[token for token, _ in rollout] for rollout in parts],
            "masks": [[token if is_sampled else -100 for token, is_sampled in rollout] for rollout in parts],
            **fields,
        }
        asyncio.run(base.BaseEnv.handle_send_to_api(self, group))
        return self.sent.pop().get("group_overrides")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Environment]:
    byte_tokenizer().save_pretrained(tmp_path)

    async def send(env: Environment, group: Any, *_: Any) -> None:
        env.sent.append(group)

    monkeypatch.setattr(base.BaseEnv, "handle_send_to_api", send)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield Environment(server, tmp_path)
        server.shutdown()


def test_each_rollout_has_the_oldest_version_of_its_tokens(environment: Environment) -> None:
    PolicyVersion().install()
    environment.sample(PROMPT, ([7, 8], [10]), ([7, 9], [9, 10]))
    assert environment.send([PROMPT, [7, 9]], [PROMPT, [7, 8]]) == {"policy_version": [9, 10]}


def test_of_several_turns_the_oldest_counts(environment: Environment) -> None:
    PolicyVersion().install()
    environment.sample(PROMPT, ([7, 8], [4]))
    environment.sample([*PROMPT, 7, 8, 5], ([9], [6]))
    assert environment.send([PROMPT, [7, 8], [5], [9]], [[*PROMPT, 7, 8, 5], [9]]) == {"policy_version": [4, 6]}


@pytest.mark.parametrize("versions", [None, [], ["default"], ["default", 1]])
def test_what_the_server_does_not_say_is_not_sent(environment: Environment, versions: Any) -> None:
    PolicyVersion().install()
    environment.sample(PROMPT, ([7, 8], versions))
    assert environment.send([PROMPT, [7, 8]]) is None


def test_a_rollout_with_a_turn_that_nobody_knows_is_unknown(environment: Environment) -> None:
    PolicyVersion().install()
    environment.sample(PROMPT, ([7, 8], [4]))
    cut, other = [PROMPT, [7]], [PROMPT, [7, 8], [5], [9]]
    assert environment.send([PROMPT, [7, 8]], cut, other, [PROMPT]) == {"policy_version": [4, None, None, None]}


def test_what_the_environment_says_itself_stays(environment: Environment) -> None:
    PolicyVersion().install()
    environment.sample(PROMPT, ([7, 8], [4]))
    assert environment.send([PROMPT, [7, 8]], group_overrides={"policy_version": 1}) == {"policy_version": 1}
    assert environment.send([PROMPT, [7, 8]], group_overrides={"group_size": 1}) == {
        "group_size": 1,
        "policy_version": [4],
    }
    assert environment.send([PROMPT, [7, 8]], group_overrides=None) == {"policy_version": [4]}


def test_without_the_shim_nothing_is_sent(environment: Environment) -> None:
    environment.sample(PROMPT, ([7, 8], [4]))
    assert environment.send([PROMPT, [7, 8]]) is None
