"""A CPU as a platform of verl: for tests, and to try a configuration without a GPU.

verl loads it as a plug-in and takes it where it is named:

    VERL_USE_EXTERNAL_MODULES=trl_atropos.verl.cpu VERL_PLATFORM=cpu
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry


PLATFORM = "cpu"


def _device_module() -> ModuleType:
    """`torch.cpu`, with the functions of `torch.cuda` that verl calls and a CPU does not have."""
    module = ModuleType("trl_atropos_cpu")
    vars(module).update({name: value for name, value in vars(torch.cpu).items() if not name.startswith("_")})
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(module, name, lambda *args: 0)
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        setattr(module, name, lambda *args: None)
    vars(module).update(
        get_device_name=lambda *args: "CPU",
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        mem_get_info=lambda *args: (0, 0),
    )
    return module


@PlatformRegistry.register(platform=PLATFORM)
class CPUPlatform(PlatformBase):
    """The processor of this machine, as many times as there are processes."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        """Always."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never: a machine without accelerators is what Ray's drivers run on, where verl must not find a CPU to train on."""
        return False

    def current_device(self) -> str:
        """Where verl moves tensors to: a number would be that of a GPU."""
        return "cpu"

    def device_count(self) -> int:
        """One for each process of this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def set_device(self, device_index: int) -> None:
        """There is only one."""

    def synchronize(self, device_index: int | None = None) -> None:
        """A CPU has no queue."""

    def manual_seed(self, seed: int) -> None:
        """Seed the one generator there is."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the one generator there is."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The allocator has none."""

    def empty_cache(self) -> None:
        """There is none."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """There is none."""
        return None, None

    def communication_backend_name(self) -> str:
        """How processes meet."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """A name that nobody sets."""
        return "CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """Nobody looks at it."""
        yield

    def profiler_start(self) -> None:
        """There is none."""

    def profiler_stop(self) -> None:
        """There is none."""

    def ray_resource_name(self) -> str:
        """What Ray calls a processor."""
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        """There are none."""
        return []

    def is_ipc_supported(self) -> bool:
        """Not by handles of devices."""
        return False

    def cudart(self) -> Any:
        """There is none."""
        return None


def join_process_group() -> None:
    """Meet the other ranks as verl does. On a CPU it would name gloo twice for one device, which torch refuses."""
    from verl.utils.device import get_device_name
    from verl.utils.distributed import initialize_global_process_group

    if get_device_name() == CPUPlatform.device_name:
        torch.distributed.init_process_group("gloo")
    else:
        initialize_global_process_group()


def register_engine() -> None:
    """Let verl run its FSDP2 engine on a CPU, for which it registers none, if the platform is one. Safe to call again."""
    from verl.utils.device import get_device_name
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    if get_device_name() != CPUPlatform.device_name:
        return
    try:
        EngineRegistry.get_engine_cls("language_model", "fsdp2")
    except ValueError:
        EngineRegistry.register("language_model", "fsdp2", CPUPlatform.device_name)(FSDPEngineWithLMHead)
