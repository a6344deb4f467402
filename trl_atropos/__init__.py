"""A Hugging Face TRL-style trainer for Atropos reinforcement-learning environments.

Names are imported on first use, so that `import trl_atropos` loads neither torch nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_EXPORTS = {
    "AtroposClient": "atropos_client",
    "AtroposConfig": "atropos_config",
    "AtroposParser": "parser",
    "AtroposTrainer": "atropos_trainer",
    "AtroposVLLMClient": "weight_sync.vllm_client",
    "LossInputs": "losses",
    "LossOutputs": "losses",
    "advantage_weighted_sft_loss": "losses",
    "clip_advantages": "advantages",
    "normalize_advantages": "advantages",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from .advantages import clip_advantages as clip_advantages
    from .advantages import normalize_advantages as normalize_advantages
    from .atropos_client import AtroposClient as AtroposClient
    from .atropos_config import AtroposConfig as AtroposConfig
    from .atropos_trainer import AtroposTrainer as AtroposTrainer
    from .losses import LossInputs as LossInputs
    from .losses import LossOutputs as LossOutputs
    from .losses import advantage_weighted_sft_loss as advantage_weighted_sft_loss
    from .parser import AtroposParser as AtroposParser
    from .weight_sync.vllm_client import AtroposVLLMClient as AtroposVLLMClient


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
