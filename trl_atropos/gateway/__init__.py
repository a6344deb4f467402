"""Agents as they are, in front of inference servers: what they sample is recorded token by token, and becomes groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .environment import AgentEnv as AgentEnv
    from .gateway import Gateway as Gateway
    from .options import GatewayOptions as GatewayOptions

_MODULES = {"AgentEnv": "environment", "Gateway": "gateway", "GatewayOptions": "options"}


def __getattr__(name: str) -> Any:
    # `AgentEnv` needs atroposlib, which the command does not.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
