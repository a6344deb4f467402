"""One rank acts, every rank learns the outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from .errors import TrlAtroposError


T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of several that share a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def run_on_main_process(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and give every rank its value, or raise its error on every rank.

    An error that only rank 0 knew would leave the others in their next collective until it times out.

    Args:
        function (`Callable[[], T]`):
            Called on rank 0 only. Its value must be picklable.

    Raises:
        [`TrlAtroposError`]: the one that `function` raised, on every rank.
    """
    if not is_distributed():
        return function()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [function(), None]
        except TrlAtroposError as exc:
            failure = exc
            outcome = [None, exc]
        except BaseException as exc:
            # Whatever it is, it must end the other ranks too; it may not be picklable, so they get its text.
            failure = exc
            text = f"Rank 0 failed: {type(exc).__name__}: {exc}."
            outcome = [None, TrlAtroposError(text, "The other ranks cannot go on without it.", "See rank 0's log.")]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
