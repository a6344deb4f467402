"""Episodes of environments that run by themselves and ask the policy when it is its turn."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ..errors import EpisodeError
from .source import EpisodeStep


TIMEOUT_S = 600.0
"""So long may an environment take between two answers of the policy."""

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A conversation that waits for the policy's text.

    Args:
        seat (`str`):
            Of whom it is; a rollout has one.
        messages (`list[dict[str, str]]`):
            All of it so far, with `role` and `content`.
        answer (`asyncio.Future[str]`):
            Takes the text, in the event loop of the environment.
    """

    seat: str
    messages: list[Message]
    answer: asyncio.Future[str]


class AskedEpisode:
    """An episode that is played in an event loop of another thread.

    Args:
        begin (`Callable[[AskedEpisode], Future[float]]`):
            Starts it and returns its reward to come. It calls [`ask`] from its event loop.
    """

    def __init__(self, begin: Callable[[AskedEpisode], Future[float]]):
        self._asked: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._run = begin(self)
        self._run.add_done_callback(lambda _: self._asked.put(None))
        self._question = self._next()
        if self._question is None:
            reward = self._run.result()
            raise EpisodeError(
                f"An episode ended with reward {reward} before it asked the policy.",
                "No rollout comes of it.",
                "Correct --args, or choose another of `trl-atropos env list`.",
            )
        self.messages = self._question.messages

    async def ask(self, seat: str, messages: list[Message]) -> str:
        """Return what the policy says to a conversation, which goes on with what it was when it was last asked."""
        answer = asyncio.get_running_loop().create_future()
        self._asked.put(Question(seat, [*messages], answer))
        return await answer

    def _next(self) -> Question | None:
        """The next question; `None` when the episode is over."""
        try:
            return self._asked.get(timeout=TIMEOUT_S)
        except queue.Empty as exc:
            self.close()
            raise EpisodeError(
                f"An environment said nothing for {TIMEOUT_S:.0f} s.",
                "A tool or a judge of it hangs.",
                "Read its output above, or set its timeouts with --args.",
            ) from exc

    def step(self, text: str) -> EpisodeStep:
        """Answer the question; what is new in the next one is the observation.

        Raises:
            [`EpisodeError`]: The next question is no continuation of the conversation.
        """
        before, self._question = self._question, None
        assert before is not None, "step() after the end of the episode"
        before.answer.get_loop().call_soon_threadsafe(before.answer.set_result, text)
        after = self._question = self._next()
        if after is None:
            return EpisodeStep(None, self._run.result())
        count = len(before.messages)
        new = after.messages[count + 1 :]
        if after.seat != before.seat or after.messages[:count] != before.messages or not new:
            raise EpisodeError(
                f"An episode went on with a conversation of {len(after.messages)} messages that does not begin with the "
                f"{count} messages and the answer before.",
                "A rollout is one conversation: histories that are rewritten and a second seat that is trained have no place.",
                "Give other seats a model of their own with --args, or choose another environment.",
            )
        return EpisodeStep("\n\n".join(message["content"] for message in new), 0.0)

    def close(self) -> None:
        """End it, where it has not ended by itself."""
        self._run.cancel()
