"""What a dialect is: how clients of one kind ask and are answered. What they ask for has the same meaning in all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from ...api.refusals import RequestRefused
from ..chat import Translation, refused
from ..servers import ServerRefused
from ..sessions import Session
from ..streams import BegunTurn
from ..turns import Turn


Fields = TypeVar("Fields", bound=msgspec.Struct)


class LiveAnswer(Protocol):
    """An answer that begins with text, without thoughts, as server-sent events, while it is sampled."""

    def begin(self) -> Iterator[bytes]:
        """What comes before the text."""
        ...

    def text(self, text: str) -> bytes:
        """More of the text."""
        ...

    def end(self, turn: Turn) -> Iterator[bytes]:
        """What comes behind the text: calls of tools, and the end."""
        ...


class Dialect(Protocol):
    """The forms of requests and answers of one kind of client.

    Every dialect has `model` and `stream` in its requests. What `read` returns goes through the same rules and the same
    recorder as a chat completion, so that a conversation is recorded in the same way in whatever words it is held.

    Attributes:
        path (`str`):
            Of its route, behind that of the session.
        keep_alive (`bytes`):
            A sign of life on a stream, before the answer begins and between its text and its calls.
    """

    path: str
    keep_alive: bytes

    def read(self, values: dict[str, Any], session: Session) -> Translation:
        """Say a request in the words of chat completions.

        Raises:
            RequestRefused: It has what those cannot say, or is no request of this dialect.
        """
        ...

    def answer(self, values: dict[str, Any], turn: Turn) -> dict[str, Any]:
        """The answer to the request `values`, whole."""
        ...

    def events(self, values: dict[str, Any], turn: Turn) -> Iterator[bytes]:
        """The same answer as server-sent events."""
        ...

    def live(self, values: dict[str, Any], turn: BegunTurn) -> LiveAnswer:
        """The answer to the request `values`, while it is sampled."""
        ...

    def error(self, exc: RequestRefused) -> dict[str, Any]:
        """What the client is told of a refusal."""
        ...

    def error_events(self, exc: RequestRefused) -> Iterator[bytes]:
        """The same on a stream that had begun."""
        ...


def event(values: dict[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(values, separators=(',', ':'))}\n\n".encode()


def read_fields(values: dict[str, Any], kind: type[Fields]) -> Fields:
    """The fields that a dialect says in its own way, checked.

    Raises:
        RequestRefused: One has another form, or holds what is not text. It is named by its path.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as exc:
        raise refused(
            f"The request cannot be taken: {exc}.",
            "Only text, thoughts, and calls of the agent's own tools are sampled and trained. Tools of a provider run there, and "
            "not here.",
            "Send what the SDK sends, and leave out what has no text.",
        ) from exc


def content_of(texts: Sequence[str]) -> str | list[dict[str, str]]:
    """The content of a message out of texts. One alone is a string, which templates take that take no parts."""
    full = [text for text in texts if text]
    return [{"type": "text", "text": text} for text in full] if len(full) > 1 else "".join(full)


def server_error(exc: RequestRefused) -> dict[str, Any] | None:
    """The error with which a server refused a request; None where it is not the server's word that counts."""
    if not isinstance(exc, ServerRefused) or exc.status_code >= 500:
        return None
    try:
        values = msgspec.json.decode(exc.body)
    except msgspec.DecodeError:
        return None
    error = values.get("error") if isinstance(values, dict) else None
    return error if isinstance(error, dict) else None


def openai_error(exc: RequestRefused) -> dict[str, Any]:
    """A refusal in OpenAI's form; a server's own words as they are."""
    own = server_error(exc)
    if own is not None:
        return {"error": own}
    kind = "rate_limit_error" if exc.status_code == 429 else "invalid_request_error"
    return {"error": {"message": str(exc), "type": kind, "param": exc.field or None, "code": exc.status_code}}
