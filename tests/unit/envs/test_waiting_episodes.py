"""Episodes that wait for others: in threads, no more at once than their source allows, and closed in any case."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from trl_atropos.envs.environment import SourceEnv, SourceEnvConfig, make_environment
from trl_atropos.envs.source import EpisodeStep


class WaitingEpisode:
    def __init__(self, source, messages):
        self.source, self.messages = source, messages
        source.is_open.append(self)
        source.most_open = max(source.most_open, len(source.is_open))

    def step(self, text: str) -> EpisodeStep:
        time.sleep(0.05)
        return EpisodeStep(None, float(text))

    def close(self) -> None:
        self.source.is_open.remove(self)
        self.source.has_closed.set()


class WaitingSource:
    is_single_turn = has_eval_split = False
    runs_elsewhere = True

    def __init__(self, max_episodes: int | None, *, opens_after_s: float = 0.0):
        self.max_episodes = max_episodes
        self.opens_after_s = opens_after_s
        self.is_open: list[WaitingEpisode] = []
        self.most_open = 0
        self.has_closed = threading.Event()

    def make_task(self, number: int, *, is_eval: bool = False) -> int:
        return number

    def open(self, task: int) -> WaitingEpisode:
        time.sleep(self.opens_after_s)
        return WaitingEpisode(self, [{"role": "system", "content": "Own."}, {"role": "user", "content": "Go."}])


async def environment(source: WaitingSource, **options: object) -> SourceEnv:
    # Without the tokenizer and the server of `BaseEnv`, which nothing here asks.
    cls = make_environment("waiting:x", source)
    env = cls.__new__(cls)
    env.config = SourceEnvConfig(**options)
    await env.setup()
    return env


@pytest.mark.parametrize(("max_episodes", "most_open"), [(2, 2), (None, 8)])
def test_no_more_are_open_than_the_source_allows(max_episodes, most_open):
    source = WaitingSource(max_episodes)

    async def play(env, number):
        async with env._opened(number) as attempt:
            await asyncio.sleep(0.05)
            return (await env._call(attempt.step, str(number))).reward

    async def play_all():
        env = await environment(source)
        return await asyncio.gather(*(play(env, number) for number in range(8)))

    assert asyncio.run(play_all()) == list(range(8))
    assert (source.is_open, source.most_open) == ([], most_open)


def test_an_episode_that_opens_after_nobody_waits_is_closed():
    source = WaitingSource(1, opens_after_s=0.2)

    async def give_up():
        env = await environment(source)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), env._opened(0):
                raise AssertionError("it was opened")
        await asyncio.to_thread(source.has_closed.wait, 10)

    asyncio.run(give_up())
    assert (source.is_open, source.most_open) == ([], 1)


@pytest.mark.parametrize(("system_prompt", "system"), [("", "Own."), ("Yours.", "Yours.\n\nOwn.")])
def test_a_system_message_of_its_own_goes_on_with_that_of_the_options(system_prompt, system):
    async def first():
        env = await environment(WaitingSource(None), system_prompt=system_prompt)
        async with env._opened(0) as attempt:
            return env._first_messages(attempt)

    assert asyncio.run(first()) == [{"role": "system", "content": system}, {"role": "user", "content": "Go."}]
