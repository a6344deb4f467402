"""One rank acts, every rank learns the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from .errors import TrlAtroposError


if TYPE_CHECKING:
    from accelerate import Accelerator


T = TypeVar("T")

CONTROL_PATIENCE = timedelta(hours=24)
"""How long a rank waits in a control collective for the others. The wait ends at once if one of them ends: its
connections close. What rank 0 waits for has limits of its own (`batch_timeout_s`, `vllm_server_timeout`, ...)."""

_control: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
"""The default group, and the group of the control collectives that was made for it."""


def is_distributed() -> bool:
    """Whether this process is one of several that share a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def control_group() -> dist.ProcessGroup:
    """The group of all ranks on which Python objects travel: gloo, whatever the default group is. A collective call.

    On NCCL they would pass through the memory of the GPUs, ranks that wait would keep their GPUs busy, and a wait that is
    longer than `ddp_timeout`, for a batch or for a server that is being restarted, would end the run.

    Raises:
        TrlAtroposError: gloo cannot connect the ranks.
    """
    global _control
    world = dist.group.WORLD
    assert world is not None, "called by several ranks"
    if _control is None or _control[0] is not world:
        try:
            # torch declares the group and, for ranks outside of it, a number.
            group: Any = dist.new_group(backend="gloo", timeout=CONTROL_PATIENCE)
        except RuntimeError as exc:
            raise TrlAtroposError(
                f"Gloo cannot connect the {dist.get_world_size()} ranks: {exc}",
                "Batches, metrics and the outcomes of publishes travel over it between the ranks, also beside NCCL.",
                "Name the network interface by which the hosts reach each other: GLOO_SOCKET_IFNAME=eth0.",
            ) from exc
        _control = world, group
    return _control[1]


def largest_over_ranks(value: float) -> float:
    """The largest value of any rank; a collective call. NaN counts as infinite, so that no rank can miss it."""
    value = value if value == value else float("inf")
    if not is_distributed():
        return value
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return max(values)


def sum_over_ranks(
    values: list[float], device: torch.device, process_group: dist.ProcessGroup | None = None
) -> list[float]:
    """The sums of each entry over all ranks, or those of a group, in float64; a collective call."""
    if not is_distributed():
        return values
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals, group=process_group)
    return totals.tolist()


def gather_over_ranks(values: torch.Tensor, process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The entries (N,) of all ranks, or of those of a group, one rank after the other, on the CPU; a collective call."""
    values = values.cpu()
    if not is_distributed():
        return values
    group = process_group or control_group()
    gathered: list[torch.Tensor] = [values] * dist.get_world_size(group)
    dist.all_gather_object(gathered, values, group=group)
    return torch.cat(gathered)


def run_on_main_process(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and give every rank its value, or raise its error on every rank.

    The value must be picklable. An error that only rank 0 knew would leave the others in their next collective until
    it times out.

    Raises:
        TrlAtroposError: the one that `function` raised, on every rank.
    """
    if not is_distributed():
        return function()
    # Before rank 0 begins: all ranks make it together.
    group = control_group()
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
            text = f"Rank 0 failed: {type(exc).__name__}: {str(exc).removesuffix('.')}."
            outcome = [None, TrlAtroposError(text, "The other ranks cannot go on without it.", "See rank 0's log.")]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise outcome[1]
    value: T = outcome[0]
    return value


@contextmanager
def without_gradient_sync(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """Inside, a backward pass adds to the gradients and more of this optimizer step follow.

    Sets the two switches that the loop of transformers sets between two calls of `training_step`: that of accelerate, and
    the wrapper's own. DeepSpeed has none of the second kind.
    """
    was_syncing = accelerator.gradient_state.sync_gradients
    is_deepspeed = accelerator.distributed_type.value == "DEEPSPEED"
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        with nullcontext() if is_deepspeed else accelerator.no_sync(model):
            yield
    finally:
        accelerator.gradient_state._set_sync_gradients(was_syncing)
