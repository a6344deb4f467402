"""Real environments of which nothing comes, on the real API: the person reads why."""

from __future__ import annotations

import asyncio
import copy
import logging
from dataclasses import asdict
from typing import Any

import pytest
import tenacity
from atropos_api import make_registration
from atroposlib.envs import base
from tiny_models import byte_tokenizer

from trl_atropos.cli import env_delivery
from trl_atropos.cli.env_delivery import Delivery, watch_environments


GROUP_SIZE = 2
MAX_TOKENS = 16


class Shape(base.BaseEnv):
    """Returns what a test says, as upstream's files return what their `score` makes of answers."""

    name = "shape"
    groups: Any = None

    async def setup(self) -> None:
        """Nothing is needed."""

    async def get_next_item(self) -> int:
        return 1

    async def collect_trajectories(self, item: int) -> tuple[Any, list[Any]]:
        if isinstance(self.groups, Exception):
            raise self.groups
        await asyncio.sleep(0.01)
        # Atropos adds fields to what it sends.
        return copy.deepcopy(self.groups), []

    async def evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is evaluated."""


def group(*scores: float, length: int = 3) -> dict[str, Any]:
    tokens = [5] * length
    return {
        "tokens": [tokens for _ in scores],
        "masks": [[-100, *tokens[1:]] for _ in scores],
        "scores": list(scores),
        "inference_logprobs": [[1.0, *[-0.5] * (length - 1)] for _ in scores],
    }


@pytest.fixture
def make(api, tmp_path, monkeypatch):
    """Makes a watched environment on the API, and what is noted of it."""
    monkeypatch.setattr(base.BaseEnv, "__init__", base.BaseEnv.__init__)
    made: list[Delivery] = []
    original = Delivery.__init__

    def init(delivery: Delivery, env: Any) -> None:
        original(delivery, env)
        made.append(delivery)

    monkeypatch.setattr(Delivery, "__init__", init)
    watch_environments()
    byte_tokenizer().save_pretrained(tmp_path)

    def make_env(groups: Any = None, **options: Any) -> tuple[Shape, Delivery]:
        config = base.BaseEnvConfig(
            **{
                **{
                    "tokenizer_name": str(tmp_path),
                    "group_size": GROUP_SIZE,
                    "wandb_name": "shape",
                    "use_wandb": False,
                },
                **{"rollout_server_url": api.base_url, "total_steps": 1000, "batch_size": GROUP_SIZE, **options},
            }
        )
        server = base.APIServerConfig(
            base_url="http://127.0.0.1:9/v1",
            server_type="vllm",
            api_key="x",
            model_name="m",
            tokenizer_name=str(tmp_path),
        )
        env = Shape(config, [server])
        env.groups = groups
        env.max_token_len = MAX_TOKENS
        return env, made[-1]

    return make_env


def handle(env: Shape, times: int = 1) -> None:
    """Let Atropos make and send groups, as its loop does."""

    async def run() -> None:
        for _ in range(times):
            env.running_items["id"] = {"item": 1}
            await env.handle_env("id")

    asyncio.run(run())


def test_groups_that_come_are_not_complained_about(api, make):
    env, delivery = make(group(0.0, 1.0))
    handle(env, 2)
    assert delivery.num_sent == 2
    assert api.count("POST", "/scored_data") == 2


def test_groups_with_equal_rewards_are_counted_with_the_rewards(api, make):
    env, delivery = make(group(0.0, 0.0))
    handle(env, 3)
    (reason,) = delivery.reasons()
    assert reason.startswith("3 groups were dropped because all their rewards were equal (0 in 3)")
    assert "--env.group_size" in reason
    assert delivery.num_sent == 0


def test_with_the_option_equal_rewards_are_sent(make):
    env, delivery = make(group(0.0, 0.0), ensure_scores_are_not_same=False)
    handle(env)
    assert (delivery.num_sent, delivery.num_equal_rewards) == (1, 0)


@pytest.mark.parametrize("nothing", [None, [], [None]])
def test_an_environment_that_drops_its_groups_itself(make, nothing):
    # reasoning_gym_environment.py and regex_env.py: all answers failed, so `score` returns None.
    env, delivery = make(nothing)
    handle(env, 4)
    (reason,) = delivery.reasons()
    assert reason.startswith("4 times the environment itself returned no group.")
    assert "easier task" in reason


def test_groups_that_short_answers_made_smaller(make):
    # The same files: what is shorter than ten tokens is left out, and Atropos drops what is left.
    env, delivery = make(group(1.0))
    for length in (3, 4, 4, 12):
        delivery.note_answer(length)
    handle(env, 2)
    (reason,) = delivery.reasons()
    assert "had not 2 rollouts (2 of 1)" in reason
    assert "3 to 12 tokens, half of them at most 4" in reason
    assert "Ask for longer answers" in reason


def test_rollouts_as_long_as_the_trainer_takes(make):
    env, delivery = make(group(0.0, 1.0, length=MAX_TOKENS))
    handle(env)
    (reason,) = delivery.reasons()
    assert "16 tokens or more" in reason
    assert "--max_length" in reason


def test_exceptions_are_counted_and_the_first_is_shown_whole(make, caplog):
    env, delivery = make(ValueError("no such column"))
    with caplog.at_level(logging.WARNING, logger="trl_atropos"):
        handle(env, 3)
    shown = [record for record in caplog.records if record.name.startswith("trl_atropos")]
    assert [record.exc_info[1] for record in shown] == [env.groups]
    assert "collect_trajectories failed" in shown[0].message
    assert delivery.reasons()[0] == "3 groups were lost by ValueError: no such column"
    # An exception is not counted as a group that the environment dropped, too.
    assert delivery.num_no_group == 0


def test_an_exception_while_a_group_is_sent_is_one_too(make):
    # Atropos reads a field that is there and empty.
    env, delivery = make({**group(0.0, 1.0), "group_overrides": None})
    handle(env)
    assert "AttributeError: 'NoneType' object has no attribute 'get'" in delivery.reasons()[0]


def test_posts_that_the_api_refuses(make):
    env, delivery = make({**group(0.0, 1.0), "advantages": [1]})
    handle(env)
    assert "1 posts were refused by the API with HTTP 422" in delivery.reasons()[0]
    assert delivery.num_sent == 0


def test_a_server_that_does_not_answer(make):
    env, delivery = make()
    env.server.servers[0].server_healthy = False
    assert "http://127.0.0.1:9/v1 does not answer its health check" in delivery.reasons()[0]


def test_process_counts_what_it_writes(make, tmp_path):
    env, delivery = make(group(0.0, 1.0), data_path_to_save_groups=str(tmp_path / "groups.jsonl"))
    env.n_groups_to_process, env.group_size_to_process = 3, GROUP_SIZE
    asyncio.run(env.process_manager())
    assert delivery.num_sent == 3


def test_a_whole_run_says_who_is_waited_for_and_stops_when_groups_come(api, make, monkeypatch, caplog):
    monkeypatch.setattr(env_delivery, "REPORT_INTERVAL_S", 0.4)
    env, delivery = make(max_batches_offpolicy=1)

    async def run() -> None:
        # One second is how often Atropos asks whether a trainer is there; five it waits after that.
        task = asyncio.create_task(env.env_manager())
        await asyncio.sleep(1.0)
        assert "no trainer has asked for data" in delivery.reasons()[0]
        api.post("/register", asdict(make_registration(batch_size=GROUP_SIZE, max_token_len=MAX_TOKENS)))
        assert api.get("/batch").json() == {"batch": None}
        while delivery.waits_for_trainer:
            await asyncio.sleep(0.05)
        (reason,) = delivery.reasons()
        assert "is registered and has begun no task" in reason
        while not delivery.num_no_group:
            await asyncio.sleep(0.05)
        env.groups = group(0.0, 1.0)
        while not delivery.is_queue_full:
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.INFO, logger="trl_atropos"):
        asyncio.run(asyncio.wait_for(run(), 40))
    texts = [record.getMessage() for record in caplog.records if record.name == env_delivery.__name__]
    (registered,) = [text for text in texts if text.startswith("Registered as environment 0 of the API.")]
    assert "env/env_0/" in registered
    texts.remove(registered)
    assert any("no trainer has asked for data" in text for text in texts)
    assert all(text.startswith("No group was sent for ") for text in texts)
    # Twice as long after each, so that a log is not full of it.
    assert len(texts) <= 5
    assert "waits for the trainer" in " ".join(delivery.reasons())


def test_the_first_report_comes_within_half_a_minute():
    assert env_delivery.REPORT_INTERVAL_S < 30


def test_what_a_retry_gave_up_on_is_what_is_said(make, caplog):
    # Requests are repeated inside of what is repeated as a whole, and both give up.
    @tenacity.retry(stop=tenacity.stop_after_attempt(2))
    def inner() -> None:
        raise ConnectionError("the server went away")

    with pytest.raises(tenacity.RetryError) as raised:
        tenacity.Retrying(stop=tenacity.stop_after_attempt(2))(inner)
    env, delivery = make(raised.value)
    handle(env, 2)
    assert delivery.reasons()[0] == "2 groups were lost by ConnectionError: the server went away"
