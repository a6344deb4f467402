"""Why the Atropos API gives no batch: its traps, as they show from outside."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import AtroposConnectionError, AtroposDataTimeout, AtroposProtocolError
from ..wire.client import UNREGISTERED, ApiStatus, AtroposClient, EnvironmentStatus
from .finding import Check, diagnose


NO_STATUS = ApiStatus(current_step=0, queue_size=0)
"""What the API shows before a trainer registers."""

MAX_ENVIRONMENTS = 256
"""How many environments are asked about."""


@dataclass(frozen=True)
class ApiFacts:
    """What a look at the Atropos API showed; `error` says why there is nothing else to know.

    `info` is the registered `batch_size` (rollouts) and `max_token_len` (tokens). `/status` was asked at the start and
    at the end of the look, `watch_s` seconds apart. `environments` are those that the API knows and can say something
    of. `keeps_batches` is whether it is `trl-atropos api`, which has none of the traps of order and registration. `latest_group_size` counts the rollouts of the newest group that reached the queue: 0 if there was none, None
    if it cannot be written as JSON. What a trainer registers is None where it is not known. `has_waiting_trainer` is
    whether a trainer is known to have registered and to get nothing from `/batch`.
    """

    url: str
    error: str | None = None
    info: tuple[int, int] = (UNREGISTERED, UNREGISTERED)
    first_status: ApiStatus = NO_STATUS
    status: ApiStatus = NO_STATUS
    watch_s: float = 0.0
    environments: tuple[EnvironmentStatus, ...] = ()
    latest_group_size: int | None = 0
    expected_batch_size: int | None = None
    expected_max_token_len: int | None = None
    has_waiting_trainer: bool = False
    keeps_batches: bool = False

    @property
    def is_registered(self) -> bool:
        """Whether a trainer is registered."""
        return self.info[0] != UNREGISTERED

    @property
    def max_group_size(self) -> int:
        """Rollouts of the largest group in the queue; 1 if the API does not say."""
        return max((environment.max_group_size for environment in self.environments), default=1)

    @property
    def queued_group_sizes(self) -> set[int]:
        """Those sizes of groups in the queue that can be told from outside: the largest, and that of the newest."""
        if not self.status.queue_size:
            return set()
        newest = {self.latest_group_size} if self.latest_group_size else set()
        return newest | {environment.max_group_size for environment in self.environments}

    @property
    def stands_still(self) -> bool:
        """Whether no batch was formed during the look, and no group left the queue."""
        first, last = self.first_status, self.status
        return first.current_step == last.current_step and first.queue_size <= last.queue_size


def blocking_group_sizes(sizes: Iterable[int], batch_size: int) -> list[int]:
    """Group sizes that can keep the API from forming batches for good, depending on the order in which groups come.

    The API never splits a group. It collects groups of equal size into packs as large as the largest group in the
    queue, and fills a batch with packs, and gives up if a pack overshoots. So every size must divide the largest, and
    the largest the batch.

    `sizes` are the rollouts of each group that may meet in the queue. The result is in ascending order, empty if all
    is well.
    """
    distinct = set(sizes)
    largest = max(distinct, default=1)
    return sorted(size for size in distinct if largest % size or (size == largest and batch_size % size))


def _data_before_register(facts: ApiFacts) -> str | None:
    # A fresh API has no step counter and shows an empty queue whatever is in it; only the newest group betrays it. One that
    # was reset keeps max_token_len and the newest group of its former life; there the queue betrays it.
    was_reset = facts.info[1] != UNREGISTERED
    has_data = facts.status.queue_size > 0 if was_reset else facts.latest_group_size != 0
    if facts.is_registered or not has_data or facts.keeps_batches:
        return None
    state = "The registration was wiped by /reset_data" if was_reset else f"No trainer is registered at {facts.url}"
    return f"{state}, and an environment has posted groups since."


def _api_restarted(facts: ApiFacts) -> str | None:
    if not facts.has_waiting_trainer or facts.info != (UNREGISTERED, UNREGISTERED):
        return None
    return f"The Atropos API at {facts.url} has forgotten this trainer: /info answers batch_size -1."


def _registration_wiped(facts: ApiFacts) -> str | None:
    if facts.is_registered or facts.info[1] == UNREGISTERED:
        return None
    return (
        f"The registration was wiped by /reset_data: /info answers batch_size -1 and still the max_token_len "
        f"{facts.info[1]} of before."
    )


def _unregistered(facts: ApiFacts) -> str | None:
    if facts.has_waiting_trainer or facts.info != (UNREGISTERED, UNREGISTERED):
        return None
    return f"No trainer is registered at {facts.url}: /info answers batch_size -1."


def _other_registration(facts: ApiFacts) -> str | None:
    expected = (facts.expected_batch_size, facts.expected_max_token_len)
    wrong = [
        f"{name} {found} instead of {wanted}"
        for name, found, wanted in zip(("batch_size", "max_token_len"), facts.info, expected, strict=True)
        if wanted is not None and found != wanted
    ]
    # `trl-atropos api` takes the sizes of whoever registers last.
    if not facts.is_registered or not wrong or facts.keeps_batches:
        return None
    return f"The Atropos API at {facts.url} is registered with {' and '.join(wrong)}."


def _unwritable_group(facts: ApiFacts) -> str | None:
    if facts.latest_group_size is not None:
        return None
    return "The newest group that an environment posted cannot be written as JSON: /latest_example answers 500."


def _group_larger_than_batch(facts: ApiFacts) -> str | None:
    largest = max(facts.queued_group_sizes, default=1)
    if not facts.is_registered or largest <= facts.info[0]:
        return None
    return f"A group of {largest} rollouts is in the queue, a batch has {facts.info[0]}."


def _group_sizes_do_not_pack(facts: ApiFacts) -> str | None:
    sizes, batch_size = facts.queued_group_sizes, facts.info[0]
    blocking = blocking_group_sizes(sizes, batch_size)
    if not facts.is_registered or not blocking or max(sizes) > batch_size:
        return None
    return (
        f"Groups of {_join(sorted(sizes))} rollouts are in the queue, a batch has {batch_size}: those of "
        f"{_join(blocking)} do not pack."
    )


def _allocation_without_data(facts: ApiFacts) -> str | None:
    silent = [environment.env_id for environment in facts.environments if environment.self_queue_size == 0]
    is_allocated = any(environment.unallocated_fraction < 1 for environment in facts.environments)
    if not (facts.is_registered and is_allocated and silent and facts.status.queue_size and facts.stands_still):
        return None
    return (
        f"`min_batch_allocation` promises a share of each batch, {facts.status.queue_size} groups are queued, and none "
        f"of them is from environment {_join(silent)}."
    )


def _no_environment(facts: ApiFacts) -> str | None:
    if not facts.is_registered or facts.environments or facts.status.queue_size:
        return None
    return "The queue is empty, and /status-env knows no environment (500 for env_id 0)."


def _silent_environment(facts: ApiFacts) -> str | None:
    is_empty = facts.status.queue_size == 0 and facts.stands_still
    if not facts.is_registered or not facts.environments or not is_empty:
        return None
    names = _join([environment.env_id for environment in facts.environments])
    return f"Environment {names} is registered, and no group of it is in the queue{_when(facts)}."


def _batch_never_forms(facts: ApiFacts) -> str | None:
    num_groups, batch_size = facts.status.queue_size, facts.info[0]
    # A group has one rollout at least. Fewer groups may be a batch too, which only a trainer that asks in vain rules out.
    is_stuck = num_groups > 0 if facts.has_waiting_trainer else num_groups >= batch_size
    if not facts.is_registered or not is_stuck or not facts.stands_still:
        return None
    return f"{num_groups} groups are queued, a batch has {batch_size} rollouts, and none was formed{_when(facts)}."


def _lifo_ageing(facts: ApiFacts) -> str | None:
    num_rollouts = facts.status.queue_size * facts.max_group_size
    is_newest_first = not facts.keeps_batches
    if not (facts.is_registered and is_newest_first) or facts.has_waiting_trainer or num_rollouts < 2 * facts.info[0]:
        return None
    return f"Up to {num_rollouts} rollouts are queued, a batch has {facts.info[0]}."


def _when(facts: ApiFacts) -> str:
    return f" within {facts.watch_s:g} s" if facts.watch_s else ""


def _join(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


AGEING_WHY = (
    "The API hands out the newest batch first and the oldest last, and does not count batches that it has formed, so "
    "environments run ahead of the trainer by up to twice their `max_batches_offpolicy`."
)
AGEING_FIX = "Start environments with `--env.max_batches_offpolicy 1`, and set `--max_staleness`."
_GROUP_SIZE_FIX = "Make every `--env.group_size` a power of two that divides the batch size; then restart `run-api`."
_RESTART = "Stop all environments, restart `run-api`, then start the trainer first and the environments after it."

API_CHECKS: tuple[Check[ApiFacts], ...] = (
    Check(
        "api_unreachable",
        "error",
        lambda facts: facts.error,
        "It is not started, listens elsewhere, stalls, or another service has its port.",
        "Start it with `run-api --port PORT`, and give the trainer its URL with `--atropos_api_url`.",
        hides_others=True,
    ),
    Check(
        "data_before_register",
        "error",
        _data_before_register,
        "The API skips every registration once it has data: it answers success, and no batch will ever be formed.",
        _RESTART,
    ),
    Check(
        "api_restarted",
        "error",
        _api_restarted,
        "It was restarted: queue and environments are gone, and environments that still run end with a RetryError.",
        "Start the environments again; the trainer registers by itself, or with `--resume_from_checkpoint`.",
    ),
    Check(
        "registration_wiped",
        "error",
        _registration_wiped,
        "Environments end when they are reset, and no batch will ever be formed. The atropos-sft-gen, atropos-dpo-gen and "
        "view-run commands do that.",
        _RESTART,
    ),
    Check(
        "unregistered",
        "warning",
        _unregistered,
        "Environments wait in silence until a trainer has registered and asked for its first batch.",
        "Start the trainer with `--atropos_api_url`; if one runs, the API was restarted since, or this is another one.",
    ),
    Check(
        "other_registration",
        "error",
        _other_registration,
        "The first registration wins for as long as the API runs: another trainer's, or an earlier run's.",
        "Start another API for this run (`run-api --port PORT`), or restart this one and its environments.",
    ),
    Check(
        "unwritable_group",
        "error",
        _unwritable_group,
        "It holds NaN or infinity, which the API takes and cannot give: the batch with this group will be lost whole.",
        "Mend the score function of the environment that posts it.",
    ),
    Check(
        "group_larger_than_batch",
        "error",
        _group_larger_than_batch,
        "A group is never split, so once this one is at the head of the queue no batch is formed any more.",
        _GROUP_SIZE_FIX,
    ),
    Check(
        "group_sizes_do_not_pack",
        "error",
        _group_sizes_do_not_pack,
        "Groups are collected into packs of the largest size in the queue, and packs into batches; what is left over "
        "blocks the queue.",
        _GROUP_SIZE_FIX,
    ),
    Check(
        "allocation_without_data",
        "warning",
        _allocation_without_data,
        "An environment with `min_batch_allocation` that sends nothing, even one that is dead, blocks all others.",
        "If it is dead, free the others with POST /disconnect-env and its env_id; if it is slow, lower "
        "`--env.min_batch_allocation`.",
    ),
    Check(
        "no_environment",
        "error",
        _no_environment,
        "No environment posts groups: none is started, it died or cannot reach the API, it waits until the trainer asks for "
        "its first batch, or the `--env.weight` of all is 0 or less, by which the API divides.",
        "Start the environment with `--env.rollout_server_url` set to this API, and read its log.",
    ),
    Check(
        "silent_environment",
        "warning",
        _silent_environment,
        "It is slow, it died, all rollouts of each of its groups score the same (it drops those unless "
        "`--env.ensure_scores_are_not_same false`), one has `max_token_len` tokens or more, or its groups have another size "
        "than it registered and wait in a buffer.",
        "Read the environment's log; for a slow one raise `--batch_timeout_s`.",
    ),
    Check(
        "batch_never_forms",
        "warning",
        _batch_never_forms,
        "The queued groups do not make a batch: there are too few yet, their sizes do not pack, a group is larger than the "
        "batch, or an environment with `min_batch_allocation` sends nothing. Or the trainer is busy or gone, and none is "
        "asked for.",
        _GROUP_SIZE_FIX,
    ),
    Check("lifo_ageing", "warning", _lifo_ageing, AGEING_WHY, AGEING_FIX),
)


def inspect_api(
    client: AtroposClient,
    *,
    watch_s: float = 0.0,
    expected_batch_size: int | None = None,
    expected_max_token_len: int | None = None,
    has_waiting_trainer: bool = False,
) -> ApiFacts:
    """Look at the API without changing it: no batch is asked for, nobody is registered, nothing is posted.

    Asking `/status-env` has one effect, which each environment's own asking has ten times a second: the API takes the
    size of the environment's largest queued group for its group size. For the first id that no environment has,
    `run-api` logs an IndexError.

    `watch_s` are the seconds between the two looks at `/status`; what is expected is as in [`ApiFacts`]. An API that
    does not answer has facts, too.
    """
    try:
        first_status = client.status()
        time.sleep(watch_s)
        environments: list[EnvironmentStatus] = []
        while len(environments) < MAX_ENVIRONMENTS:
            environment = client.environment_status(len(environments))
            if environment is None:
                break
            environments.append(environment)
        return ApiFacts(
            client.base_url,
            info=client.info(),
            first_status=first_status,
            status=client.status(),
            watch_s=watch_s,
            environments=tuple(environments),
            latest_group_size=client.latest_group_size(),
            expected_batch_size=expected_batch_size,
            expected_max_token_len=expected_max_token_len,
            has_waiting_trainer=has_waiting_trainer,
            keeps_batches=client.keeps_batches,
        )
    except (AtroposConnectionError, AtroposProtocolError) as exc:
        return ApiFacts(client.base_url, error=exc.what)


def describe_wait(elapsed_s: float, facts: ApiFacts) -> str:
    """Why there is still no batch after so many seconds, on one line, by a look with `has_waiting_trainer`."""
    findings = diagnose(facts, API_CHECKS)
    reason = f" {findings[0].what} ({findings[0].name})" if findings else ""
    return f"Waiting for a batch for {elapsed_s:.0f} s: {_shown(facts)}.{reason}"


def data_timeout(elapsed_s: float, facts: ApiFacts) -> AtroposDataTimeout:
    """The error that no batch was formed within so many seconds, by a look with `has_waiting_trainer`."""
    findings = diagnose(facts, API_CHECKS)
    if findings:
        cause = findings[0]
        why, fix = f"{cause.what} {cause.why}", f"{cause.fix} See `{cause.name}` in docs/troubleshooting.md."
    else:
        why, fix = "Groups come and batches are formed: the environments are slow.", "Raise `--batch_timeout_s`."
    return AtroposDataTimeout(f"No batch within {elapsed_s:.1f} s from {facts.url}: {_shown(facts)}.", why, fix)


def _shown(facts: ApiFacts) -> str:
    return (
        f"/status shows current_step {facts.status.current_step} and queue_size {facts.status.queue_size} (groups), the "
        f"registered batch_size is {facts.info[0]} (rollouts)"
    )
