"""What the protocol tests share: the real atroposlib API seen from outside, and what is posted to it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import requests
from atroposlib.api.server import app
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from trl_atropos.data.options import DataOptions
from trl_atropos.data.sources import ApiBatches
from trl_atropos.wire.client import AtroposClient, Registration
from trl_atropos.wire.journal import Journal


class RequestRecorder:
    """ASGI middleware that notes what the API was really asked.

    Args:
        app (`ASGIApp`):
            The application that answers.
    """

    def __init__(self, app: ASGIApp):
        self.app = app
        self.requests: list[tuple[str, str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.requests.append((scope["method"], scope["path"]))
        await self.app(scope, receive, send)


class AtroposApi:
    """The running API, seen from outside: what environments and people do to it.

    Args:
        base_url (`str`):
            Root of the API.
        requests (`list[tuple[str, str]]`):
            Method and path of every request so far, the tests' own included.
    """

    def __init__(self, base_url: str, requests: list[tuple[str, str]]):
        self.base_url = base_url
        self.requests = requests

    def post(self, path: str, body: Any) -> requests.Response:
        # json.dumps and not requests' json=, which refuses NaN; environments send it.
        headers = {"Content-Type": "application/json"}
        return requests.post(self.base_url + path, data=json.dumps(body), headers=headers, timeout=10)

    def get(self, path: str, body: Any = None) -> requests.Response:
        return requests.get(self.base_url + path, json=body, timeout=10)

    def post_group(self, num_rollouts: int = 2, **fields: Any) -> requests.Response:
        """Posts one group as an environment does; `fields` replace or add to what it sends."""
        return self.post("/scored_data", make_group(num_rollouts, **fields))

    def register_env(self, *, group_size: int = 2, weight: float = 1.0, **fields: Any) -> dict[str, Any]:
        body = {"max_token_length": 32, "desired_name": "env", "weight": weight, "group_size": group_size, **fields}
        return self.post("/register-env", body).json()

    def count(self, method: str, path: str) -> int:
        return self.requests.count((method, path))


def make_group(num_rollouts: int = 2, **fields: Any) -> dict[str, Any]:
    """A group of rollouts with three tokens, the last two of them trained; rewards 0, 1, 2, ..."""
    group = {
        "tokens": [[5, 6, 7]] * num_rollouts,
        "masks": [[-100, 6, 7]] * num_rollouts,
        "scores": [float(i) for i in range(num_rollouts)],
        "inference_logprobs": [[1.0, -0.5, -0.25]] * num_rollouts,
    }
    return {**group, **fields}


def make_registration(**fields: Any) -> Registration:
    """A registration for batches of 4 rollouts of at most 32 tokens; `fields` replace its values."""
    values = {
        "wandb_group": "group",
        "wandb_project": "project",
        "batch_size": 4,
        "max_token_len": 33,
        "checkpoint_dir": "checkpoints",
        "save_checkpoint_interval": 10,
        "starting_step": 0,
        "num_steps": 100,
    }
    assert values.keys() == asdict(Registration(**values)).keys()
    return Registration(**{**values, **fields})


def restart_api() -> None:
    """Forgets everything, as a new process of `run-api` does: all state of the API lives in `app.state`."""
    app.state = State()


def wait_for_batch(
    client: AtroposClient,
    directory: Path,
    timeout_s: float,
    refresh_interval_s: float = 10.0,
) -> list[Any]:
    """The groups of the next batch, as the trainer waits for them; they are in the journal `directory`."""
    options = DataOptions(refresh_interval=refresh_interval_s, api_timeout_s=5.0)
    # Not as an argument: 0, which asks once, is no option for a run.
    options.batch_timeout_s = timeout_s
    batches = ApiBatches(client, Journal(directory), options, lambda: client.register(make_registration()))
    return next(iter(batches)).raw_groups
