"""Locked pages of host memory, with a runtime that keeps account in CUDA's place; `benchmarks/gpu.py` runs them on a GPU."""

from __future__ import annotations

import gc

import pytest
import torch

from trl_atropos.weight_sync.page_locks import PageLocks


OUT_OF_MEMORY = 2


class Runtime:
    """Knows what is locked, and refuses with `error`, as `cudaHostRegister` refuses what is locked already."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.num_asked = 0
        self.error = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert address not in self.locked and flags == 0
        self.num_asked += 1
        if not self.error:
            self.locked[address] = num_bytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


def make_memory(num_bytes: int = 64) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def test_all_of_it_is_locked_once(runtime):
    locks, memories = PageLocks(runtime), [make_memory(), make_memory(128)]
    for _ in range(3):
        locks.hold(memories)
    assert runtime.locked == {memory.data_ptr(): memory.numel() for memory in memories}
    assert runtime.num_asked == 2


def test_memory_that_is_replaced_is_unlocked_before_it_is_freed(runtime):
    locks, new = PageLocks(runtime), make_memory()
    # Nobody else keeps it.
    locks.hold([make_memory()])
    locks.hold([new])
    assert runtime.locked == {new.data_ptr(): new.numel()}


def test_the_end_of_the_locks_unlocks(runtime):
    locks = PageLocks(runtime)
    locks.hold([make_memory()])
    assert runtime.locked
    del locks
    gc.collect()
    assert not runtime.locked


def test_what_cannot_be_locked_is_said_once_and_used_as_it_is(runtime, caplog):
    locks, memory = PageLocks(runtime), make_memory()
    runtime.error = OUT_OF_MEMORY
    for _ in range(3):
        locks.hold([memory])
    assert runtime.num_asked == 1
    (record,) = caplog.records
    assert "cudaHostRegister: error 2" in record.getMessage()
    # Other memory, for example after a server was restarted, may be locked.
    runtime.error = 0
    locks.hold([make_memory()])
    assert len(runtime.locked) == 1


def test_no_bytes_need_no_lock(runtime):
    PageLocks(runtime).hold([make_memory(0)])
    assert runtime.num_asked == 0
