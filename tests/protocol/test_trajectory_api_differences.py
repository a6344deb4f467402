"""`trl-atropos api` against atroposlib's: random sequences of calls to both, and every difference is on a list.

Both are called in one process, without a socket. What environments and trainers of others do is drawn; after each call the
answers must be equal, or differ in a way that `INTENDED` names. The examples are the same in every run.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from atropos_api import make_registration, restart_api
from atroposlib.api.server import app as upstream_app
from atroposlib.api.utils import (
    find_groups_summing_to_target,
    grab_batch_with_minimum_allocations,
    grab_exact_from_heterogeneous_queue,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.api.app import TrajectoryApp
from trl_atropos.api.options import ApiOptions
from trl_atropos.api.packing import QueuedGroup, choose_batch, choose_batch_with_allocations, indices_summing_to


NUM_EXAMPLES = 150
NUM_PACKINGS = 500

INTENDED = {
    "order": "the oldest batch first, one at a time; atroposlib forms all batches and serves the newest first",
    "formed": "`current_step` and `queue_size` count batches that were handed out, not batches that were formed",
    "refused": "a group that no trainer can use is refused when it is posted; atroposlib takes it, and may lose its batch",
    "registered": "a later registration counts; atroposlib keeps the first one and answers success",
    "poisoned": "groups that come before a trainer wait for it; with atroposlib no trainer can register after them",
    "reset": "after /reset_data everything is as in the beginning; atroposlib keeps `max_token_len` and the newest group",
    "unknown_env": "an environment that is not known gets 404 with a sentence, and negative ids are none; atroposlib: 500",
    "weight": "an environment alone with a weight of 0 or less has the least weight; atroposlib divides by 0: 500",
    "error_text": "the sentence of an error is our own",
}

Body = Any
Call = tuple[str, str, Body]


async def call_app(app: Callable[..., Awaitable[None]], method: str, path: str, body: Body) -> tuple[int, Any]:
    """One request: status, and the answer as JSON or text."""
    data = b"" if body is None else json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"host", b"test")]
    if len(data) > 200:
        data = gzip.compress(data)
        headers.append((b"content-encoding", b"gzip"))
    headers.append((b"content-length", str(len(data)).encode()))
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers},
        **{"client": ("127.0.0.1", 1), "server": ("test", 80)},
    }
    sent: list[dict[str, Any]] = []
    requests = iter([{"type": "http.request", "body": data, "more_body": False}])

    async def receive() -> dict[str, Any]:
        message = next(requests, None)
        if message is None:
            await asyncio.Event().wait()
        return message

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    try:
        await app(scope, receive, send)
    except Exception:
        # Starlette answers 500 and raises what it was.
        return 500, None
    content = b"".join(message.get("body", b"") for message in sent)
    try:
        return sent[0]["status"], json.loads(content)
    except ValueError:
        return sent[0]["status"], content.decode()


def make_group(serial: int, size: int, env_id: int | None, rng: random.Random) -> dict[str, Any]:
    lengths = [rng.randint(1, 6) for _ in range(size)]
    group: dict[str, Any] = {
        "tokens": [[serial, *(rng.randrange(1000) for _ in range(length))] for length in lengths],
        "masks": [[-100] * (length + 1) for length in lengths],
        "scores": [rng.choice([0, 0.25, 1.0, -3]) for _ in lengths],
        "env_id": env_id,
    }
    for name, value in (
        ("inference_logprobs", [[1.0] + [-0.5] * length for length in lengths]),
        ("advantages", []),
        ("messages", [[{"role": "user", "content": "ä"}]] * size),
        ("group_overrides", {"a": {"b": [1, None]}}),
        ("ref_logprobs", None),
        ("not_a_field", 1),
    ):
        if rng.random() < 0.3:
            group[name] = value
    return group


class Both:
    """Both APIs, and what must be known to say which differences are intended.

    The trainer asks for a batch after each post, so that mostly one batch is formed at a time: then the order and the
    counters agree, too. `num_posted` counts the groups, `differences` what was met of `INTENDED`.
    """

    def __init__(self, ours: TrajectoryApp, differences: Counter[str]):
        self.ours = ours
        self.differences = differences
        self.num_posted = 0
        self.registration: dict[str, Any] | None = None

    async def call(self, method: str, path: str, body: Body = None) -> tuple[Any, Any]:
        theirs = await call_app(upstream_app, method, path, body)
        ours = await call_app(self.ours, method, path, body)
        return theirs, ours

    async def same(self, method: str, path: str, body: Body = None) -> Any:
        theirs, ours = await self.call(method, path, body)
        assert theirs == ours, (method, path, body)
        return ours[1]

    def note(self, name: str) -> None:
        assert name in INTENDED
        self.differences[name] += 1

    async def register(self, batch_size: int) -> None:
        values = asdict(make_registration(batch_size=batch_size))
        theirs, ours = await self.call("POST", "/register", values)
        assert theirs[0] == ours[0] == 200
        assert type(theirs[1]["uuid"]) is type(ours[1]["uuid"]) is int
        if self.registration is None:
            self.registration = values
        elif self.registration != values:
            assert (await call_app(self.ours, "GET", "/info", None))[1]["batch_size"] == batch_size
            self.note("registered")
            await call_app(self.ours, "POST", "/register", self.registration)
        await self.same("GET", "/info")

    async def post(self, sizes: list[int], env_id: int | None, is_list: bool, rng: random.Random) -> None:
        groups = []
        for size in sizes:
            self.num_posted += 1
            groups.append(make_group(self.num_posted, size, env_id, rng))
        for body in [groups] if is_list else groups:
            await self.same("POST", "/scored_data_list" if is_list else "/scored_data", body)
            await self.take()

    async def post_what_nobody_can_train(self, kind: str) -> None:
        group = make_group(0, 2, None, random.Random(0))
        if kind == "nan":
            group["scores"] = [float("nan"), 1.0]
        elif kind == "ragged":
            group["masks"][0] = [1]
        elif kind == "empty":
            group.update(tokens=[], masks=[], scores=[])
        else:
            group["tokens"][0][0] = 2**80
        # Only to ours: atroposlib would take it.
        status, answer = await call_app(self.ours, "POST", "/scored_data", group)
        assert status == 422 and len(answer["detail"][0]["msg"]) > 20
        self.note("refused")

    async def post_what_is_no_group(self, change: dict[str, Any], is_list: bool) -> None:
        group = {**make_group(0, 2, None, random.Random(0)), **change}
        body = [group] if is_list else group
        theirs, ours = await self.call("POST", "/scored_data_list" if is_list else "/scored_data", body)
        assert theirs[0] == ours[0] == 422
        assert theirs[1]["detail"][0]["loc"][0] == ours[1]["detail"][0]["loc"][0] == "body"
        self.note("error_text")

    async def take(self) -> None:
        theirs, ours = await self.call("GET", "/batch")
        assert theirs[0] == ours[0] == 200
        if theirs[1] == ours[1]:
            return
        # A list of groups can make several batches at once: then theirs come newest first, and all are counted at once.
        their_batches, our_batches = [theirs[1]["batch"]], [ours[1]["batch"]]
        assert None not in their_batches + our_batches
        while (theirs := await call_app(upstream_app, "GET", "/batch", None))[1]["batch"] is not None:
            their_batches.append(theirs[1]["batch"])
        while (ours := await call_app(self.ours, "GET", "/batch", None))[1]["batch"] is not None:
            our_batches.append(ours[1]["batch"])
        assert their_batches == our_batches[::-1]
        self.note("order")
        self.note("formed")

    async def look(self) -> None:
        await self.same("GET", "/status")
        await self.same("GET", "/info")
        await self.same("GET", "/wandb_info")
        await self.same("GET", "/latest_example")
        await self.same("GET", "/")
        await self.same("GET", "/nothing")
        await self.same("PUT", "/status")

    async def register_environment(self, group_size: int, weight: float, allocation: float | None) -> None:
        answer = await self.same(
            "POST",
            "/register-env",
            {
                "max_token_length": 32,
                "desired_name": "env",
                "weight": weight,
                "group_size": group_size,
                "min_batch_allocation": allocation,
            },
        )
        await self.ask_for_environment(answer["env_id"])

    async def ask_for_environment(self, env_id: int) -> None:
        theirs, ours = await self.call("GET", "/status-env", {"env_id": env_id})
        if theirs == ours:
            return
        if ours[0] == 404:
            self.note("unknown_env")
        else:
            assert theirs[0] == 500 and ours[1]["env_weight"] == 0.01, (theirs, ours)
            self.note("weight")

    async def disconnect(self, env_id: int) -> None:
        theirs, ours = await self.call("POST", "/disconnect-env", {"env_id": env_id})
        if theirs != ours:
            assert theirs[1]["status"] == ours[1]["status"] == "failure"
            self.note("error_text")


actions = st.one_of(
    st.tuples(
        st.just("post"),
        st.lists(st.sampled_from([1, 2, 2, 4, 4, 4, 3]), min_size=1, max_size=4),
        st.sampled_from([None, None, 0, 0, 1, 7]),
        st.booleans(),
    ),
    st.tuples(st.just("register"), st.sampled_from([4, 4, 8])),
    st.tuples(
        st.just("register_environment"),
        st.sampled_from([4, 4, 2, 1]),
        st.sampled_from([1.0, 1.0, 2.5, 0.0, -1.0]),
        st.sampled_from([None, None, None, 0.5, 0.25, 2.0]),
    ),
    st.tuples(st.just("ask_for_environment"), st.sampled_from([0, 0, 1, 5])),
    st.tuples(st.just("disconnect"), st.sampled_from([0, 1, 5])),
    st.tuples(
        st.just("post_what_nobody_can_train"),
        st.sampled_from(["nan", "ragged", "empty", "huge"]),
    ),
    st.tuples(
        st.just("post_what_is_no_group"),
        st.sampled_from([{"tokens": ["x"]}, {"tokens": None}, {"scores": 1}, {"messages": [[{"role": "user"}]]}]),
        st.booleans(),
    ),
    st.tuples(st.just("look")),
    st.tuples(st.just("take")),
)


@asynccontextmanager
async def both_apis(differences: Counter[str]) -> AsyncIterator[Both]:
    restart_api()
    with tempfile.TemporaryDirectory() as directory:
        ours = TrajectoryApp(ApiOptions(db=Path(directory) / "api.db"))
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        events.put_nowait({"type": "lifespan.startup"})
        started = asyncio.Event()

        async def send(message: dict[str, Any]) -> None:
            started.set()

        life = asyncio.create_task(ours({"type": "lifespan"}, events.get, send))
        await started.wait()
        yield Both(ours, differences)
        events.put_nowait({"type": "lifespan.shutdown"})
        await life


def test_any_sequence_of_calls_is_answered_alike_but_for_what_is_intended():
    differences: Counter[str] = Counter()

    async def run(sequence: list[tuple[Any, ...]]) -> None:
        async with both_apis(differences) as both:
            rng = random.Random(0)
            await both.look()
            await both.register(4)
            await both.take()
            for name, *arguments in sequence:
                await getattr(both, name)(*arguments, *([rng] if name == "post" else []))
            await both.take()
            await both.look()

    @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(st.lists(actions, max_size=10))
    def check(sequence: list[tuple[Any, ...]]) -> None:
        asyncio.run(run(sequence))

    check()

    # The sequences reach what they are for. The rest of the list follows below.
    assert differences.keys() == INTENDED.keys() - {"poisoned", "reset"}


def test_what_comes_before_a_trainer_or_after_a_reset_poisons_nothing():
    async def run() -> None:
        async with both_apis(differences) as both:
            await both.post([4], None, False, random.Random(0))
            theirs, ours = await both.call("POST", "/register", asdict(make_registration(batch_size=4)))
            assert theirs[0] == ours[0] == 200
            theirs, ours = await both.call("GET", "/batch")
            assert theirs[1]["message"] == "Trainer not registered. Call /register first."
            assert [group["tokens"][0][0] for group in ours[1]["batch"]] == [1]
            both.note("poisoned")

            restart_api()
            assert (await both.same("GET", "/reset_data")) == "Reset successful"
            await both.same("GET", "/info")
            await both.register(4)
            await both.same("GET", "/reset_data")
            theirs, ours = await both.call("GET", "/info")
            assert theirs == (200, {"batch_size": -1, "max_token_len": 33})
            assert ours == (200, {"batch_size": -1, "max_token_len": -1})
            theirs, ours = await both.call("GET", "/batch")
            assert theirs[0] == 500
            assert ours[1]["message"] == "Trainer not registered. Call /register first."
            await both.same("GET", "/status")
            await both.same("GET", "/wandb_info")
            both.note("reset")

    differences: Counter[str] = Counter()
    asyncio.run(run())
    assert differences.keys() == {"poisoned", "reset"}


# The packers, alone


groups = st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 3, 5]), st.sampled_from([None, 0, 1, 2])), max_size=20)


def as_upstream(queue: list[tuple[int, int | None]]) -> list[dict[str, Any]]:
    return [{"tokens": [[number]] * size, "env_id": env_id} for number, (size, env_id) in enumerate(queue)]


def as_ours(queue: list[tuple[int, int | None]]) -> list[QueuedGroup]:
    return [QueuedGroup(number, size, env_id, 1, 0) for number, (size, env_id) in enumerate(queue)]


def ids(batch: list[Any] | None) -> list[int] | None:
    return None if batch is None else [g["tokens"][0][0] if isinstance(g, dict) else g.id for g in batch]


@settings(max_examples=NUM_PACKINGS, deadline=None, derandomize=True, database=None)
@given(groups, st.sampled_from([1, 2, 4, 8, 16, 6]))
def test_batches_hold_the_groups_that_atroposlib_takes(queue, batch_size):
    theirs, _ = grab_exact_from_heterogeneous_queue(as_upstream(queue), batch_size)
    largest = max((size for size, _ in queue), default=1)
    assert ids(choose_batch(as_ours(queue), batch_size, largest)) == ids(theirs)


@settings(max_examples=NUM_PACKINGS, deadline=None, derandomize=True, database=None)
@given(
    groups,
    st.sampled_from([2, 4, 8, 16, 6]),
    st.dictionaries(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0]), min_size=1),
)
def test_batches_with_allocations_hold_the_groups_that_atroposlib_takes(queue, batch_size, allocations):
    configs = [
        {"registered_id": env_id, "connected": True, "min_batch_allocation": share}
        for env_id, share in allocations.items()
    ]
    theirs, _ = grab_batch_with_minimum_allocations(as_upstream(queue), batch_size, configs)
    largest = max((size for size, _ in queue), default=1)
    assert ids(choose_batch_with_allocations(as_ours(queue), batch_size, largest, allocations)) == ids(theirs)


@settings(max_examples=NUM_PACKINGS, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 9), max_size=9), st.integers(1, 12))
def test_buffers_give_the_groups_that_atroposlib_takes(sizes, target):
    buffer = [{"tokens": [[0]] * size} for size in sizes]
    assert indices_summing_to(sizes, target) == find_groups_summing_to_target(buffer, target)


@pytest.fixture(autouse=True)
def _fresh_upstream():
    restart_api()
    yield
    restart_api()
