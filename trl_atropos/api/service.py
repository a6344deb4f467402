"""What each route does, without HTTP: the state of the API in memory, and every change of it on the disk first.

All methods run on one event loop. A change is decided in memory, written by the store's thread, and answered after that;
what waits for the disk waits without holding up `/status`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from . import store as jobs
from .counts import Counts
from .environments import allocations_of, shares_of
from .group_queue import GroupQueue
from .messages import EnvironmentId, EnvironmentRegistration, Receipt, Registration
from .options import ApiOptions
from .packing import QueuedGroup, choose_batch, choose_batch_with_allocations, indices_summing_to
from .posts import Post, UnansweredPosts
from .refusals import ApiDatabaseError, RequestRefused
from .scored_data import ReceivedGroup
from .store import Lease, Store


logger = logging.getLogger(__name__)

MAX_BUFFERED_GROUPS = 1024
"""Most groups of one environment that wait for others to make up its group size."""


class TrajectoryService:
    """The trajectory API on a store. Make it on the running event loop.

    `counts` are since the start of the process, `num_starts` are those of servers on this database.
    """

    def __init__(self, store: Store, options: ApiOptions):
        self.options = options
        self.counts = Counts()
        self._store = store
        self.num_starts = store.num_starts
        self._load(store.state)
        store.state = jobs.StoredState()
        self._num_bytes_on_the_way = 0
        self._room = asyncio.Event()
        self._has_failed_to_form = False
        self._generation = 0
        # Batches are handed out, acknowledged and put back one at a time.
        self._batches = asyncio.Lock()

    def _load(self, state: jobs.StoredState) -> None:
        values = state.values
        self.registration: dict[str, Any] | None = values.get("registration")
        self.has_started: bool = values.get("started", False)
        self.step: int = values.get("step", 0)
        self.environments = state.environments
        self.queue = GroupQueue(state.queue)
        self.buffers: dict[int, list[QueuedGroup]] = defaultdict(list)
        for group in state.buffered:
            assert group.env_id is not None, "only groups of an environment are buffered"
            self.buffers[group.env_id].append(group)
        self.leases: dict[str, Lease] = {lease.trainer: lease for lease in state.leases if lease.trainer is not None}
        self._untracked: dict[int, Lease] = {}
        self._latest: QueuedGroup | None = state.queue[-1] if state.queue else None
        self._latest_body: jobs.StoredBody | None = None
        self._next_group_id = state.next_group_id
        self._next_lease_id = state.next_lease_id
        self._posts = UnansweredPosts(state.posts, self.options.retry_window_s)

    # What is stored

    @property
    def num_bytes(self) -> int:
        """Bytes of all bodies that are stored or on their way to the disk."""
        buffered = sum(group.num_bytes for groups in self.buffers.values() for group in groups)
        leased = sum(group.num_bytes for lease in self._all_leases() for group in lease.groups)
        return self.queue.num_bytes + buffered + leased + self._num_bytes_on_the_way

    @property
    def num_groups(self) -> int:
        """Groups that are stored."""
        return (
            len(self.queue)
            + sum(map(len, self.buffers.values()))
            + sum(len(lease.groups) for lease in self._all_leases())
        )

    def _all_leases(self) -> list[Lease]:
        return [*self.leases.values(), *self._untracked.values()]

    def _num_bytes_of(self, env_id: int) -> int:
        return sum(group.num_bytes for group in self.queue if group.env_id == env_id) + sum(
            group.num_bytes for group in self.buffers.get(env_id, ())
        )

    # Posts

    async def wait_for_room(self, num_bytes: int) -> None:
        """Wait until so many bytes more may be stored.

        Raises:
            RequestRefused: There is no room after `hold_s` (503).
        """
        options = self.options
        if num_bytes > options.max_queue_bytes:
            raise RequestRefused(
                f"The body has {num_bytes} bytes, the queue takes {options.max_queue_bytes}.",
                "It will never fit.",
                "Post smaller groups, or raise `--max_queue_bytes`.",
                status_code=413,
            )
        deadline = time.monotonic() + options.hold_s
        while self.num_bytes + num_bytes > options.max_queue_bytes or self.num_groups >= options.max_queue_groups:
            left = deadline - time.monotonic()
            if left <= 0:
                self.counts.num_posts_turned_away += 1
                raise self._full(
                    f"The queue holds {self.num_groups} groups in {self.num_bytes} bytes and is full.",
                    "`--max_queue_bytes` or `--max_queue_groups`",
                )
            self._room.clear()
            try:
                await asyncio.wait_for(self._room.wait(), left)
            except asyncio.TimeoutError:
                continue

    async def post(
        self, groups: Sequence[ReceivedGroup], digest: bytes, is_list: bool, has_client_gone: Callable[[], bool]
    ) -> tuple[dict[str, Any], Post]:
        """Store the groups of one post; return the answer, and what `answered` must be called with.

        `digest` is that of its body, `is_list` whether it went to `/scored_data_list`.

        A post that comes a second time because its answer was lost is not stored again. `has_client_gone` tells whether
        the client broke the connection.

        Raises:
            RequestRefused: An environment has more than its share of the queue (503), or its buffer is full (422).
            ApiDatabaseError: It could not be stored.
        """
        earlier = self._posts.find(digest)
        if earlier is not None:
            answer = await asyncio.shield(earlier.answer)
            self.counts.num_posts_repeated += 1
            logger.info("event=post_repeated digest=%s", digest.hex())
            return ({"groups_processed": len(groups), **answer} if is_list else answer), earlier
        self._check_environments(groups)
        post = self._posts.begin(digest)
        try:
            answer = await self._store_groups(groups, digest, is_list)
        except ApiDatabaseError as exc:
            self._posts.forget(post)
            post.answer.set_exception(exc)
            raise
        post.answer.set_result(answer)
        post.client_is_gone = has_client_gone()
        return answer, post

    def answered(self, post: Post, has_arrived: bool) -> None:
        """Say whether the answer to a post was sent to a client that was still there."""
        if has_arrived:
            self._posts.forget(post)
        else:
            post.client_is_gone = True

    async def _store_groups(self, groups: Sequence[ReceivedGroup], digest: bytes, is_list: bool) -> dict[str, Any]:
        first_id = self._next_group_id
        self._next_group_id += len(groups)
        num_bytes = sum(len(group.body) for group in groups)
        self._num_bytes_on_the_way += num_bytes
        are_buffered = [self._is_buffered(group) for group in groups]
        try:
            await self._write(jobs.insert_groups(first_id, groups, are_buffered, digest))
        finally:
            self._num_bytes_on_the_way -= num_bytes
        # Until the next wait, so that nobody finds half of the post.
        self.counts.num_groups_received += len(groups)
        buffer_sizes, unbuffered = [], []
        for number, (received, is_buffered) in enumerate(zip(groups, are_buffered, strict=True), start=first_id):
            group = QueuedGroup(number, received.num_rollouts, received.env_id, len(received.body), received.missing)
            completed = self._buffer(group) if is_buffered else [group]
            if completed:
                # The newest of them is this one: without it they were not complete.
                self._latest = group
                self._latest_body = jobs.StoredBody(received.body, received.is_gzipped)
            if is_buffered:
                unbuffered += completed
                buffer_sizes.append(
                    sum(buffered.num_rollouts for buffered in self.buffers.get(received.env_id or 0, ()))
                )
            else:
                self._enqueue(group)
        if unbuffered:
            await self._write(jobs.queue_buffered([group.id for group in unbuffered]))
        if not is_list:
            return {"status": "buffered", "buffer_size": buffer_sizes[-1]} if buffer_sizes else {"status": "received"}
        answer = {"status": "received", "groups_processed": len(groups)}
        if buffer_sizes:
            answer |= {"buffered": len(buffer_sizes), "last_buffer_size": buffer_sizes[-1]}
        return answer

    def _is_buffered(self, group: ReceivedGroup) -> bool:
        environment = self._environment(group.env_id)
        return environment is not None and group.num_rollouts != environment["group_size"]

    def _buffer(self, group: QueuedGroup) -> list[QueuedGroup]:
        """Put a group of an unusual size into the buffer of its environment; return what left it for the queue by that."""
        assert group.env_id is not None, "only groups of an environment are buffered"
        environment = self._environment(group.env_id)
        buffer = [*self.buffers.get(group.env_id, ()), group]
        if environment is None:
            # The API was reset while the group was on its way to the disk.
            complete = buffer
        else:
            indices = indices_summing_to([buffered.num_rollouts for buffered in buffer], environment["group_size"])
            complete = [buffer[index] for index in indices]
        self.buffers[group.env_id] = [buffered for buffered in buffer if buffered not in complete]
        for buffered in complete:
            self._enqueue(buffered)
        return complete

    def _enqueue(self, group: QueuedGroup) -> None:
        self.queue.append(group)
        self._has_failed_to_form = False

    def _check_environments(self, groups: Sequence[ReceivedGroup]) -> None:
        for group in groups:
            if group.env_id is None:
                continue
            if self._is_buffered(group) and len(self.buffers.get(group.env_id, ())) >= MAX_BUFFERED_GROUPS:
                raise RequestRefused(
                    f"{MAX_BUFFERED_GROUPS} groups of environment {group.env_id} wait in its buffer, and no sizes among "
                    f"them sum to the registered group_size {self.environments[group.env_id]['group_size']}.",
                    "A group of another size than registered waits for others that make it up.",
                    "Send groups of `--env.group_size` rollouts.",
                )
        limit = self.options.max_env_queue_bytes
        if limit is None:
            return
        for env_id in {group.env_id for group in groups if group.env_id is not None}:
            num_bytes = self._num_bytes_of(env_id)
            if num_bytes + sum(len(group.body) for group in groups if group.env_id == env_id) > limit:
                self.counts.num_posts_turned_away += 1
                raise self._full(
                    f"Environment {env_id} has {num_bytes} bytes in the queue, which is its share.",
                    "`--max_env_queue_bytes`",
                )

    def _full(self, what: str, option: str) -> RequestRefused:
        return RequestRefused(
            what,
            "The trainer is slower than the environments, or none asks for batches.",
            f"Post it again later; or start a trainer, or raise {option}.",
            status_code=503,
            retry_after_s=10,
        )

    # Batches

    async def take_batch(self, trainer: str | None, number: int | None) -> Lease | None:
        """Take the groups of the next batch out of the queue; None if they make none yet.

        A `trainer` that names itself and the number of the batch gets the same batch again until it acknowledges it, or
        asks for a later one, which says the same. Call `arrived` or `not_arrived` with the batch of one that does not.

        Raises:
            RequestRefused: The batch before went to others (409).
            ApiDatabaseError: The database cannot be written.
        """
        async with self._batches:
            return await self._take_batch(trainer, number)

    async def _take_batch(self, trainer: str | None, number: int | None) -> Lease | None:
        if not self.has_started:
            self.has_started = True
            await self._write(jobs.set_value("started", True))
        ended = None
        held = None if trainer is None else self.leases.get(trainer)
        if held is not None:
            assert number is not None and held.number is not None, "who names itself names the batch"
            held.heard_at = time.monotonic()
            if held.given_back and number > held.number:
                raise self._was_given_back(held)
            if held.given_back or number > held.number:
                ended = held
            elif number == held.number and held.num_rollouts == self.info()["batch_size"]:
                self.counts.num_batches_repeated += 1
                logger.info("event=batch_repeated trainer=%s number=%s", trainer, number)
                return held
            else:
                await self._put_back(held)
        await self._put_back_abandoned()
        groups = self._choose()
        if groups is None:
            if ended is not None:
                await self._end(ended)
            return None
        lease = Lease(self._next_lease_id, trainer, number, time.time(), groups)
        self._next_lease_id += 1
        self.queue.remove(groups)
        self.step += 1
        if trainer is None:
            self._untracked[lease.id] = lease
        else:
            self.leases[trainer] = lease
        generation = self._generation
        try:
            await self._write(jobs.hand_out(lease, self.step, ended))
        except ApiDatabaseError:
            self.step -= 1
            self.queue.put_back(groups)
            self._untracked.pop(lease.id, None)
            if trainer is not None:
                self.leases.pop(trainer)
                if ended is not None:
                    self.leases[trainer] = ended
            raise
        if generation != self._generation:
            # Somebody reset the API in the meantime.
            return None
        if ended is not None:
            self._count_end(ended)
        self.counts.num_batches_handed_out += 1
        logger.info(
            "event=batch_handed_out step=%d groups=%d rollouts=%d trainer=%s number=%s queued=%d",
            self.step,
            len(groups),
            lease.num_rollouts,
            trainer,
            number,
            len(self.queue),
        )
        return lease

    async def arrived(self, lease: Lease) -> None:
        """Delete a batch that was sent whole to a trainer that gives no receipts."""
        if self._untracked.pop(lease.id, None) is not None:
            await self._write(jobs.end_lease(lease))
            self._room.set()

    async def not_arrived(self, lease: Lease) -> None:
        """Put a batch back whose trainer broke the connection before it had the whole of it."""
        async with self._batches:
            if self._untracked.pop(lease.id, None) is not None:
                await self._put_back(lease)

    async def acknowledge(self, receipt: Receipt) -> dict[str, Any]:
        """Delete a batch that its trainer has in its journal; if it has a part of it only, say so and keep the batch.

        Raises:
            RequestRefused: The batch went to others because the trainer was silent (409).
        """
        async with self._batches:
            lease = self.leases.get(receipt.trainer)
            if lease is not None and lease.number is not None and receipt.number >= lease.number:
                if lease.given_back:
                    raise self._was_given_back(lease)
                is_last = receipt.number == lease.number
                if is_last and receipt.num_groups not in (None, len(lease.groups)):
                    return {"status": "incomplete", "num_groups": len(lease.groups)}
                await self._end(lease)
        return {"status": "success"}

    def _choose(self) -> list[QueuedGroup] | None:
        """The groups of the next batch. Having failed, it is not tried again before the queue has changed."""
        if self._has_failed_to_form or self.registration is None:
            return None
        batch_size = self.registration["batch_size"]
        allocations = allocations_of(self.environments)
        if self.queue.num_rollouts < batch_size:
            groups = None
        elif allocations:
            groups = choose_batch_with_allocations(self.queue, batch_size, self.queue.max_group_size, allocations)
        else:
            groups = choose_batch(self.queue, batch_size, self.queue.max_group_size)
        self._has_failed_to_form = groups is None
        return groups

    async def _end(self, lease: Lease) -> None:
        await self._write(jobs.end_lease(lease))
        if lease.trainer is not None and self.leases.get(lease.trainer) is lease:
            del self.leases[lease.trainer]
        self._count_end(lease)

    def _count_end(self, lease: Lease) -> None:
        self._room.set()
        if not lease.given_back:
            self.counts.num_batches_acknowledged += 1

    async def _put_back(self, lease: Lease, keeps_memory: bool = False) -> None:
        await self._write(jobs.put_back(lease, self.step - 1, keeps_memory))
        self.step -= 1
        self.queue.put_back(lease.groups)
        self._has_failed_to_form = False
        self.counts.num_batches_put_back += 1
        logger.warning(
            "event=batch_put_back trainer=%s number=%s groups=%d", lease.trainer, lease.number, len(lease.groups)
        )
        lease.groups = []
        lease.given_back = keeps_memory
        if not keeps_memory and lease.trainer is not None:
            self.leases.pop(lease.trainer, None)

    async def _put_back_abandoned(self) -> None:
        """Give the batches of trainers that have been silent for long to whoever asks."""
        before = time.monotonic() - self.options.lease_timeout_s
        for lease in list(self.leases.values()):
            if not lease.given_back and lease.heard_at < before:
                await self._put_back(lease, keeps_memory=True)

    def _was_given_back(self, lease: Lease) -> RequestRefused:
        return RequestRefused(
            f"Batch {lease.number} of trainer {lease.trainer} was given to others.",
            f"The trainer was silent for {self.options.lease_timeout_s:g} s after it had asked for it.",
            "Do not train it; raise `--lease_timeout_s` of `trl-atropos api` if the trainer may be silent for so long.",
            status_code=409,
        )

    def read_body(self, group: QueuedGroup) -> jobs.StoredBody | None:
        """Read the body of a group; call it on the thread for reading. None if it was deleted."""
        if group is self._latest and self._latest_body is not None:
            # Kept, because `/latest_example` shows it also after it was handed out.
            return self._latest_body
        return self._store.read_body(group.id)

    @property
    def latest(self) -> QueuedGroup | None:
        """The newest group that reached the queue, also if it was handed out since; None if there was none."""
        return self._latest

    # Registrations

    async def register(self, registration: Registration) -> dict[str, Any]:
        """Register a trainer. The sizes of a later one count from then on; step counter, queue and environments stay.

        Raises:
            RequestRefused: The batch size is below 1.
        """
        if registration.batch_size < 1:
            raise RequestRefused(
                f"`batch_size` is {registration.batch_size}.",
                "It is the number of rollouts of a batch.",
                "Register with 1 or more.",
                field="batch_size",
            )
        values = msgspec.to_builtins(registration)
        is_first = self.registration is None
        writes = [self._write(jobs.set_value("registration", values))]
        if is_first:
            self.step = registration.starting_step
            writes.append(self._write(jobs.set_value("step", self.step)))
        self.registration = values
        self._has_failed_to_form = False
        await asyncio.gather(*writes)
        logger.info(
            "event=trainer_registered first=%s batch_size=%d max_token_len=%d",
            is_first,
            registration.batch_size,
            registration.max_token_len,
        )
        return {"uuid": uuid.uuid4().int}

    async def register_environment(self, request: EnvironmentRegistration) -> dict[str, Any]:
        """Register an environment, once a trainer has asked for its first batch.

        Raises:
            RequestRefused: Its group size is below 1.
        """
        if request.group_size < 1:
            raise RequestRefused(
                f"`group_size` is {request.group_size}.",
                "It is the number of rollouts of a group.",
                "Set `--env.group_size` to 1 or more.",
                field="group_size",
            )
        if self.registration is None or not self.has_started:
            return {"status": "wait for trainer to start"}
        env_id = len(self.environments)
        namesakes = sum(other["desired_name"] == request.desired_name for other in self.environments)
        environment = {
            "max_context_len": request.max_token_length,
            "weight": request.weight,
            "desired_name": request.desired_name,
            "real_name": f"{request.desired_name}_{namesakes}",
            "registered_id": env_id,
            "registered_at": time.time(),
            "connected": True,
            "min_batch_allocation": request.min_batch_allocation,
            "group_size": request.group_size,
        }
        self.environments.append(environment)
        self._has_failed_to_form = False
        await self._write(jobs.put_environment(env_id, environment))
        logger.info(
            "event=environment_registered env_id=%d name=%s group_size=%d",
            env_id,
            environment["real_name"],
            request.group_size,
        )
        return {
            "status": "success",
            "env_id": env_id,
            "wandb_name": environment["real_name"],
            "checkpoint_dir": self.registration["checkpoint_dir"],
            "starting_step": self.step,
            "checkpoint_interval": self.registration["save_checkpoint_interval"],
            "num_steps": self.registration["num_steps"],
        }

    async def disconnect_environment(self, request: EnvironmentId) -> dict[str, Any]:
        """Let an environment's weight and allocation count no more."""
        environment = self._environment(request.env_id)
        if environment is None:
            return {"status": "failure", "error": f"There is no environment {request.env_id}."}
        environment["connected"] = False
        self._has_failed_to_form = False
        await self._write(jobs.put_environment(request.env_id, environment))
        return {"status": "success"}

    async def reset(self) -> None:
        """Forget the registration, the environments and all groups."""
        await self._write(jobs.reset)
        self._generation += 1
        self._load(jobs.StoredState(next_group_id=self._next_group_id, next_lease_id=self._next_lease_id))
        self._has_failed_to_form = False
        self._room.set()
        logger.warning("event=reset")

    def _environment(self, env_id: int | None) -> dict[str, Any] | None:
        return self.environments[env_id] if env_id is not None and 0 <= env_id < len(self.environments) else None

    # What is shown

    def info(self) -> dict[str, Any]:
        """The answer of `/info`."""
        if self.registration is None:
            return {"batch_size": -1, "max_token_len": -1}
        return {name: self.registration[name] for name in ("batch_size", "max_token_len")}

    def wandb_info(self) -> dict[str, Any]:
        """The answer of `/wandb_info`."""
        registration = self.registration or {}
        return {"group": registration.get("wandb_group"), "project": registration.get("wandb_project")}

    def status(self) -> dict[str, Any]:
        """The answer of `/status`."""
        return {"current_step": self.step, "queue_size": len(self.queue)}

    async def environment_status(self, env_id: int) -> dict[str, Any]:
        """The answer of `/status-env`, of which an environment makes out how far it may run ahead.

        Raises:
            RequestRefused: There is no such environment (404).
        """
        environment = self._environment(env_id)
        if environment is None:
            raise RequestRefused(
                f"There is no environment {env_id}.",
                "It did not register here, or /reset_data was called since.",
                "Start the environment again.",
                status_code=404,
            )
        group_size = max(environment["group_size"], self.queue.max_group_size_of(env_id))
        if group_size != environment["group_size"]:
            environment["group_size"] = group_size
            await self._write(jobs.put_environment(env_id, environment))
        return {
            "current_step": self.step,
            **shares_of(environment, self.environments, self.queue, self.info()["batch_size"]),
        }

    @property
    def failure(self) -> str | None:
        """What the last transaction failed with; None if it did not."""
        return self._store.last_error

    @property
    def commits(self) -> tuple[int, float]:
        """Number of transactions of this process, and the seconds that they took together."""
        return self._store.num_commits, self._store.commit_s

    async def forget_posts(self) -> None:
        """Forget what no client can ask for again; to be called now and then."""
        self._posts.forget_old()
        await self._write(jobs.forget_posts())

    async def _write(self, job: jobs.Job[Any]) -> Any:
        return await asyncio.wrap_future(self._store.submit(job))
