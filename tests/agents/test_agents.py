"""Agents of the package index, unmodified, in front of a real server: what each sampled is recorded exactly and trained for a step."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_agents import check_logprobs
from publishing import load
from servers import VLLMServer, add_chat_template, save_tiny_model

from trl_atropos import AtroposConfig, AtroposTrainer, Gateway, GatewayOptions
from trl_atropos.gateway.gateway import GatewaySession
from trl_atropos.gateway.groups import GroupMaker


AGENTS_PYTHON = os.environ.get("TRL_ATROPOS_AGENTS_PYTHON")
PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))
# What smolagents tells a model has some 8,000 characters, each of which is a token here.
MAX_TOKENS = 16_384
GROUP_SIZE = 2
AGENT_TIMEOUT_S = 120.0

pytestmark = pytest.mark.skipif(
    AGENTS_PYTHON is None, reason="TRL_ATROPOS_AGENTS_PYTHON names no Python that has the agents (make test-agents)"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return add_chat_template(save_tiny_model(directory, tied=True, seed=0, max_length=MAX_TOKENS))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    options = ["--enforce_eager", "True", "--dtype", "float32", "--max_model_len", str(MAX_TOKENS)]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    server = VLLMServer(model, *options, log_path=tmp_path_factory.mktemp("server") / "log")
    try:
        server.start()
        yield server
    finally:
        server.stop()


async def attempt(gateway: Gateway, program: Path, reward: float, directory: Path) -> GatewaySession:
    """Run an agent in a session of its own, as `AgentEnv` runs a command."""
    async with gateway.session() as session:
        process = await asyncio.create_subprocess_exec(
            str(AGENTS_PYTHON),
            str(program),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=directory,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(directory),
                "OPENAI_BASE_URL": session.base_url,
                "OPENAI_API_KEY": "unused",
                "ANTHROPIC_BASE_URL": session.anthropic_base_url,
                "ANTHROPIC_API_KEY": "unused",
            },
        )
        task = json.dumps("What is 3 + 4?").encode()
        _, errors = await asyncio.wait_for(process.communicate(task), AGENT_TIMEOUT_S)
        assert process.returncode == 0, errors.decode()[-4000:]
        session.reward = reward
    return session


@pytest.fixture(scope="module")
def sessions(server: VLLMServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[GatewaySession]]:
    """Of each program: one session that earned nothing, and one that earned 1."""
    directory = tmp_path_factory.mktemp("agents")

    async def run() -> dict[str, list[GatewaySession]]:
        # smolagents forces a call in most turns.
        async with Gateway([server.url], GatewayOptions(grammar="lift")) as gateway:
            return {
                program.stem: await asyncio.gather(
                    *(attempt(gateway, program, float(reward), directory) for reward in range(GROUP_SIZE))
                )
                for program in PROGRAMS
            }

    try:
        return asyncio.run(run())
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("name", [program.stem for program in PROGRAMS])
def test_every_token_that_an_agent_sampled_is_trained_once(model, sessions, name):
    policy = load(model)
    for session in sessions[name]:
        turns = session.recorded.turns
        assert len(turns) >= 2
        for turn in turns:
            assert not turn.why_masked
            check_logprobs(turn, policy)
        rollouts = session.finished().rollouts
        trained = [label for rollout in rollouts for label in rollout.masks if label != -100]
        assert sorted(trained) == sorted(token for turn in turns for token in turn.sampled)


@pytest.mark.parametrize(
    "name", ["langgraph_agents", "openai_agents", "pydantic_agents", "sdk_anthropic", "sdk_openai"]
)
def test_a_conversation_that_goes_on_is_one_rollout(sessions, name):
    for session in sessions[name]:
        assert len(session.finished().rollouts) == 1


def test_a_group_of_each_agent_is_a_step_with_a_gradient(model, sessions, tmp_path):
    groups: list[dict[str, Any]] = []
    for of_program in sessions.values():
        groups += GroupMaker(GROUP_SIZE, temperature=1.0).add([session.finished() for session in of_program])
    data = tmp_path / "groups.jsonl"
    data.write_text("".join(json.dumps(group) + "\n" for group in groups))
    assert len(groups) >= len(PROGRAMS)

    args = AtroposConfig(
        output_dir=str(tmp_path / "out"),
        data_path=str(data),
        per_device_train_batch_size=GROUP_SIZE,
        max_steps=len(groups),
        max_length=MAX_TOKENS,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = AtroposTrainer(str(model), args)
    trainer.train()

    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == len(groups)
    assert all(step["grad_norm"] > 0 for step in steps)
