"""A Hugging Face TRL-style trainer for Atropos reinforcement-learning environments.

Names are imported on first use, so that `import trl_atropos` loads neither torch nor vLLM.

Where torch is not imported yet, threads that compute together on a CPU are made to sleep while they wait for each other,
in this process and those that it starts: `OMP_WAIT_POLICY=passive`, unless the variable is set. They would spin, and
beside another busy process (a server, an environment) a training step takes several times as long.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# OpenMP reads it when torch is imported; set later, it would say what is not.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

_EXPORTS = {
    "AgentEnv": "gateway.environment",
    "AtroposClient": "wire.client",
    "AtroposConfig": "trainer.atropos_config",
    "AtroposParser": "trainer.parser",
    "AtroposSGLangClient": "weight_sync.sglang",
    "AtroposTrainer": "trainer.atropos_trainer",
    "AtroposVLLMClient": "weight_sync.client",
    "Gateway": "gateway.gateway",
    "GatewayOptions": "gateway.options",
    "EnvironmentSource": "envs.source",
    "EnvironmentEpisode": "envs.source",
    "EpisodeStep": "envs.source",
    "InferenceServer": "weight_sync.inference_server",
    "LossFunction": "loss.losses",
    "LossInputs": "loss.losses",
    "LossOutputs": "loss.losses",
    "ServerDescription": "weight_sync.inference_server",
    "TensorSpec": "weight_sync.base",
    "WeightSource": "weight_sync.base",
    "WeightTransport": "weight_sync.base",
    "advantage_weighted_sft_loss": "loss.weighted_sft",
    "clip_advantages": "loss.advantages",
    "maximum_of": "loss.metrics",
    "mean_of": "loss.metrics",
    "minimum_of": "loss.metrics",
    "normalize_advantages": "loss.advantages",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:
    from .envs.source import EnvironmentEpisode as EnvironmentEpisode
    from .envs.source import EnvironmentSource as EnvironmentSource
    from .envs.source import EpisodeStep as EpisodeStep
    from .gateway.environment import AgentEnv as AgentEnv
    from .gateway.gateway import Gateway as Gateway
    from .gateway.options import GatewayOptions as GatewayOptions
    from .loss.advantages import clip_advantages as clip_advantages
    from .loss.advantages import normalize_advantages as normalize_advantages
    from .loss.losses import LossFunction as LossFunction
    from .loss.losses import LossInputs as LossInputs
    from .loss.losses import LossOutputs as LossOutputs
    from .loss.metrics import maximum_of as maximum_of
    from .loss.metrics import mean_of as mean_of
    from .loss.metrics import minimum_of as minimum_of
    from .loss.weighted_sft import advantage_weighted_sft_loss as advantage_weighted_sft_loss
    from .trainer.atropos_config import AtroposConfig as AtroposConfig
    from .trainer.atropos_trainer import AtroposTrainer as AtroposTrainer
    from .trainer.parser import AtroposParser as AtroposParser
    from .weight_sync.base import TensorSpec as TensorSpec
    from .weight_sync.base import WeightSource as WeightSource
    from .weight_sync.base import WeightTransport as WeightTransport
    from .weight_sync.client import AtroposVLLMClient as AtroposVLLMClient
    from .weight_sync.inference_server import InferenceServer as InferenceServer
    from .weight_sync.inference_server import ServerDescription as ServerDescription
    from .weight_sync.sglang import AtroposSGLangClient as AtroposSGLangClient
    from .wire.client import AtroposClient as AtroposClient


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
