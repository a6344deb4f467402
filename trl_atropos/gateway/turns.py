"""What an agent's requests became, token by token: turns that continue each other, and the trees that they form.

A turn is one request and what was sampled for it. The prompt of a turn that continues another one is that turn's own
sequence, as it was sampled, and what the chat template writes behind it. So a conversation stays one sequence of tokens
although clients send it as text again and again. Nothing here tokenises: every id was given by the server.

Shape letters: T tokens of a prompt as the server renders it.
"""

from __future__ import annotations

import json
import secrets
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any


ID_BYTES = 8

TOKEN, LOGPROB = "i", "f"
"""Four bytes a token and four a logprob, which is what servers compute: `float` of either is exactly what they sent."""


def new_id() -> str:
    """A name that no other turn has."""
    return secrets.token_hex(ID_BYTES)


@dataclass(frozen=True)
class Reply:
    """An answer as the client saw it, in the form in which two of them are compared.

    Args:
        text (`str`):
            Without white space around it, which clients strip.
        tool_calls (`tuple[tuple[str, str], ...]`):
            Name and arguments of each call; arguments that are JSON in one way of writing it.
    """

    text: str
    tool_calls: tuple[tuple[str, str], ...]


@dataclass(eq=False)
class Turn:
    """One request and what was sampled for it.

    Args:
        parent (`Turn`, *optional*):
            The turn that this one continues.
        added (`array`):
            Ids of the prompt behind the sequence of `parent`: the whole prompt without one.
        sampled (`array`):
            Ids that were sampled, with the token that ended them.
        logprobs (`array`):
            Natural logarithm of the probability with which each of them was sampled.
        policy_version (`int`, *optional*):
            Of the oldest policy that sampled any of them; None where the server does not say it.
        message (`dict`):
            The assistant's message as it was sent to the client.
        finish_reason (`str`):
            As it was sent to the client: `"stop"`, `"length"` or `"tool_calls"`.
        messages (`list[dict]`):
            Of the request. A turn that continues this one takes them over, and this list is emptied.
        num_messages (`int`):
            Messages of the request.
        num_closed (`int`):
            Tokens of the rendered request without the generation prompt.
        closed_digest (`bytes`):
            Of these tokens.
        request_digest (`bytes`):
            Of the request as it came, by which a repetition is known.
        end_token (`int`, *optional*):
            The sampled token that ended the turn; None where it was cut.
        is_open (`bool`):
            Whether another turn can continue it: what a stop string cut is not what was sampled.
        why_masked (`str`):
            Why it is not trained, in a word; empty where it is.
        stop_string (`str`, *optional*):
            The stop string that cut it.
        kept_from (`int`, *optional*):
            Index of the first message that a request takes over which names this turn as the one before; None if none may.
        id (`str`):
            By which clients name it and the calls of tools in it.
    """

    parent: Turn | None
    added: array[int]
    sampled: array[int]
    logprobs: array[float]
    policy_version: int | None
    message: dict[str, Any]
    finish_reason: str
    messages: list[dict[str, Any]]
    num_messages: int
    num_closed: int
    closed_digest: bytes
    request_digest: bytes = b""
    end_token: int | None = None
    is_open: bool = True
    why_masked: str = ""
    stop_string: str | None = None
    kept_from: int | None = None
    id: str = field(default_factory=new_id)
    children: list[Turn] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that came with this turn: its part of the prompt and what was sampled."""
        return len(self.added) + len(self.sampled)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that it was sampled from."""
        return sum(turn.num_tokens for turn in self.path()) - len(self.sampled)

    def conversation(self) -> list[dict[str, Any]]:
        """The messages of the request and the answer, also where a later turn has taken the messages over."""
        holder = self
        while holder.children:
            holder = holder.children[-1]
        return [*holder.messages[: self.num_messages], self.message]

    def path(self) -> list[Turn]:
        """The turns from the first one of this conversation to this one."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    def token_ids(self) -> array[int]:
        """The whole sequence, from the first prompt to the last sampled token."""
        ids = array(TOKEN)
        for turn in self.path():
            ids += turn.added
            ids += turn.sampled
        return ids


@dataclass(frozen=True)
class Prompt:
    """What is sampled from.

    Args:
        parent (`Turn`, *optional*):
            The turn that it continues.
        added (`array`):
            Ids behind that turn's sequence; all of them without one.
        is_rewritten (`bool`):
            Whether an earlier turn asked the beginning of this and its reply is not what follows: the client rewrote its
            history, or the sequence cannot be continued, so that it branches.
    """

    parent: Turn | None
    added: array[int]
    is_rewritten: bool


def reply_of(message: dict[str, Any]) -> Reply:
    """The form of an assistant's message in which two are compared. What is malformed equals nothing that was sent."""
    calls = message.get("tool_calls") or []
    functions = [call.get("function") or {} for call in calls if isinstance(call, dict)]
    return Reply(
        text_of(message.get("content")).strip(),
        tuple((str(function.get("name")), _canonical(function.get("arguments"))) for function in functions),
    )


def text_of(content: Any) -> str:
    """The text of a message's content, which is a string, a list of parts, or nothing."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _canonical(arguments: Any) -> str:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return str(arguments)


def digest_of(ids: array[int]) -> bytes:
    """16 bytes that stand for these tokens."""
    return blake2b(ids.tobytes(), digest_size=16).digest()


def turns_asking_a_prefix(turns: Iterable[Turn], rendered: array[int], num_messages: int) -> list[Turn]:
    """The turns whose request, as it was rendered, is the beginning of this one; the longest first, newer ones before
    older ones of the same length.

    `rendered` (T,) is the request with `num_messages` messages. It is gone through once.
    """
    candidates = [turn for turn in turns if turn.num_messages < num_messages and turn.num_closed <= len(rendered)]
    digest, num_digested = blake2b(digest_size=16), 0
    digests: dict[int, bytes] = {}
    for length in sorted({turn.num_closed for turn in candidates}):
        digest.update(rendered[num_digested:length].tobytes())
        num_digested = length
        digests[length] = digest.copy().digest()
    found = [turn for turn in candidates if digests[turn.num_closed] == turn.closed_digest]
    # Sorting keeps the order of equal ones.
    found.reverse()
    return sorted(found, key=lambda turn: -turn.num_closed)


def end_of_reply(
    turn: Turn, rendered: array[int], end_tokens: Collection[int], closing: Sequence[int] = ()
) -> int | None:
    """Where the reply of `turn` ends in the rendering of a request that goes on with it: the index of the token that ended
    it, or of the template's own end for a reply that was cut. None where the template writes none, or another one.

    `end_tokens` end replies, and `closing` is what the template writes behind them, as far as it is known.
    """
    start = turn.num_closed
    found = next((index for index in range(start, len(rendered)) if rendered[index] in end_tokens), None)
    if found is None or turn.end_token is None or rendered[found] == turn.end_token:
        return found
    # Some templates write a token of their own before the one that ends the turn.
    is_closing = rendered[found : found + len(closing)].tolist() == list(closing)
    return found + closing.index(turn.end_token) if is_closing and turn.end_token in closing else None


def continued(turn: Turn, rendered: array[int], end: int) -> array[int]:
    """What a request adds to the sequence of the turn that it continues, whose reply ends at `end` of `rendered`.

    A reply that was sampled to its end has its end already; one that was cut by its length gets the template's.
    """
    return rendered[end if turn.end_token is None else end + 1 :]


def echoes(messages: Sequence[dict[str, Any]], turn: Turn) -> bool:
    """Whether a conversation goes on with the reply of a turn as the client saw it."""
    message = messages[turn.num_messages]
    return message.get("role") == "assistant" and reply_of(message) == reply_of(turn.message)


def says(message: dict[str, Any], texts: Iterable[str]) -> bool:
    """Whether an assistant's message has one of these texts anywhere in it."""
    said = [message.get("content"), message.get("reasoning")]
    for call in message.get("tool_calls") or []:
        said += [call["function"]["name"], call["function"]["arguments"]]
    return any(text in part for part in said if isinstance(part, str) for text in texts if text)
