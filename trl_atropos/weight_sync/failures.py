"""What happens when a publish fails on one of several servers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..errors import WeightSyncError
from .options import WeightSyncOptions
from .server_link import ServerLink


logger = logging.getLogger(__name__)

RETRY_INTERVAL_S = 1.0
PAUSED_INTERVAL_S = 15.0
"""How often a run that was paused by a failure tries again."""


def run_step(
    links: Sequence[ServerLink], step: Callable[[ServerLink], None], version: int, options: WeightSyncOptions
) -> Outcome:
    """Take a step with every server, side by side, and again with those that failed, as `on_publish_failure` says.

    Servers that failed are reset before the step is taken again, so `step` has to open a link that is closed.
    `version` is the number of the policy that is published and stands in the messages.

    Raises:
        [`WeightSyncError`]: the error of the first server that failed for good.
    """
    pending = list(links)
    outcome = Outcome()
    while True:
        failures = _take(pending, step, version)
        if not failures:
            return outcome
        outcome.num_failures += len(failures)
        _raise_if_final(list(failures.values()), outcome.num_rounds, options)
        for link, failure in failures.items():
            logger.warning(
                f"{failure}\nIt is given everything again (--on_publish_failure {options.on_publish_failure})."
            )
            link.reset()
        time.sleep(PAUSED_INTERVAL_S if options.on_publish_failure == "pause" else RETRY_INTERVAL_S)
        pending = list(failures)
        outcome.num_rounds += 1
        outcome.num_retries += len(pending)


def _raise_if_final(failures: Sequence[WeightSyncError], num_rounds: int, options: WeightSyncOptions) -> None:
    action = options.on_publish_failure
    final = [failure for failure in failures if failure.is_final]
    is_exhausted = action == "retry" and num_rounds >= options.max_publish_retries
    if not (final or is_exhausted or action == "abort"):
        return
    first, *others = final or failures
    for other in others:
        logger.error(str(other))
    raise first


@dataclass
class Outcome:
    """How often a step was taken.

    `num_rounds` counts the rounds after the first, `num_retries` the attempts after the first over all servers, and
    `num_failures` the attempts that failed over all servers.
    """

    num_rounds: int = 0
    num_retries: int = 0
    num_failures: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.num_rounds + other.num_rounds,
            self.num_retries + other.num_retries,
            self.num_failures + other.num_failures,
        )


def _take(
    links: Sequence[ServerLink], step: Callable[[ServerLink], None], version: int
) -> dict[ServerLink, WeightSyncError]:
    if len(links) == 1:
        # On this thread, so that Ctrl-C ends it.
        outcomes = [_attempt(step, links[0], version)]
    else:
        with ThreadPoolExecutor(max_workers=len(links), thread_name_prefix="publish") as executor:
            outcomes = list(executor.map(lambda link: _attempt(step, link, version), links))
    return {link: failure for link, failure in zip(links, outcomes, strict=True) if failure is not None}


def _attempt(step: Callable[[ServerLink], None], link: ServerLink, version: int) -> WeightSyncError | None:
    try:
        with link.naming_the_state(version):
            step(link)
    except WeightSyncError as exc:
        return exc
    return None
