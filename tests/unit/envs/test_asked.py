"""Episodes that run in a thread of their own and ask: what the policy is told, and what ends them."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trl_atropos.envs import asked
from trl_atropos.envs.asked import AskedEpisode
from trl_atropos.envs.source import EpisodeStep
from trl_atropos.errors import EpisodeError


@pytest.fixture
def begin():
    """Plays a coroutine of an episode in another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda play: AskedEpisode(lambda episode: asyncio.run_coroutine_threadsafe(play(episode), loop))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def user(text):
    return {"role": "user", "content": text}


def policy(text):
    return {"role": "assistant", "content": text}


def test_what_is_new_is_the_observation_and_the_reward_comes_with_the_end(begin):
    async def play(episode):
        messages = [user("Go.")]
        messages += [policy(await episode.ask("one", messages)), user("More."), user("And more.")]
        return float(await episode.ask("one", messages))

    episode = begin(play)
    assert episode.messages == [user("Go.")]
    assert episode.step("I go.") == EpisodeStep("More.\n\nAnd more.", 0.0)
    assert episode.step("0.5") == EpisodeStep(None, 0.5)
    episode.close()


@pytest.mark.parametrize(
    ("seat", "messages"),
    [("one", [user("Shorter.")]), ("one", [user("Other."), policy("I go."), user("x")]), ("two", [user("Go.")])],
)
def test_a_history_that_is_rewritten_or_another_seat_is_no_rollout(begin, seat, messages):
    async def play(episode):
        await episode.ask("one", [user("Go.")])
        await episode.ask(seat, messages)
        return 1.0

    episode = begin(play)
    with pytest.raises(EpisodeError, match=r"A rollout is one conversation.*--args"):
        episode.step("I go.")
    episode.close()


def test_an_episode_that_fails_or_never_asks(begin):
    async def fail(episode):
        raise EpisodeError("It broke.", "So it is.", "Mend it.")

    async def say_nothing(episode):
        return 0.5

    async def fail_later(episode):
        await episode.ask("one", [user("Go.")])
        raise EpisodeError("It broke.", "So it is.", "Mend it.")

    with pytest.raises(EpisodeError, match=r"It broke\."):
        begin(fail)
    with pytest.raises(EpisodeError, match=r"reward 0\.5 before it asked"):
        begin(say_nothing)
    with pytest.raises(EpisodeError, match=r"It broke\."):
        begin(fail_later).step("I go.")


def test_one_that_hangs_is_ended(begin, monkeypatch):
    ended = threading.Event()

    async def hang(episode):
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(asked, "TIMEOUT_S", 0.05)
    with pytest.raises(EpisodeError, match="said nothing"):
        begin(hang)
    assert ended.wait(10)


def test_a_closed_episode_is_ended(begin):
    ended = threading.Event()

    async def play(episode):
        try:
            return float(await episode.ask("one", [user("Go.")]))
        finally:
            ended.set()

    begin(play).close()
    assert ended.wait(10)
