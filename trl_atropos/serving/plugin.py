"""Entry point `vllm.general_plugins`: makes our weight transfer engines known to vLLM by name.

vLLM calls `register` in the API server, in the engine core, in every worker and in the process that inspects models,
so it must be cheap and must do nothing on a second call: an exception here aborts the server's start.
"""

from __future__ import annotations

from ..weight_sync.transports.backends import BACKENDS


def register() -> None:
    """Register every engine of `BACKENDS` that vLLM does not know yet; its module is imported on first use."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend in BACKENDS:
        if backend.engine is not None and backend.name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend.name, *backend.engine)
