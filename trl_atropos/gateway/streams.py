"""An answer while it is sampled: one task collects its tokens, another one passes its text on."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol


class Parts(Protocol):
    """Takes an answer of a server that comes in parts."""

    @property
    def is_shown(self) -> bool:
        """Whether a client has seen something of it, so that nothing else can take its place."""
        ...

    def begin(self) -> None:
        """An answer begins, from its start."""
        ...

    def take(self, part: dict[str, Any]) -> None:
        """Take what came next."""
        ...

    def whole(self) -> dict[str, Any]:
        """What the server would have answered at once."""
        ...


@dataclass(frozen=True)
class BegunTurn:
    """What is known of a turn before it is sampled, by the names of [`~gateway.turns.Turn`]."""

    id: str
    num_prompt_tokens: int
    kept_from: int | None


class LiveReply:
    """An answer of a turn as [`Parts`], and its text for whoever passes it on."""

    def __init__(self) -> None:
        self.turn: BegunTurn | None = None
        """What is sampled, once it can be passed on."""
        self.text = ""
        """Everything that came."""
        self.num_passed_on = 0
        """Characters of the text that were passed on."""
        self._arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begin()

    @property
    def is_shown(self) -> bool:
        """As in [`Parts`]: from its first text on."""
        return bool(self.text)

    def begin(self) -> None:
        """As in [`Parts`]."""
        self._token_ids: list[int] = []
        self._logprobs: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}

    def take(self, part: dict[str, Any]) -> None:
        """As in [`Parts`]."""
        for choice in part["choices"]:
            self._token_ids += choice["token_ids"]
            self._logprobs += choice["logprobs"]["content"]
            self._last = choice
            # Only servers that give text as well have it.
            if choice.get("text"):
                self.text += choice["text"]
                if not self._arrival.done():
                    self._arrival.set_result(None)

    def whole(self) -> dict[str, Any]:
        """As in [`Parts`]."""
        choice = {**self._last, "token_ids": self._token_ids, "logprobs": {"content": self._logprobs}}
        return {"choices": [choice]}

    def arrival(self) -> asyncio.Future[None]:
        """Done when there is text that was not passed on."""
        return self._arrival

    def pass_on(self) -> str:
        """The text that was not passed on yet."""
        text = self.text[self.num_passed_on :]
        self.num_passed_on += len(text)
        self._arrival = asyncio.get_running_loop().create_future()
        return text
