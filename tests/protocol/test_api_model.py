"""Whatever environments do to the real API, the trainer's side answers in time, with its own errors, and trains only what was
posted.

Hypothesis draws sequences of calls: registrations, posts of good and bad groups, batches, resets, restarts. The model in
this file remembers what was posted and why it must be refused, if so; it uses nothing of the code under test. The examples
are the same in every run (`derandomize`); a failing one is printed as a program.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest
from atropos_api import make_registration, restart_api
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_atropos.errors import AtroposBatchLost, AtroposProtocolError, AtroposRegistrationError
from trl_atropos.types import Rollout
from trl_atropos.wire.client import AtroposClient
from trl_atropos.wire.parse import WireLimits, parse_batch


NUM_EXAMPLES = 2000
MAX_CALLS = 8
DEADLINE_S = 30.0
"""For each call of the client. The slowest request of the API takes some milliseconds, on a busy machine seconds."""

LIMITS = WireLimits(vocab_size=1000, max_length=12)
SENTINEL = 1.0
NOT_TAKEN = "422"

Group = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A change of a good group, and why the group must be refused then; None: it must be trained as it was."""

    change: Callable[[Group], Any]
    reason: str | None = None


def set_last(name: str, value: Any) -> Callable[[Group], Any]:
    """Replaces the last value of the last rollout, which is a trained one; for `scores` its score."""

    def change(group: Group) -> None:
        values = group[name] if name == "scores" else group[name][-1]
        values[-1] = value

    return change


def set_rollout(name: str, value: Callable[[list[int]], Any]) -> Callable[[Group], Any]:
    """Replaces the field of the last rollout by something made from its tokens."""
    return lambda group: group[name].__setitem__(-1, value(group["tokens"][-1]))


def lengthen(group: Group) -> None:
    for name in ("tokens", "masks", "inference_logprobs"):
        group[name][-1] *= LIMITS.max_length


def empty(group: Group) -> None:
    group.update(tokens=[], masks=[], scores=[], inference_logprobs=[])


def as_text(group: Group) -> None:
    """The API reads numbers in strings as numbers."""
    for name in ("tokens", "masks"):
        group[name] = [[str(value) for value in values] for values in group[name]]


def drop_optional(group: Group) -> None:
    del group["inference_logprobs"]


VARIANTS = {
    # good
    "plain": Variant(lambda group: None),
    "numbers in strings": Variant(as_text),
    "no logprobs": Variant(drop_optional),
    "empty optionals": Variant(lambda group: group.update(inference_logprobs=[], advantages=[], overrides=[])),
    "nulls": Variant(lambda group: group.update(inference_logprobs=None, messages=None, images=None)),
    "messages": Variant(
        lambda group: group.update(messages=[[{"role": "user", "content": "?", "reward": 1}]] * len(group["tokens"]))
    ),
    "policy version": Variant(lambda group: group["group_overrides"].update(policy_version=3)),
    "unknown option": Variant(lambda group: group.update(priority=1, overrides=[{"top_p": 0.5}])),
    # poison: the API takes it, and loses the whole batch when it is to write it
    "NaN score": Variant(set_last("scores", math.nan), "scores"),
    "infinite score": Variant(set_last("scores", math.inf), "scores"),
    "NaN logprob": Variant(set_last("inference_logprobs", math.nan), "inference_logprobs"),
    # huge
    "score beyond float32": Variant(set_last("scores", 1e300), "scores"),
    "token of 80 bits": Variant(set_last("tokens", 2**80), "tokens"),
    "mask of 80 bits": Variant(set_last("masks", -(2**80)), "masks"),
    "logprob beyond float32": Variant(set_last("inference_logprobs", -1e300), "inference_logprobs"),
    "too long": Variant(lengthen, "too_long"),
    # ragged
    "mask too short": Variant(set_rollout("masks", lambda tokens: tokens[1:]), "masks"),
    "logprobs too long": Variant(set_rollout("inference_logprobs", lambda tokens: [-1.0] * 99), "inference_logprobs"),
    "advantages too short": Variant(
        lambda group: group.update(advantages=[[1.0]] * len(group["tokens"])), "advantages"
    ),
    "a score too many": Variant(lambda group: group["scores"].append(0.0), "scores"),
    "a mask too few": Variant(lambda group: group["masks"].pop(), "masks"),
    "no tokens": Variant(set_rollout("tokens", lambda tokens: []), "tokens"),
    "no rollouts": Variant(empty, "tokens"),
    # wrong
    "mask of 0 and 1": Variant(set_rollout("masks", lambda tokens: [1] * len(tokens)), "masks"),
    "nothing trained": Variant(set_rollout("masks", lambda tokens: [-100] * len(tokens)), "masks"),
    "token outside": Variant(set_last("tokens", LIMITS.vocab_size), "vocabulary"),
    "negative token": Variant(set_last("tokens", -1), "vocabulary"),
    "logprob above 0": Variant(set_last("inference_logprobs", 0.5), "inference_logprobs"),
    "images": Variant(lambda group: group.update(images=["pixels"]), "images"),
    "temperature 0": Variant(lambda group: group.update(generation_params={"temperature": 0}), "temperature"),
    "flag that is no flag": Variant(lambda group: group.update(overrides=[{"set_advantage_to_zero": 1}]), "overrides"),
    "policy version -1": Variant(lambda group: group["group_overrides"].update(policy_version=-1), "policy_version"),
    # wrong types, which the API refuses itself
    "text": Variant(set_last("tokens", "five"), NOT_TAKEN),
    "fraction": Variant(set_last("tokens", 5.5), NOT_TAKEN),
    "null": Variant(lambda group: group.update(scores=None), NOT_TAKEN),
    "flat": Variant(lambda group: group.update(tokens=[5, 6]), NOT_TAKEN),
    "turn without content": Variant(lambda group: group.update(messages=[[{"role": "user"}]]), NOT_TAKEN),
}
POISON = {"NaN score", "infinite score", "NaN logprob"}
GOOD = [name for name, variant in VARIANTS.items() if variant.reason is None]


def make_good_group(seed: int, num_rollouts: int) -> Group:
    """A group of rollouts of 2 to 8 tokens: the last token is trained, any other may be."""
    rng = random.Random(seed)
    group: Group = {"tokens": [], "masks": [], "scores": [], "inference_logprobs": []}
    for number in range(num_rollouts):
        # Above 1, so that a mask of 0 and 1 is never right.
        tail = [rng.randrange(2, LIMITS.vocab_size) for _ in range(rng.randint(1, 7))]
        trained = [rng.random() < 0.5 for _ in tail[1:]] + [True]
        group["tokens"].append(tail)
        group["masks"].append([token if t else -100 for token, t in zip(tail, trained, strict=True)])
        # Eighths are exact in float32.
        group["inference_logprobs"].append([-(i + 1) / 8 if t else SENTINEL for i, t in enumerate(trained)])
        group["scores"].append(number / 4)
    return group


@dataclass(frozen=True)
class Post:
    """An environment posts groups, one by one or all at once, and the trainer asks for some batches."""

    num_rollouts: int
    seeds_and_variants: list[tuple[int, str]]
    env_id: int | None
    is_list: bool
    is_gzipped: bool
    num_takes: int


@dataclass(frozen=True)
class Register:
    """A trainer registers, this one or another one."""

    batch_size: int


@dataclass(frozen=True)
class RegisterEnvironment:
    """An environment registers, with numbers that BaseEnv lets through."""

    group_size: int
    weight: float
    min_batch_allocation: float | None


@dataclass(frozen=True)
class Forget:
    """The API forgets everything, after which the trainer may register again."""

    is_restart: bool
    registers_again: bool


Call = Post | Register | RegisterEnvironment | Forget | str

posts = st.builds(
    Post,
    # Groups that fill a batch of 4, alone or together, are the rule: most sequences are to end in batches.
    st.sampled_from([4, 4, 4, 4, 2, 1, 3]),
    st.lists(
        st.tuples(st.integers(0, 2**16), st.sampled_from(GOOD) | st.sampled_from(list(VARIANTS))),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([None, None, None, 0, 1, 9, -1]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 4),
)
other_calls = (
    st.sampled_from(["take_batch", "ask_for_status"])
    | st.builds(Register, st.sampled_from([4, 4, 2, 8]))
    | st.builds(Forget, st.booleans(), st.booleans())
    | st.builds(
        RegisterEnvironment,
        st.sampled_from([4, 4, 2, 1, 0, -1]),
        st.sampled_from([1.0, 0.0, -1.0]),
        st.sampled_from([None, None, None, 0.5, 2.0, math.nan]),
    )
)
calls: st.SearchStrategy[list[Call]] = st.lists(posts | posts | other_calls, min_size=1, max_size=MAX_CALLS)


class ApiModel:
    """The API, and what was posted to it since it forgot everything."""

    def __init__(self, base_url: str, seen: Counter[str]):
        restart_api()
        self.address = urlsplit(base_url).netloc
        self.client = AtroposClient(base_url, read_timeout_s=DEADLINE_S)
        self.seen = seen
        self.num_posted = 0
        self.held: dict[int, tuple[Group, str]] = {}
        self.has_poison = False

    def run(self, sequence: Iterable[Call]) -> None:
        with self.client:
            for call in sequence:
                if isinstance(call, Post):
                    self.post_groups(call)
                    for _ in range(call.num_takes):
                        self.take_batch()
                elif isinstance(call, Register):
                    self.register(call.batch_size)
                elif isinstance(call, RegisterEnvironment):
                    self.register_environment(call)
                elif isinstance(call, Forget):
                    self.forget(call)
                else:
                    getattr(self, call)()

    def register(self, batch_size: int) -> None:
        with self.our_errors_only():
            self.client.register(make_registration(batch_size=batch_size))

    def register_environment(self, call: RegisterEnvironment) -> None:
        status, answer = self.request(
            "POST", "/register-env", {"max_token_length": 32, "desired_name": "env", **asdict(call)}
        )
        assert status == 200
        allocation = call.min_batch_allocation
        # The API cannot form a batch with it, and answers as if it had lost one.
        self.has_poison |= (
            json.loads(answer)["status"] == "success" and allocation is not None and math.isnan(allocation)
        )

    def post_groups(self, call: Post) -> None:
        posted = []
        for seed, name in call.seeds_and_variants:
            self.num_posted += 1
            good = with_serial(make_good_group(seed, call.num_rollouts), self.num_posted, call.env_id)
            body = copy.deepcopy(good)
            VARIANTS[name].change(body)
            posted.append((self.num_posted, good, name, body))
        # One of a wrong type costs those that are posted with it.
        for batch in [posted] if call.is_list else [[entry] for entry in posted]:
            bodies = [body for *_, body in batch]
            path, value = ("/scored_data_list", bodies) if call.is_list else ("/scored_data", bodies[0])
            status, answer = self.request("POST", path, value, call.is_gzipped)
            is_refused = any(VARIANTS[name].reason == NOT_TAKEN for _, _, name, _ in batch)
            # 500: the size of a group breaks the API's own packing. It has kept the group all the same.
            assert status == 422 if is_refused else status in (200, 500), answer
            if not is_refused:
                self.held.update({serial: (good, name) for serial, good, name, _ in batch})
                self.has_poison |= any(word in json.dumps(bodies) for word in ("NaN", "Infinity"))

    def take_batch(self) -> None:
        with self.our_errors_only():
            try:
                raw_groups = self.client.fetch_batch()
            except AtroposBatchLost:
                assert self.has_poison
                raise
            if raw_groups is None:
                return
            batch = parse_batch(raw_groups, LIMITS)
            refused = {rejected.index: rejected.reason for rejected in batch.rejected}
            accepted = iter(batch.groups)
            for index, raw in enumerate(raw_groups):
                # At most once: what is taken out of the model is not found a second time.
                good, name = self.held.pop(raw["group_overrides"]["serial"])
                assert refused.get(index) == VARIANTS[name].reason, name
                self.seen[name] += 1
                if index not in refused:
                    group = next(accepted)
                    assert group.env_id == good["env_id"]
                    assert set(group.unknown_fields) == expected_unknown_fields(name)
                    assert [as_posted(rollout) for rollout in group.rollouts] == expected_rollouts(good, name)
            assert next(accepted, None) is None

    def ask_for_status(self) -> None:
        with self.our_errors_only():
            self.client.status()
        self.request("GET", "/status-env", {"env_id": 0})

    def forget(self, call: Forget) -> None:
        if call.is_restart:
            restart_api()
        else:
            with self.our_errors_only():
                self.client.reset_data()
        self.held.clear()
        self.has_poison = False
        if call.registers_again:
            self.register(4)
            self.take_batch()

    def request(self, method: str, path: str, body: Any, is_gzipped: bool = False) -> tuple[int, bytes]:
        """What an environment sends: status and body of the answer."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        if is_gzipped:
            data, headers = gzip.compress(data), {**headers, "Content-Encoding": "gzip"}
        with closing(HTTPConnection(self.address, timeout=DEADLINE_S)) as connection:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, response.read()

    @contextmanager
    def our_errors_only(self) -> Iterator[None]:
        """The API is alive all the time: an error about the connection would be a wrong one."""
        start = time.monotonic()
        try:
            yield
        except (AtroposRegistrationError, AtroposProtocolError) as error:
            self.seen[type(error).__name__] += 1
        assert time.monotonic() - start < DEADLINE_S


def with_serial(plain: Group, serial: int, env_id: int | None) -> Group:
    """The group with its number where it survives whatever is done to the tokens, and in the tokens themselves."""
    return {
        **plain,
        "tokens": [[serial, *tokens] for tokens in plain["tokens"]],
        "masks": [[-100, *masks] for masks in plain["masks"]],
        "inference_logprobs": [[SENTINEL, *logprobs] for logprobs in plain["inference_logprobs"]],
        "group_overrides": {"serial": serial},
        "env_id": env_id,
    }


def as_posted(rollout: Rollout) -> dict[str, Any]:
    """What is trained of a rollout, in the form of the wire."""
    logprobs = rollout.inference_logprobs
    return {
        "tokens": rollout.input_ids.tolist(),
        "masks": rollout.labels.tolist(),
        "score": rollout.reward,
        "inference_logprobs": None if logprobs is None else logprobs.nan_to_num(nan=SENTINEL).tolist(),
        "policy_version": rollout.policy_version,
        "num_messages": 0 if rollout.messages is None else len(rollout.messages),
    }


def expected_rollouts(good: Group, name: str) -> list[dict[str, Any]]:
    return [
        {
            "tokens": tokens,
            "masks": good["masks"][i],
            "score": good["scores"][i],
            "inference_logprobs": None
            if name in ("no logprobs", "empty optionals", "nulls")
            else good["inference_logprobs"][i],
            "policy_version": 3 if name == "policy version" else None,
            "num_messages": 1 if name == "messages" else 0,
        }
        for i, tokens in enumerate(good["tokens"])
    ]


def expected_unknown_fields(name: str) -> set[str]:
    # The API drops fields that it does not know; what is in its objects arrives.
    return {"group_overrides.serial"} | ({"overrides.top_p"} if name == "unknown option" else set())


# What the API hands out alone; it refuses the others itself, or cannot write them, or never has a batch full of them.
HANDED_OUT = sorted(
    {name for name, variant in VARIANTS.items() if variant.reason != NOT_TAKEN} - POISON - {"no rollouts"}
)


@pytest.mark.parametrize("name", HANDED_OUT)
def test_a_batch_of_one_group_is_trained_or_refused_as_its_variant_says(served_app, name):
    seen: Counter[str] = Counter()
    model = ApiModel(served_app[0], seen)
    assert model.request("POST", "/register", asdict(make_registration()))[0] == 200
    model.run(["take_batch", Post(4, [(1, name)], env_id=None, is_list=False, is_gzipped=False, num_takes=1)])
    assert seen[name] == 1


def test_any_sequence_of_calls_ends_in_time_with_our_errors_and_trains_what_was_posted(served_app):
    base_url, _ = served_app
    seen: Counter[str] = Counter()
    registration = asdict(make_registration())

    # Each call of the client has a deadline of its own.
    @settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(starts_as_trainers_do=st.integers(0, 9), sequence=calls)
    def check(starts_as_trainers_do: int, sequence: list[Call]) -> None:
        model = ApiModel(base_url, seen)
        if starts_as_trainers_do:
            assert model.request("POST", "/register", registration)[0] == 200
            sequence = ["take_batch", *sequence]
        model.run(sequence)

    check()

    # The sequences reach what they are for: batches with groups to train and to refuse, and both kinds of the client's errors.
    num_trained = sum(seen[name] for name in GOOD)
    num_refused = sum(seen[name] for name in set(HANDED_OUT) - set(GOOD))
    assert num_trained > NUM_EXAMPLES / 5
    assert num_refused > NUM_EXAMPLES / 20
    assert seen.keys() >= {AtroposBatchLost.__name__, AtroposRegistrationError.__name__}
