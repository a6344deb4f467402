"""Environments of other ecosystems by name, on the real API and a real server: what they post is what was sampled, and all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fork_server import ForkedProcess
from live_api import ApiProcess
from publishing import load
from recorder import recording
from servers import add_chat_template, save_tiny_model, serve

from trl_atropos.envs.ecosystems import ECOSYSTEMS


GROUP_SIZE = 4
MAX_TOKENS = 2048
TIMEOUT_S = 120.0
EOS = 256
# Both sides compute in float32, in another order.
MAX_LOGPROB_ERROR = 1e-3


def needs(name: str, max_turns: int) -> object:
    """An environment of an ecosystem that the pinned packages do not have."""
    installed = ECOSYSTEMS[name.partition(":")[0]].is_installed
    return pytest.param(name, max_turns, marks=pytest.mark.skipif(not installed, reason=f"{name}: not installed"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long prompts fit, and it often ends a completion by itself."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model"), tied=True, seed=0)
    policy = load(directory)
    policy.config.max_position_embeddings = MAX_TOKENS
    with torch.no_grad():
        weight = policy.get_input_embeddings().weight
        weight[EOS] = 4 * weight[EOS - 1]
    policy.to(torch.float32).save_pretrained(directory)
    return add_chat_template(directory)


@pytest.fixture(scope="module")
def vllm_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("served") / "vllm.log"
    options = ("--enforce_eager", "True", "--dtype", "float32", "--max_model_len", str(MAX_TOKENS))
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
    ],
)
def test_what_is_posted_is_what_was_sampled(name, max_turns, model, vllm_url, tmp_path):
    log_path = tmp_path / "env.log"
    with ApiProcess(tmp_path / "api.log") as api, recording(vllm_url) as (server_url, recorder):
        api.register(GROUP_SIZE, max_token_len=MAX_TOKENS + 1)
        command = [
            *(sys.executable, "-m", "trl_atropos.cli.main", "env", name, "serve"),
            *("--env.rollout_server_url", api.url, "--env.tokenizer_name", str(model)),
            *("--openai.base_url", f"{server_url}/v1", "--openai.model_name", str(model)),
            *("--env.group_size", str(GROUP_SIZE), "--env.ensure_scores_are_not_same", "false"),
            *("--env.max_turn_tokens", "24", "--env.max_turns", str(max_turns)),
        ]
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "OPENAI_"))}
        with log_path.open("wb") as log:
            process = ForkedProcess(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=tmp_path)
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
