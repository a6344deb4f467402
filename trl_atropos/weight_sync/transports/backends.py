"""How servers receive weights, one row of `BACKENDS` each, and our middleware.

vLLM's plugin reads the table in every process of a server, so it imports nothing: classes are named, and loaded on
first use.
"""

from __future__ import annotations

from dataclasses import dataclass


SHARED_MEMORY_BACKEND = "trl_atropos_shm"
GLOO_BACKEND = "trl_atropos_gloo"
NCCL_BACKEND = "nccl"
SGLANG_GLOO_BACKEND = "sglang_gloo"
SGLANG_NCCL_BACKEND = "sglang_nccl"
"""Of SGLang, which takes any torch.distributed group without being started for it."""

MIDDLEWARE = "trl_atropos.serving.generate_endpoint.GenerateEndpoint"
"""What `--middleware` of a server names, so that it answers `/generate` and routes requests to adapters."""


@dataclass(frozen=True)
class Backend:
    """A way for weights into a server: its name, its reach in words, and module and class of both its ends. With vLLM the
    name is that of `--weight-transfer-config`.

    The trainer's end, a `WeightTransport`, is made with those `options` of `make_transport` that it takes:
    `timeout_s`, `device`, `host` and `port`. The worker's end is None if the server has its own. `device` is the type of
    device that the trainer must run on; None allows any.
    """

    name: str
    reach: str
    transport: tuple[str, str]
    options: tuple[str, ...]
    engine: tuple[str, str] | None = None
    device: str | None = None


BACKENDS = (
    Backend(
        SHARED_MEMORY_BACKEND,
        "same host",
        ("trl_atropos.weight_sync.transports.shm", "SharedMemoryTransport"),
        ("timeout_s",),
        engine=("trl_atropos.weight_sync.transports.shm_engine", "SharedMemoryEngine"),
    ),
    Backend(
        GLOO_BACKEND,
        "any host",
        ("trl_atropos.weight_sync.transports.gloo", "GlooTransport"),
        ("timeout_s", "host", "port"),
        engine=("trl_atropos.weight_sync.transports.gloo_engine", "GlooEngine"),
    ),
    Backend(
        NCCL_BACKEND,
        "from a CUDA device",
        ("trl_atropos.weight_sync.transports.nccl", "NcclTransport"),
        ("device", "timeout_s", "host", "port"),
        device="cuda",
    ),
    Backend(
        SGLANG_GLOO_BACKEND,
        "to SGLang on a CPU",
        ("trl_atropos.weight_sync.transports.sglang_group", "SGLangGlooTransport"),
        ("timeout_s", "host", "port"),
    ),
    Backend(
        SGLANG_NCCL_BACKEND,
        "to SGLang from a CUDA device",
        ("trl_atropos.weight_sync.transports.sglang_group", "SGLangNcclTransport"),
        ("device", "timeout_s", "host", "port"),
        device="cuda",
    ),
)

NO_TRANSPORT_WHY = f"The trainer sends over {', '.join(f'{row.name!r} ({row.reach})' for row in BACKENDS)}."
NO_TRANSPORT_FIX = (
    f"""Start the server with --weight-transfer-config '{{"backend": "{SHARED_MEMORY_BACKEND}"}}', or give the """
    "trainer another transport: AtroposTrainer(weight_transport=...). SGLang on CUDA wants a trainer on CUDA."
)


def find_backend(name: str | None, device_type: str) -> Backend | None:
    """The row of a server's backend; None if a trainer on such a device cannot send to it."""
    return next((row for row in BACKENDS if row.name == name and row.device in (None, device_type)), None)


def describe_no_transport(url: str, backend: str | None, device: object) -> str:
    """Say that the trainer on this device cannot send to the server's backend."""
    return f"The inference server at {url} receives weights over {backend!r}, the trainer runs on {device}."
