"""A small ASGI application in the place of vLLM, and requests to our middleware around it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple

from trl_atropos.wire.rollout_key import rollout_key


PROMPT = [7, 11, 13]
INNER = "/inference/v1/generate"


class Answer(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class TinyServer:
    """An ASGI application that answers each path with a fixed status and body, and records what it was asked.

    Args:
        answers (`dict[str, tuple[int, bytes]]`):
            Path -> status and body; any other path is a 404.
    """

    def __init__(self, answers: dict[str, tuple[int, bytes]]):
        self.answers = answers
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        chunks, more = [], True
        while more:
            message = await receive()
            chunks.append(message["body"])
            more = message.get("more_body", False)
        self.scopes.append(scope)
        self.bodies.append(b"".join(chunks))
        status, body = self.answers.get(scope["path"], (404, b'{"detail":"Not Found"}'))
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-server", b"tiny")]})
        # In two parts: a body may come in any number of them.
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        await send({"type": "http.response.body", "body": body[1:]})

    @property
    def paths(self) -> list[str]:
        return [scope["path"] for scope in self.scopes]

    def header(self, name: bytes) -> list[bytes]:
        """The values of a header of the last request."""
        return [value for key, value in self.scopes[-1]["headers"] if key.lower() == name]

    @property
    def inner(self) -> dict[str, Any]:
        """The last request to vLLM's own route."""
        assert self.paths[-1] == INNER
        return json.loads(self.bodies[-1])


def choice(index: int = 0, token_ids: tuple[int, ...] = (3, 4), **fields: Any) -> dict[str, Any]:
    """A choice as vLLM's route answers it; the logprob of token id i is -i / 8."""
    content = [{"token": f"token_id:{i}", "token_id": i, "logprob": -i / 8, "top_logprobs": []} for i in token_ids]
    values = {"index": index, "token_ids": list(token_ids), "finish_reason": "stop", "logprobs": {"content": content}}
    return {**values, **fields}


def server_of(*choices: dict[str, Any], **fields: Any) -> TinyServer:
    body = json.dumps({"request_id": "1", "choices": list(choices) or [choice()], **fields}).encode()
    tokenized = json.dumps({"tokens": [20, 21], "count": 2}).encode()
    return TinyServer({INNER: (200, body), "/tokenize": (200, tokenized), "/v1/models": (200, b'{"data":[]}')})


def http_scope(path: str, method: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"a=1",
        "root_path": "",
        "headers": headers,
    }


def call(app: Any, path: str, *parts: bytes, method: str = "POST", headers: Any = (), **scope: Any) -> Answer:
    """One request; each of `parts` is one message of its body. After the body the caller hangs up."""
    waiting = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts or (b"",), start=1)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({**http_scope(path, method, list(headers)), **scope}, receive, send))
    assert [message["type"] for message in sent[:1]] == ["http.response.start"]
    body = b"".join(message["body"] for message in sent[1:])
    return Answer(sent[0]["status"], sent[0]["headers"], body)


def generate(app: Any, headers: Any = (), **fields: Any) -> Answer:
    body = {"prompt": {"prompt_token_ids": PROMPT}, **fields}
    return call(app, "/generate", json.dumps(body).encode(), headers=headers)


def policy_versions(app: Any, *sequences: list[int]) -> Answer:
    body = json.dumps({"rollout_keys": [rollout_key(sequence, len(PROMPT)) for sequence in sequences]}).encode()
    return call(app, "/atropos/policy_versions", body)
