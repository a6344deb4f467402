"""Why no group comes from an environment: what Atropos drops, swallows or waits for, counted and said."""

from __future__ import annotations

import asyncio
import functools
import logging
import statistics
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any


logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 20.0
"""Without a group for so long the reasons are said; the next time after twice as long, until a group comes."""

MIN_ANSWER_TOKENS = 10
"""Many environments leave out answers that are shorter."""

MAX_LENGTHS = 1000
"""Of so many answers the lengths are kept."""


class Delivery:
    """What became of the groups of one environment. Written by its event loop, read by the thread that reports."""

    def __init__(self, env: Any):
        self.env = env
        self.num_sent = 0
        self.num_running = 0
        self.num_no_group = 0
        self.num_equal_rewards = 0
        self.equal_rewards: Counter[float] = Counter()
        self.num_too_long = 0
        self.wrong_sizes: Counter[int] = Counter()
        self.refusals: Counter[int] = Counter()
        self.exceptions: Counter[str] = Counter()
        self.lengths: list[int] = []
        self.waits_for_trainer = False
        self.is_registered = False
        self.is_queue_full = False

    def note_answer(self, num_tokens: int) -> None:
        """Count an answer of the policy."""
        if len(self.lengths) < MAX_LENGTHS:
            self.lengths.append(num_tokens)

    def note_exception(self, where: str, exc: BaseException) -> None:
        """Count an exception that Atropos logs in one line and swallows. The first of its kind is shown whole."""
        cause = exc
        # tenacity: what it gave up on, not that it did, also where one retry is inside of another.
        while (last := getattr(cause, "last_attempt", None)) is not None and last.exception() is not None:
            cause = last.exception()
        kind = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        if not any(known.partition(":")[0] == type(cause).__name__ for known in self.exceptions):
            logger.warning("%s failed; Atropos drops the group and goes on. Shown once:", where, exc_info=cause)
        self.exceptions[kind] += 1

    @contextmanager
    def noting(self, where: str) -> Iterator[None]:
        """Note what is raised inside, unless it was cancelled, and let it pass."""
        try:
            yield
        except asyncio.CancelledError:
            raise
        except BaseException as exc:
            self.note_exception(where, exc)
            raise

    def note_groups(self, groups: Any) -> int:
        """Count what `handle_send_to_api` will do with groups, by its own rules; return how many it will keep."""
        config, max_len = self.env.config, self.env.max_token_len
        num_kept = 0
        for group in groups if isinstance(groups, list) else [groups]:
            if group is None:
                self.num_no_group += 1
                continue
            if not isinstance(group, dict):
                # Trajectories that nobody scored: sending them raises, which is noted there.
                continue
            rollouts = group.get("tokens") or []
            expected = (group.get("group_overrides") or {}).get("group_size", config.group_size)
            scores = group.get("scores") or []
            if len(rollouts) != expected:
                self.wrong_sizes[len(rollouts)] += 1
            elif config.ensure_scores_are_not_same and len(set(scores)) == 1:
                self.num_equal_rewards += 1
                self.equal_rewards[scores[0]] += 1
            elif max_len > 0 and any(len(tokens) >= max_len for tokens in rollouts):
                self.num_too_long += 1
            else:
                num_kept += 1
        return num_kept

    def note_status(self, status: dict[str, Any]) -> None:
        """Remember whether the API's queue has room for this environment."""
        config = self.env.config
        waiting = status.get("queue_size", 0) * config.group_size
        self.is_queue_full = 0 < config.max_batches_offpolicy * config.batch_size <= waiting

    def reasons(self) -> list[str]:
        """Sentences on why no group came, the most likely first; never empty."""
        config = self.env.config
        found = []
        servers = [server for server in self.env.server.servers if not server.server_healthy]
        if servers:
            urls = ", ".join(str(server.config.base_url) for server in servers)
            found.append(
                f"The server at {urls} does not answer its health check, and requests wait for it: start it, or correct "
                "--openai.base_url."
            )
        for kind, count in self.exceptions.most_common(3):
            found.append(f"{count} groups were lost by {kind}")
        for status, count in self.refusals.items():
            found.append(
                f"{count} posts were refused by the API with HTTP {status}: what the environment sends lacks a field or has a "
                "wrong type; the API's log says which."
            )
        if self.num_equal_rewards:
            rewards = ", ".join(f"{reward:g} in {count}" for reward, count in self.equal_rewards.most_common(3))
            found.append(
                f"{self.num_equal_rewards} groups were dropped because all their rewards were equal ({rewards}): take an "
                "easier or harder task, or a larger --env.group_size; --env.ensure_scores_are_not_same false sends them."
            )
        if self.wrong_sizes:
            sizes = ", ".join(f"{count} of {size}" for size, count in sorted(self.wrong_sizes.items()))
            found.append(
                f"Groups were dropped because they had not {config.group_size} rollouts ({sizes}). {self._on_lengths()}"
            )
        if self.num_no_group:
            found.append(
                f"{self.num_no_group} times the environment itself returned no group. Files do so when all rewards are "
                f"equal, mostly because all answers failed: take an easier task or a better model. {self._on_lengths()}"
            )
        if self.num_too_long:
            found.append(
                f"{self.num_too_long} groups were dropped because a rollout had {self.env.max_token_len} tokens or more, "
                "what the trainer registered: lower --env.max_token_length or raise the trainer's --max_length."
            )
        if self.waits_for_trainer:
            found.append(
                f"The API at {config.rollout_server_url} says that no trainer has asked for data: start the trainer."
            )
        if self.is_queue_full:
            found.append(
                "The API's queue is full and waits for the trainer: it has as many groups as --env.max_batches_offpolicy "
                f"{config.max_batches_offpolicy} allows. Nothing is wrong unless the trainer stands."
            )
        if self.num_running and not found:
            found.append(f"{self.num_running} groups are being sampled and none is done yet.")
        if self.is_registered and not found:
            found.append(
                "The environment is registered and has begun no task: Atropos waits five seconds before the first, or "
                "get_next_item() returns None."
            )
        return found or [
            f"The environment has not begun to sample: its setup() or its registration with {config.rollout_server_url} "
            "is not done, or get_next_item() returns None."
        ]

    def _on_lengths(self) -> str:
        if not self.lengths:
            return "Files also leave out answers that are too short."
        median = statistics.median(self.lengths)
        said = f"The answers had {min(self.lengths)} to {max(self.lengths)} tokens, half of them at most {median:g}"
        if min(self.lengths) < MIN_ANSWER_TOKENS:
            return (
                f"{said}: files leave out answers that are shorter than {MIN_ANSWER_TOKENS} tokens or so, which makes "
                "groups smaller. Ask for longer answers, or take another model."
            )
        return f"{said}."


def watch_environments() -> list[Delivery]:
    """Watch each environment that this process makes, from its start to its end. Call it once, after the shims.

    Returns:
        `list[Delivery]`: what is noted of them; each is added when it is made.
    """
    from atroposlib.envs.base import BaseEnv

    original = BaseEnv.__init__
    deliveries: list[Delivery] = []

    @functools.wraps(original)
    def init(env: Any, *args: Any, **kwargs: Any) -> None:
        original(env, *args, **kwargs)
        delivery = Delivery(env)
        deliveries.append(delivery)
        _note_calls(env, delivery)
        for name in ("env_manager", "process_manager"):
            setattr(env, name, _reporting(getattr(env, name), delivery))

    BaseEnv.__init__ = init
    return deliveries


def _note_calls(env: Any, delivery: Delivery) -> None:
    """Note what this environment does, by wrapping methods of the instance; they behave as before."""
    collect, postprocess = env.collect_trajectories, env.postprocess_histories
    send, post = env.handle_send_to_api, env._post_json_with_compression
    register, status = env._register_env, env.get_status
    managed_server = env.server.managed_server

    @functools.wraps(collect)
    async def collect_trajectories(item: Any) -> Any:
        delivery.num_running += 1
        try:
            with delivery.noting("collect_trajectories"):
                groups, backlog = await collect(item)
        finally:
            delivery.num_running -= 1
        # An empty list is what many files return for "no group"; Atropos does nothing with either.
        if not groups:
            delivery.num_no_group += 1
        return groups, backlog

    @functools.wraps(postprocess)
    async def postprocess_histories(trajectories: Any) -> Any:
        with delivery.noting("postprocess_histories"):
            groups = await postprocess(trajectories)
        if not groups:
            delivery.num_no_group += 1
        return groups

    @functools.wraps(send)
    async def handle_send_to_api(
        scored_data: Any, item: Any = None, do_send_to_api: bool = True, **kwargs: Any
    ) -> None:
        num_kept = delivery.note_groups(scored_data) if scored_data else 0
        with delivery.noting("handle_send_to_api"):
            await send(scored_data, item, do_send_to_api, **kwargs)
        if not do_send_to_api:
            # `process` writes them to a file.
            delivery.num_sent += num_kept

    @functools.wraps(post)
    @asynccontextmanager
    async def post_json(session: Any, url: str, payload: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with post(session, url, payload, **kwargs) as response:
            if response.status < 400:
                delivery.num_sent += len(payload) if isinstance(payload, list) else 1
            else:
                delivery.refusals[response.status] += 1
            yield response

    @functools.wraps(register)
    async def register_env() -> Any:
        answer = await register()
        delivery.is_registered = answer["status"] == "success"
        delivery.waits_for_trainer = not delivery.is_registered
        if delivery.is_registered:
            logger.info(
                "Registered as environment %d of the API. The trainer's metrics of it are env/env_%d/..., unless --env_names "
                "has another name.",
                *(answer["env_id"], answer["env_id"]),
            )
        return answer

    @functools.wraps(status)
    async def get_status() -> None:
        await status()
        delivery.note_status(env.status_dict)

    @functools.wraps(managed_server)
    @asynccontextmanager
    async def managed(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with managed_server(*args, **kwargs) as opened:
            note_node = opened._create_sequence_node

            def create_node(*args: Any, **kwargs: Any) -> Any:
                delivery.note_answer(len(kwargs["output_tokens"]))
                return note_node(*args, **kwargs)

            opened._create_sequence_node = create_node
            yield opened

    env.collect_trajectories, env.postprocess_histories = collect_trajectories, postprocess_histories
    env.handle_send_to_api, env._post_json_with_compression = handle_send_to_api, post_json
    env._register_env, env.get_status = register_env, get_status
    env.server.managed_server = managed


def _reporting(manage: Callable[[], Awaitable[None]], delivery: Delivery) -> Callable[[], Awaitable[None]]:
    @functools.wraps(manage)
    async def manage_and_report() -> None:
        is_over = threading.Event()
        # A thread: an environment that computes holds up its event loop.
        thread = threading.Thread(target=_report, args=(delivery, is_over), name="delivery", daemon=True)
        thread.start()
        try:
            await manage()
        finally:
            is_over.set()
            thread.join()

    return manage_and_report


def _report(delivery: Delivery, is_over: threading.Event) -> None:
    """Say why nothing comes, while nothing comes."""
    num_sent, start = 0, time.monotonic()
    interval_s = REPORT_INTERVAL_S
    while not is_over.wait(interval_s):
        if delivery.num_sent > num_sent:
            num_sent, start, interval_s = delivery.num_sent, time.monotonic(), REPORT_INTERVAL_S
            continue
        logger.warning(
            "No group was sent for %.0f s, %d in all. Why:\n%s",
            time.monotonic() - start,
            num_sent,
            "\n".join(f"  - {reason}" for reason in delivery.reasons()),
        )
        interval_s *= 2
