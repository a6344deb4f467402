"""Host memory that a GPU copies into at full speed, because its pages are locked in place.

`cudaHostRegister` locks what is there already, also a shared-memory segment, and no more than that: torch's pinned memory
rounds up to a power of two, so that a policy of 140 GB would take 256 GiB.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch


logger = logging.getLogger(__name__)


class PageLocks:
    """Locks the pages of the memory that it was given last, until it is given other memory or is dropped itself.

    Memory that is locked is kept: unmapped under a lock, its addresses could not be locked again. Memory that cannot be
    locked is used as it is, and a warning says so once.

    `runtime` is by default that of CUDA, `torch.cuda.cudart()`.
    """

    def __init__(self, runtime: Any = None):
        self._runtime = runtime or torch.cuda.cudart()  # type: ignore[no-untyped-call]
        # By address. What could not be locked is not tried again.
        self._locked: dict[int, torch.Tensor] = {}
        self._refused: set[int] = set()
        # Not at the end of the process, which frees everything: the runtime may be gone before.
        weakref.finalize(self, _unlock_all, self._runtime, self._locked).atexit = False

    def hold(self, memories: Sequence[torch.Tensor]) -> None:
        """Lock the pages of these buffers, contiguous and in host memory, and unlock all others."""
        wanted = {memory.data_ptr(): memory for memory in memories if memory.numel()}
        for address in self._locked.keys() - wanted.keys():
            self._runtime.cudaHostUnregister(address)
            del self._locked[address]
        self._refused &= wanted.keys()
        for address, memory in wanted.items():
            if address in self._locked or address in self._refused or memory.is_pinned():
                continue
            error = int(self._runtime.cudaHostRegister(address, memory.numel() * memory.element_size(), 0))
            if error:
                self._refused.add(address)
                self._warn(memory, error)
            else:
                self._locked[address] = memory

    def _warn(self, memory: torch.Tensor, error: int) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # CUDA hands an error to whoever launches the next kernel.
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")
        size = memory.numel() * memory.element_size() / 1e9
        logger.warning(
            f"The pages of {size:.1f} GB of staging memory cannot be locked (cudaHostRegister: error {error}), so the "
            "policy is copied from the GPU at a fraction of the speed. A container may limit locked memory: "
            "docker run --ulimit memlock=-1."
        )


def _unlock_all(runtime: Any, locked: dict[int, torch.Tensor]) -> None:
    for address in locked:
        runtime.cudaHostUnregister(address)
    locked.clear()
