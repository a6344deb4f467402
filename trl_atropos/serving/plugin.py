"""Entry point `vllm.general_plugins`: makes our weight transfer engines known to vLLM by name.

vLLM calls `register` in the API server, in the engine core, in every worker and in the process that inspects models,
so it must be cheap and must do nothing on a second call: an exception here aborts the server's start.
"""

from __future__ import annotations


SHARED_MEMORY_BACKEND = "trl_atropos_shm"
GLOO_BACKEND = "trl_atropos_gloo"

ENGINES = {
    SHARED_MEMORY_BACKEND: ("trl_atropos.weight_sync.transports.shm_engine", "SharedMemoryEngine"),
    GLOO_BACKEND: ("trl_atropos.weight_sync.transports.gloo_engine", "GlooEngine"),
}
"""Backend of `--weight-transfer-config` -> module and class of its engine, imported on first use."""


def register() -> None:
    """Register every backend of `ENGINES` that vLLM does not know yet."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, (module, engine) in ENGINES.items():
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, module, engine)
