"""Entry point `vllm.general_plugins`: makes our weight transfer engines known to vLLM by name, and lets its workers use AMX.

vLLM calls `register` in the API server, in the engine core, in every worker and in the process that inspects models,
so it must be cheap and must do nothing on a second call: an exception here aborts the server's start.
"""

from __future__ import annotations

from ..weight_sync.transports.backends import BACKENDS


def register() -> None:
    """Register every engine of `BACKENDS` that vLLM does not know yet, whose module is imported on first use; ask for AMX."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend in BACKENDS:
        if backend.engine is not None and backend.name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend.name, *backend.engine)
    _ask_for_amx()


def _ask_for_amx() -> None:
    """Ask Linux for the tile registers of AMX, which a process must do before its first tile instruction.

    vLLM 0.32's attention on CPUs with AMX does not ask. A worker ends with "Illegal instruction" there unless oneDNN has asked
    before, which it does at the first large product of matrices only: the first request with a short prompt ends the server.
    """
    import torch

    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if has_amx is not None and has_amx():
        torch.cpu._init_amx()
