"""Environments of other ecosystems by name, and agents behind a gateway, on the real API and a real server: what they post is what
was sampled, and all of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import yaml
from fork_server import ForkedProcess
from gateway_agents import ADD, AGENTS, ChatAgent, Clients, MessagesAgent, ResponsesAgent, ask, client, user
from live_api import ApiProcess
from publishing import load
from recorder import recording
from servers import add_chat_template, save_tiny_model, serve

from trl_atropos import Gateway
from trl_atropos.envs.ecosystems import ECOSYSTEMS
from trl_atropos.gateway.gateway import GatewaySession
from trl_atropos.gateway.groups import SessionRollout
from trl_atropos.wire.journal import Journal


GROUP_SIZE = 4
MAX_TOKENS = 2048
TIMEOUT_S = 120.0
EOS = 256
# Both sides compute in float32, in another order.
MAX_LOGPROB_ERROR = 1e-3
MAX_TURN_LOGPROB_ERROR = 1e-4


ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).parents[1] / "verifiers_tasks"


def python_of(name: str) -> str:
    """The interpreter that has an ecosystem: this one, or that of a virtual environment, such as TRL_ATROPOS_VERIFIERS_PYTHON."""
    ecosystem = name.partition(":")[0]
    return os.environ.get(f"TRL_ATROPOS_{ecosystem.upper().replace('-', '_')}_PYTHON", sys.executable)


def needs(name: str, max_turns: int) -> object:
    """An environment of an ecosystem that the pinned packages do not have."""
    installed = ECOSYSTEMS[name.partition(":")[0]].is_installed or python_of(name) != sys.executable
    return pytest.param(name, max_turns, marks=pytest.mark.skipif(not installed, reason=f"{name}: not installed"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long prompts fit, and it often ends a completion by itself."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model"), tied=True, seed=0, max_length=MAX_TOKENS)
    policy = load(directory)
    with torch.no_grad():
        weight = policy.get_input_embeddings().weight
        weight[EOS] = 4 * weight[EOS - 1]
    policy.to(torch.float32).save_pretrained(directory)
    return add_chat_template(directory)


@pytest.fixture(scope="module")
def vllm_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("served") / "vllm.log"
    options = [*("--enforce_eager", "True", "--dtype", "float32", "--max_model_len", str(MAX_TOKENS))]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "asked_for"]
    options += ["--tool-parser-plugin", str(Path(__file__).with_name("tool_parser.py"))]
    with serve(model, *options, log_path=log_path) as url:
        yield url


@pytest.mark.parametrize(
    ("name", "max_turns"),
    [
        ("reasoning-gym:chain_sum", 1),
        # A game ends after the second move against its rules, and this model knows none.
        ("textarena:GuessTheNumber-v0", 2),
        # So it is not over after the first one: `max_turns` ends it.
        ("textarena:Blackjack-v0", 1),
        needs("reasoning-core:arithmetics", 1),
        needs("gem:rg:chain_sum", 1),
        # It ends with the first answer that holds no guess.
        needs("gem:game:GuessTheNumber-v0-easy", 1),
        needs("verifiers:sums_for_verifiers", 1),
        # Text is its action, and its own rules end it after the third.
        pytest.param(f"openenv:{ROOT / 'tests' / 'openenv_standin'}", 3, id="openenv"),
        # Here, too.
        needs("verifiers:guesses_for_verifiers", 3),
    ],
)
def test_what_is_posted_is_what_was_sampled(name, max_turns, model, vllm_url, tmp_path):
    log_path = tmp_path / "env.log"
    with ApiProcess(tmp_path / "api.log") as api, recording(vllm_url) as (server_url, recorder):
        api.register(GROUP_SIZE, max_token_len=MAX_TOKENS + 1)
        command = [
            *(python_of(name), "-m", "trl_atropos.cli.main", "env", name, "serve"),
            *("--env.rollout_server_url", api.url, "--env.tokenizer_name", str(model)),
            *("--openai.base_url", f"{server_url}/v1", "--openai.model_name", str(model)),
            *("--env.group_size", str(GROUP_SIZE), "--env.ensure_scores_are_not_same", "false"),
            *("--env.max_turn_tokens", "24", "--env.max_turns", str(max_turns)),
        ]
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "OPENAI_"))}
        variables["ACTION"] = "text"
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TASKS)])
        start = ForkedProcess if python_of(name) == sys.executable else subprocess.Popen
        with log_path.open("wb") as log:
            process = start(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=tmp_path)
        try:
            groups = [
                *api.wait_for_batch(process, log_path, TIMEOUT_S),
                *api.wait_for_batch(process, log_path, TIMEOUT_S),
            ]
        finally:
            process.kill()
            process.wait()
    policy = load(model).to(torch.float32).eval()
    num_turns = set()
    for group in groups:
        assert len(group["tokens"]) == len(group["scores"]) == GROUP_SIZE
        # One task for the whole group.
        assert len({rollout[0]["content"] for rollout in group["messages"]}) == 1
        for tokens, masks, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True):
            calls = [
                (recorder.sampled[tuple(tokens[:end])], end)
                for end in range(1, len(tokens) + 1)
                if tuple(tokens[:end]) in recorder.sampled
            ]
            expected = [-100] * len(tokens)
            for start, end in calls:
                expected[start:end] = tokens[start:end]
            assert masks == expected
            assert calls[-1][1] == len(tokens)
            num_turns.add(len(calls))
            with torch.no_grad():
                computed = policy(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
            for position, label in enumerate(masks):
                if label == -100:
                    assert logprobs[position] == 1.0
                else:
                    assert abs(logprobs[position] - computed[position - 1, label].item()) < MAX_LOGPROB_ERROR
    assert max(num_turns) == max_turns
    assert ("was ended after --env.max_turns 1" in log_path.read_text()) is (name == "textarena:Blackjack-v0")


def test_what_a_gateway_records_is_what_the_server_rendered_and_sampled(model, vllm_url):
    async def converse(session: GatewaySession) -> None:
        messages = [user("Tell me.")]
        # Cut by its length, by its end or its length, and streamed, under two versions.
        await ask(session.base_url, messages, max_tokens=9, temperature=0.3, top_p=0.4)
        messages.append(user("More."))
        await ask(session.base_url, messages, max_tokens=200)
        messages.append(user("And then?"))
        label("12")
        async with client(session.base_url) as openai:
            stream = await openai.chat.completions.create(model="m", messages=messages, max_tokens=40, stream=True)
            chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        # Other words than the policy's: a branch.
        messages[1] = {"role": "assistant", "content": "I forgot."}
        await ask(session.base_url, messages, max_tokens=20)

    async def run() -> tuple[GatewaySession, Gateway]:
        async with Gateway([f"{vllm_url}/v1"]) as gateway:
            async with gateway.session() as session:
                session.reward = 1.0
                await converse(session)
            return session, gateway

    def label(version: str) -> None:
        requests.post(
            f"{vllm_url}/update_weight_version", json={"new_version": version}, timeout=60
        ).raise_for_status()

    label("11")
    session, gateway = asyncio.run(run())
    turns = session.recorded.turns
    for turn in (turns[0], turns[3]):
        # The prompt of a chat request that nobody rendered but the server.
        body = {"model": str(model), "messages": turn.messages, "max_tokens": 1, "return_token_ids": True}
        body["messages"] = body["messages"] or [user("Tell me.")]
        own = requests.post(f"{vllm_url}/v1/chat/completions", json=body, timeout=60).json()
        assert turn.token_ids()[: -len(turn.sampled)].tolist() == own["prompt_token_ids"]
    assert [turn.policy_version for turn in turns] == [11, 11, 12, 12]
    assert (gateway.counts.num_spliced, gateway.counts.num_branches) == (2, 1)
    rollouts = session.finished().rollouts
    assert [rollout.policy_version for rollout in rollouts] == [11, 12]
    num_trained = sum(label != -100 for rollout in rollouts for label in rollout.masks)
    assert num_trained == sum(len(turn.sampled) for turn in turns)
    check_logprobs(model, rollouts)


def check_logprobs(model: Path, rollouts: list[SessionRollout]) -> None:
    """Compare what was recorded with what the model gives the same tokens, teacher forced."""
    policy = load(model).to(torch.float32).eval()
    for rollout in rollouts:
        with torch.no_grad():
            computed = policy(torch.tensor([rollout.tokens])).logits[0].float().log_softmax(-1)
        for position, token in enumerate(rollout.masks):
            if token != -100:
                error = rollout.inference_logprobs[position] - computed[position - 1, token].item()
                assert abs(error) < MAX_TURN_LOGPROB_ERROR


FUNCTION = {name: value for name, value in ADD["function"].items() if name != "strict"}
# What is said beside the conversation, and the name of that.
OWN_ROUTES = {
    ChatAgent: ("/v1/chat/completions/render", "messages", {"tools": [{"type": "function", "function": FUNCTION}]}),
    MessagesAgent: (
        *("/v1/messages/render", "messages"),
        {
            "system": "Be good.",
            "tools": [{key.replace("parameters", "input_schema"): value for key, value in FUNCTION.items()}],
        },
    ),
    ResponsesAgent: (
        *("/v1/responses/render", "input"),
        {"instructions": "Be good.", "tools": [{"type": "function", "strict": None, **FUNCTION}]},
    ),
}
"""The routes by which the server itself renders a dialect. Strict tools are none behind a gateway."""


@pytest.mark.parametrize("kind", AGENTS)
def test_a_conversation_with_a_call_in_any_dialect_is_what_the_server_rendered_and_sampled(model, vllm_url, kind):
    async def converse(session: GatewaySession, clients: Clients) -> list[list[Any]]:
        agent = kind(session, clients, "Be good.", has_tools=True)
        asked = []
        for is_streamed, text in ((False, "Call."), (True, ""), (False, "And then?")):
            agent.tell(text, of_tools="Three.")
            # As JSON: agents keep objects of their SDK.
            asked.append(
                json.loads(json.dumps(agent.messages, default=lambda part: part.model_dump(exclude_none=True)))
            )
            await agent.ask(is_streamed, max_tokens=40)
            if len(asked) == 1 and not agent.calls:
                # It ended before it said anything.
                return []
        return asked

    async def run() -> tuple[GatewaySession, list[list[Any]]]:
        async with Gateway([f"{vllm_url}/v1"]) as gateway, Clients() as clients:
            for _ in range(20):
                async with gateway.session() as session:
                    session.reward = 1.0
                    asked = await converse(session, clients)
                # What was streamed beside tools was the text of the message.
                assert gateway.recorder.may_pass_on_beside_calls
                if asked:
                    return session, asked
            raise AssertionError("the model never said anything")

    session, asked = asyncio.run(run())
    first, second, third = turns = session.recorded.turns
    assert [turn.parent for turn in turns] == [None, first, second]
    assert first.message["tool_calls"][0]["function"]["name"] == "add"
    (rollout,) = session.finished().rollouts
    assert rollout.tokens == [*third.token_ids()]
    assert [label for label in rollout.masks if label != -100] == [*first.sampled, *second.sampled, *third.sampled]
    check_logprobs(model, [rollout])
    if kind in OWN_ROUTES:
        route, name, others = OWN_ROUTES[kind]
        for turn, conversation in zip(turns, asked, strict=True):
            body = {"model": str(model), "max_tokens": 40, name: conversation, **others}
            answer = requests.post(vllm_url + route, json=body, timeout=60)
            rendered = answer.json()["token_ids"]
            # The server's own but for the replies, which it renders from their text.
            assert rendered[: len(first.added)] == first.added.tolist()
            assert rendered[-len(turn.added) :] == turn.added.tolist()
            assert rendered.count(EOS) == turn.token_ids()[: -len(turn.sampled)].count(EOS)


def test_an_agent_as_an_environment_posts_what_was_sampled(model, vllm_url, tmp_path):
    log_path = tmp_path / "env.log"
    with ApiProcess(tmp_path / "api.log") as api:
        api.register(GROUP_SIZE, max_token_len=MAX_TOKENS + 1)
        command = [
            *(sys.executable, "-m", "trl_atropos.cli.main", "env", str(Path(__file__).parent / "envs" / "agent.py")),
            *("serve", "--env.rollout_server_url", api.url, "--env.tokenizer_name", str(model)),
            *("--openai.base_url", f"{vllm_url}/v1", "--openai.model_name", str(model)),
            *("--env.group_size", str(GROUP_SIZE)),
        ]
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "OPENAI_"))}
        with log_path.open("wb") as log:
            process = ForkedProcess(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=tmp_path)
        try:
            (group,) = api.wait_for_batch(process, log_path, TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
    assert len(group["tokens"]) == len(group["scores"]) == GROUP_SIZE
    assert group["generation_params"] == {"temperature": 1.0}
    policy = load(model).to(torch.float32).eval()
    for tokens, masks, logprobs in zip(group["tokens"], group["masks"], group["inference_logprobs"], strict=True):
        spans = "".join("-" if label == -100 else "+" for label in masks).split("-")
        assert len([span for span in spans if span]) == 2
        with torch.no_grad():
            computed = policy(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        for position, label in enumerate(masks):
            expected = 1.0 if label == -100 else computed[position - 1, label].item()
            assert abs(logprobs[position] - expected) < MAX_TURN_LOGPROB_ERROR


# The last test: it publishes to the server.
def test_two_ecosystems_are_trained_in_one_launch_with_metrics_of_their_own(model, vllm_url, tmp_path):
    launch = yaml.safe_load((ROOT / "examples" / "configs" / "launch_environments.yaml").read_text())
    for row in launch["environments"].values():
        # This model knows no answer, and every group has equal rewards.
        row["command"] += " --env.ensure_scores_are_not_same false --env.group_size 4 --env.max_token_length 1024"
        # Half of each batch is promised to each, or the faster one might fill the few steps.
        row["command"] += " --env.max_turns 2 --env.max_turn_tokens 8 --env.min_batch_allocation 0.5"
    launch["trainer_command"] = launch["trainer_command"].replace("512", "1024")
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(launch))
    command = [
        *(sys.executable, "-m", "trl_atropos.cli.main", "launch", "-c", str(path), "--run_dir", str(tmp_path / "run")),
        *("--model_name_or_path", str(model), "--vllm_url", vllm_url),
        *("--trainer_args", "--max_steps 6 --logging_steps 1 --per_device_train_batch_size 8 --report_html false"),
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    history = json.loads((tmp_path / "run" / "model" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    shares = [[entry.get(f"env/env_{env_id}/batch_frac", 0.0) for env_id in range(2)] for entry in steps]
    assert len(steps) == 6 and all(sum(of_step) == pytest.approx(1.0) for of_step in shares)
    assert all(max(of_environment) > 0.0 for of_environment in zip(*shares, strict=True))
    assert {"env/env_0/reward", "env/env_1/reward"} <= set().union(*steps)
    batches = Journal(tmp_path / "run" / "model" / "journal").batches()
    questions = {
        group["env_id"]: group["messages"][0][0]["content"] for batch in batches for group in batch.raw_groups
    }
    assert sorted("guess" in question.lower() for question in questions.values()) == [False, True]
