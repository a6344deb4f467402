"""An answer while it is sampled: one task collects its tokens, another one passes its text on."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any, Protocol


WORDS_OF_CALLS = ("functools", "function call")
BEGIN_OF_CALLS = re.compile("|".join([r"[<\[{`]", *WORDS_OF_CALLS]))
"""Where vLLM's parsers of tool calls begin to read a call, or a mark of the template. All that comes behind it may be one."""

BEGUN_WORDS = tuple(word[:length] for word in WORDS_OF_CALLS for length in range(1, len(word)))


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
        self.may_have_calls = False
        """Whether calls of tools can be read out of the text. Then what is in front of them is passed on."""
        self.num_passed_on = 0
        """Characters of the text that were passed on."""
        self._arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begin()

    @property
    def is_shown(self) -> bool:
        """As in [`Parts`]: from the first text on that can be passed on."""
        return self._num_certain > 0

    @property
    def shown(self) -> str:
        """What is passed on of the text that came: it stays what it is whatever comes behind it."""
        return self.text[: self._num_certain]

    def begin(self) -> None:
        """As in [`Parts`]."""
        self.text = ""
        """Everything that came."""
        self._num_certain = 0
        self._is_at_call = False
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
                self._add(choice["text"])
                if self._num_certain > self.num_passed_on and not self._arrival.done():
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
        text = self.text[self.num_passed_on : self._num_certain]
        self.num_passed_on += len(text)
        self._arrival = asyncio.get_running_loop().create_future()
        return text

    def _add(self, text: str) -> None:
        num_before = len(self.text)
        self.text += text
        if not self.may_have_calls:
            self._num_certain = len(self.text)
            return
        # Parsers take white space away in front of a call, and some also at the beginning.
        if self._is_at_call or self.text[0].isspace():
            return
        found = BEGIN_OF_CALLS.search(self.text, max(num_before - max(map(len, WORDS_OF_CALLS)), 0))
        self._is_at_call = found is not None
        if found is None:
            end = len(self.text) - max((len(begun) for begun in BEGUN_WORDS if self.text.endswith(begun)), default=0)
        else:
            end = found.start()
        self._num_certain += len(self.text[self._num_certain : end].rstrip())
