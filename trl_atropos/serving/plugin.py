"""Entry point `vllm.general_plugins`: makes our weight transfer engines known to vLLM by name.

vLLM calls `register` in the API server, in the engine core, in every worker and in the process that inspects models,
so it must be cheap and must do nothing on a second call: an exception here aborts the server's start.
"""

from __future__ import annotations


SHARED_MEMORY_BACKEND = "trl_atropos_shm"


def register() -> None:
    """Register `trl_atropos_shm` as a backend of `--weight-transfer-config`; the engine is imported on first use."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if SHARED_MEMORY_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            SHARED_MEMORY_BACKEND, "trl_atropos.weight_sync.shm_engine", "SharedMemoryEngine"
        )
