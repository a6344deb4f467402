"""Sessions: what one agent does under one URL, and the limits on it."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..api.refusals import RequestRefused
from ..errors import EpisodeError
from .counts import GatewayCounts
from .options import GatewayOptions
from .servers import Affinity
from .turns import Turn


SESSION_ID_BYTES = 16
"""128 random bits: who knows the URL is the agent."""

ABANDONED, UNDELIVERED = "abandoned", "undelivered"

ANSWER_ID = re.compile(r"(?:chatcmpl-|resp_|msg_)?([0-9a-f]+)")
"""What a client knows of an answer, in any dialect: the name of its turn behind that of its kind."""


@dataclass(eq=False)
class Session:
    """One attempt at a task by one agent, and everything that it sampled.

    Args:
        id (`str`):
            The secret in its URL.
        turns (`list[Turn]`):
            In the order in which they were answered.
        affinity (`Affinity`):
            The server that answers for it.
        reward (`float`, *optional*):
            Of the whole session; None until somebody gave one.
        turn_rewards (`dict[int, float]`):
            Of single turns, by their indices.
        num_tokens (`int`):
            Of all turns, each token counted once.
        num_in_flight (`int`):
            Requests that are not answered yet.
        last_used_at (`float`):
            Monotonic time of its last request, in seconds.
        is_open (`bool`):
            Whether it takes requests.
        is_finished (`bool`):
            Whether its rewards are counted already.
    """

    id: str = field(default_factory=lambda: secrets.token_urlsafe(SESSION_ID_BYTES))
    turns: list[Turn] = field(default_factory=list)
    affinity: Affinity = field(default_factory=Affinity)
    reward: float | None = None
    turn_rewards: dict[int, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_in_flight: int = 0
    last_used_at: float = field(default_factory=time.monotonic)
    is_open: bool = True
    is_finished: bool = False

    def give_reward(self, value: Any, turn: Any = None) -> None:
        """Take a reward, of the whole session or of one turn: its index in the order in which they were answered, or the id
        of its answer. A later one takes its place.

        Raises:
            RequestRefused: The reward is no finite number, or there is no such turn.
            EpisodeError: The session is finished.
        """
        if self.is_finished:
            raise EpisodeError(
                f"A session is finished and gets a reward of {value!r}.",
                "Its group has the rewards that it had before.",
                "Give every reward before the session is finished.",
            )
        reward = checked_reward(value)
        if turn is None:
            self.reward = reward
        else:
            self.turn_rewards[self._index_of(turn)] = reward

    def rewards(self) -> list[float | None]:
        """Of each turn, with that of the session as a part of the last one. There is a turn."""
        rewards = [self.turn_rewards.get(index) for index in range(len(self.turns))]
        if self.reward is not None:
            rewards[-1] = self.reward + (rewards[-1] or 0.0)
        return rewards

    def _index_of(self, turn: Any) -> int:
        if isinstance(turn, int) and not isinstance(turn, bool) and 0 <= turn < len(self.turns):
            return turn
        found = ANSWER_ID.fullmatch(turn) if isinstance(turn, str) else None
        named = self.turn_of_id(found[1]) if found else None
        if named is None:
            raise RequestRefused(
                f"`turn` is {turn!r}, and the session has {len(self.turns)} turns.",
                "A turn is named by its index, from 0 in the order in which they were answered, or by the id of its answer.",
                "Reward a turn when its answer has come.",
                field="turn",
            )
        return self.turns.index(named)

    def add(self, turn: Turn) -> None:
        """Record a turn."""
        self.turns.append(turn)
        self.num_tokens += turn.num_tokens
        if turn.parent is not None:
            turn.parent.children.append(turn)
            # The messages of this turn begin with them.
            turn.parent.messages = []
            if turn.parent.why_masked == UNDELIVERED:
                # The client had it after all.
                turn.parent.why_masked = ""

    def repeated(self, request_digest: bytes) -> Turn | None:
        """The newest turn that answered the same request."""
        return next((turn for turn in reversed(self.turns) if turn.request_digest == request_digest), None)

    def turn_of_id(self, turn_id: str) -> Turn | None:
        """The turn that clients know by this id."""
        return next((turn for turn in self.turns if turn.id == turn_id), None)

    def mask_abandoned(self) -> None:
        """Mask the turns whose request came again, and went on from the other answer: their client never used them."""
        continued = {turn.request_digest for turn in self.turns if turn.children}
        for turn in self.turns:
            if not turn.children and not turn.why_masked and turn.request_digest in continued:
                turn.why_masked = ABANDONED


class Sessions:
    """All open sessions of a gateway, by their ids.

    Args:
        options ([`GatewayOptions`]):
            The limits.
        counts ([`GatewayCounts`]):
            What is counted.
    """

    def __init__(self, options: GatewayOptions, counts: GatewayCounts):
        self.options = options
        self.counts = counts
        self.num_in_flight = 0
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self) -> Session:
        """Open a session.

        Raises:
            RequestRefused: There are too many (429).
        """
        if len(self._open) >= self.options.max_sessions:
            raise _over(
                f"{len(self._open)} sessions are open.",
                "Each keeps its tokens in memory.",
                "max_sessions",
                may_retry=True,
            )
        session = Session()
        self._open[session.id] = session
        self.counts.num_sessions += 1
        return session

    def find(self, session_id: str) -> Session | None:
        """The open session of this id."""
        return self._open.get(session_id)

    def end(self, session: Session) -> None:
        """Take no more requests for a session; what is in flight is not recorded."""
        session.is_open = False
        if self._open.pop(session.id, None) is not None:
            session.mask_abandoned()
            self.counts.note_session(session.turns)

    def idle(self) -> list[Session]:
        """Open sessions that have waited for a request for too long."""
        before = time.monotonic() - self.options.idle_s
        return [
            session for session in self._open.values() if not session.num_in_flight and session.last_used_at < before
        ]

    @contextmanager
    def in_flight(self, session: Session) -> Iterator[None]:
        """Count a request while it is answered.

        Raises:
            RequestRefused: The session has used up its limits, or there are too many requests (429).
        """
        options = self.options
        if self.num_in_flight >= options.max_in_flight:
            raise _over(
                f"{self.num_in_flight} requests are answered at once.",
                "More would only wait in the servers.",
                "max_in_flight",
                may_retry=True,
            )
        if len(session.turns) + session.num_in_flight >= options.max_turns:
            raise _over(f"The session has {len(session.turns)} turns.", "It may have no more.", "max_turns")
        if session.num_tokens >= options.max_session_tokens:
            raise _over(f"The session has {session.num_tokens} tokens.", "It may have no more.", "max_session_tokens")
        self.num_in_flight += 1
        session.num_in_flight += 1
        session.last_used_at = time.monotonic()
        try:
            yield
        finally:
            self.num_in_flight -= 1
            session.num_in_flight -= 1
            session.last_used_at = time.monotonic()


def checked_reward(value: Any) -> float:
    """A reward as a number.

    Raises:
        RequestRefused: It is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RequestRefused(
            f"`reward` is {value!r}.", "It is a finite number.", "Mend the function that computes it.", field="reward"
        )
    return float(value)


class LimitReached(RequestRefused):
    """A request beyond a limit. `retry_after_s` is None where the same request can never succeed."""


def _over(what: str, why: str, option: str, may_retry: bool = False) -> LimitReached:
    fix = f"End the agent, or raise --{option} of the gateway."
    return LimitReached(what, why, fix, status_code=429, retry_after_s=1 if may_retry else None)
