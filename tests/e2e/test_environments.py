"""Three real environments at once into one trainer, two of them with several turns and a tool: nothing but the tokens that the
policy sampled is trained, and everything of them.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from atroposlib.envs.base import APIServerConfig
from atroposlib.envs.server_handling.managed_server import SequenceNode
from atroposlib.envs.server_handling.server_manager import ServerManager
from envs.calculator import NUM_TURNS
from live_api import ApiProcess
from publishing import Publishing, load
from recorder import Recorder, recording
from servers import ROOT, add_chat_template, config, running, save_tiny_model, serve
from transformers import AutoTokenizer, TrainerCallback

from trl_atropos import AtroposTrainer
from trl_atropos.data.policy_versions import with_policy_versions
from trl_atropos.types import Rollout, RolloutGroup
from trl_atropos.wire.journal import Journal, JournalBatch


CALCULATOR = ROOT / "tests" / "e2e" / "envs" / "calculator.py"
CAPITALS = ROOT / "examples" / "envs" / "capitals.py"
EOS = 256
# Every turn ends with the end of a sequence. A completion has one already, so that it is there twice at a turn's border.
# Program, group size, share of the environments' requests, batches that may wait in the API before it stops. The last is what
# keeps the fast environment from filling the API's queue alone: with 1 for all, the slow ones stop before they begin.
ENVIRONMENTS = ((CALCULATOR, 2, 1.0, 4), (CALCULATOR, 4, 2.0, 4), (CAPITALS, 8, 0.5, 1))
BATCH_SIZE = 16
MAX_STEPS = 300
NUM_STEPS_OF_EACH = 3


def environment(
    program: Path,
    group_size: int,
    weight: float,
    max_batches: int,
    *,
    api_url: str,
    server_url: str,
    model: Path,
    log_path: Path,
) -> AbstractContextManager[None]:
    return running(
        *(sys.executable, str(program), "serve", "--env.rollout_server_url", api_url),
        *(
            "--env.tokenizer_name",
            str(model),
            "--openai.tokenizer_name",
            str(model),
            "--openai.model_name",
            str(model),
        ),
        *("--openai.base_url", f"{server_url}/v1", "--env.total_steps", "100000"),
        *("--env.group_size", str(group_size), "--env.inference_weight", str(weight)),
        *("--env.max_batches_offpolicy", str(max_batches)),
        log_path=log_path,
    )


class StopWhenAllWereTrained(TrainerCallback):
    """Ends the run when every environment was in several steps."""

    def __init__(self) -> None:
        self.num_steps: Counter[str] = Counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        names = [f"env/env_{env_id}/batch_frac" for env_id in range(len(ENVIRONMENTS))]
        self.num_steps.update(name for name in names if (logs or {}).get(name, 0.0) > 0)
        if all(self.num_steps[name] >= NUM_STEPS_OF_EACH for name in names):
            control.should_training_stop = True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that often ends a completion by itself."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model"), tied=True, seed=0)
    policy = load(directory)
    with torch.no_grad():
        # Zeros until now, because it pads, too. The wider a logit spreads, the more often it is the largest.
        weight = policy.get_input_embeddings().weight
        weight[EOS] = 4 * weight[EOS - 1]
    policy.to(torch.bfloat16).save_pretrained(directory)
    return add_chat_template(directory)


@pytest.fixture(scope="module")
def vllm_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log_path = tmp_path_factory.mktemp("served") / "vllm.log"
    with serve(model, "--enforce_eager", "True", log_path=log_path) as url:
        yield url


@pytest.fixture(scope="module")
def run(
    model: Path, vllm_url: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AtroposTrainer, Recorder, list[JournalBatch]]:
    """One run of all three environments; what the tests look at afterwards."""
    directory = tmp_path_factory.mktemp("run")
    with ExitStack() as stack:
        server_url, recorder = stack.enter_context(recording(vllm_url))
        api = stack.enter_context(ApiProcess(directory / "api.log"))
        for number, settings in enumerate(ENVIRONMENTS):
            stack.enter_context(
                environment(
                    *settings,
                    api_url=api.url,
                    server_url=server_url,
                    model=model,
                    log_path=directory / f"env{number}.log",
                )
            )
        args = config(
            directory / "out",
            api.url,
            vllm_url,
            max_steps=MAX_STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            max_tokens_per_micro_batch=1024,
        )
        trainer = AtroposTrainer(str(model), args, callbacks=[StopWhenAllWereTrained()])
        trainer.train()
    assert trainer.state.global_step < MAX_STEPS, "an environment was not heard of"
    return trainer, recorder, list(Journal(directory / "out" / "journal").batches())


def calls_of(tokens: list[int], recorder: Recorder) -> list[tuple[int, int]]:
    """Start and end of what each call sampled of a rollout."""
    prefixes = (tuple(tokens[:length]) for length in range(1, len(tokens) + 1))
    return [(recorder.sampled[prefix], len(prefix)) for prefix in prefixes if prefix in recorder.sampled]


def calculator_rollouts(batches: list[JournalBatch]) -> list[tuple[list[int], list[int]]]:
    """Tokens and masks of the rollouts with several turns."""
    groups = [group for batch in batches for group in batch.raw_groups if group["messages"]]
    return [row for group in groups for row in zip(group["tokens"], group["masks"], strict=True)]


def test_every_environment_is_trained_with_whole_groups_of_its_own_size(run):
    trainer, _, batches = run
    groups = [group for batch in batches for group in batch.raw_groups]
    sizes = {env_id: {len(g["tokens"]) for g in groups if g["env_id"] == env_id} for env_id in range(3)}
    assert sorted(size for found in sizes.values() for size in found) == [2, 4, 8]
    assert {sum(len(group["tokens"]) for group in batch.raw_groups) for batch in batches} == {BATCH_SIZE}
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert steps[-1]["num_rollouts_trained"] == BATCH_SIZE * len(steps)
    assert steps[-1]["num_rollouts_dropped"] == 0
    for entry in steps:
        # Those that were heard of share the step.
        shares = [entry.get(f"env/env_{env_id}/batch_frac", 0.0) for env_id in range(3)]
        assert sum(shares) == pytest.approx(1.0)
        assert all(f"env/env_{env_id}/reward" in entry for env_id, share in enumerate(shares) if share > 0)


def test_exactly_the_tokens_that_the_policy_sampled_are_trained_in_every_turn(run):
    _, recorder, batches = run
    rollouts = calculator_rollouts(batches)
    assert len(rollouts) >= 4
    for tokens, masks in rollouts:
        calls = calls_of(tokens, recorder)
        assert len(calls) == NUM_TURNS
        is_sampled = {position for start, end in calls for position in range(start, end)}
        expected = [token if position in is_sampled else -100 for position, token in enumerate(tokens)]
        assert masks == expected
        # The last token of the last call is the end of the rollout.
        assert calls[-1][1] == len(tokens)


def test_the_second_end_of_a_turn_is_the_templates_and_not_trained(run):
    _, _, batches = run
    doubled = [
        masks[position]
        for tokens, masks in calculator_rollouts(batches)
        for position in range(1, len(tokens))
        if tokens[position] == tokens[position - 1] == EOS and masks[position - 1] == EOS
    ]
    # Completions that ended by themselves, and did not sample the end twice.
    assert doubled
    assert set(doubled) == {-100}


def test_the_policy_of_every_turn_is_known(run):
    trainer, _, _ = run
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {entry["staleness/unknown_frac"] for entry in steps} == {0.0}
    assert all(0 <= entry["staleness/mean"] <= entry["staleness/max"] for entry in steps)


def test_the_oldest_policy_counts_when_another_is_published_between_two_turns(vllm_url: str, model: Path):
    publishing = Publishing(vllm_url, model)
    policy = load(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    server = APIServerConfig(
        server_type="vllm", base_url=f"{vllm_url}/v1", api_key="x", model_name=str(model), tokenizer_name=str(model)
    )

    async def play() -> SequenceNode:
        messages = []
        async with ServerManager([server]).managed_server(tokenizer=tokenizer) as managed:
            for policy_version in (1001, 1002):
                publishing.publish(policy, policy_version)
                messages.append({"role": "user", "content": "1+1"})
                answer = await managed.chat_completion(messages=messages, n=1, max_tokens=6, temperature=1.0)
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            (node,) = managed.get_state()["nodes"]
        return node

    node = asyncio.run(play())
    input_ids, labels = torch.tensor(node.tokens), torch.tensor(node.masked_tokens)
    last_turn = labels.clone()
    last_turn[: (labels == -100).nonzero().max()] = -100
    assert (last_turn != -100).sum() < (labels != -100).sum()
    rollouts = [Rollout(input_ids, trained, reward=0.0) for trained in (labels, last_turn)]
    (group,) = with_policy_versions([RolloutGroup(tuple(rollouts))], publishing.client.find_calls)
    assert [rollout.policy_version for rollout in group.rollouts] == [1001, 1002]
