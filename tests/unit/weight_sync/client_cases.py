"""Every method of `AtroposVLLMClient` that sends a request: how it is called, and what must arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from PIL import Image
from scripted_server import ScriptedServer

from trl_atropos.weight_sync.client import AtroposVLLMClient


API_KEY = "secret"
DEADLINE_S = 0.3
SLACK_S = 5.0
"""For a busy machine."""


class Case(NamedTuple):
    """One method: how it is called, and what it must send."""

    name: str
    call: Callable[[AtroposVLLMClient], Any]
    route: str
    query: Mapping[str, list[str]] = MappingProxyType({})
    body: Any = None


# From vLLM's routers: vllm/entrypoints/rl/online/api_router.py, serve/dev/{cache,sleep,server_info}/api_router.py and
# serve/lora/protocol.py; /atropos/* from our own middleware.
CONTROL_POSTS = [
    Case("pause", lambda c: c.pause(), "POST /pause", {"mode": ["keep"], "clear_cache": ["true"]}),
    Case(
        "pause_keeps_kv",
        lambda c: c.pause(mode="wait", clear_cache=False),
        "POST /pause",
        {"mode": ["wait"], "clear_cache": ["false"]},
    ),
    Case("resume", lambda c: c.resume(), "POST /resume"),
    Case(
        "init",
        lambda c: c.init_weight_transfer_engine({"a": 1}),
        "POST /init_weight_transfer_engine",
        {},
        {"init_info": {"a": 1}},
    ),
    Case("shutdown", lambda c: c.shutdown_weight_transfer_engine(), "POST /shutdown_weight_transfer_engine"),
    Case("start", lambda c: c.start_weight_update(), "POST /start_weight_update", {}, {}),
    Case(
        "update",
        lambda c: c.update_weights({"names": ["x"]}),
        "POST /update_weights",
        {},
        {"update_info": {"names": ["x"]}},
    ),
    Case("finish", lambda c: c.finish_weight_update("7"), "POST /finish_weight_update", {}, {"weight_version": "7"}),
    Case(
        "finish_unnamed",
        lambda c: c.finish_weight_update(None),
        "POST /finish_weight_update",
        {},
        {"weight_version": None},
    ),
    Case("set_version", lambda c: c.set_weight_version("9"), "POST /update_weight_version", {}, {"new_version": "9"}),
    Case("reset_prefix_cache", lambda c: c.reset_prefix_cache(), "POST /reset_prefix_cache"),
    Case("sleep", lambda c: c.sleep(1), "POST /sleep", {"level": ["1"], "mode": ["keep"]}),
    Case("wake_up", lambda c: c.wake_up(None), "POST /wake_up"),
    Case(
        "wake_up_tags",
        lambda c: c.wake_up(["weights", "kv_cache"]),
        "POST /wake_up",
        {"tags": ["weights", "kv_cache"]},
    ),
    Case(
        "load_lora",
        lambda c: c.load_lora_adapter("v3", "dir"),
        "POST /v1/load_lora_adapter",
        {},
        {"lora_name": "v3", "lora_path": "dir"},
    ),
    Case(
        "unload_lora", lambda c: c.unload_lora_adapter("v3"), "POST /v1/unload_lora_adapter", {}, {"lora_name": "v3"}
    ),
    Case(
        "route_adapter",
        lambda c: c.route_adapter("v3", 3),
        "POST /atropos/adapter",
        {},
        {"lora_name": "v3", "policy_version": 3},
    ),
    Case(
        "route_base",
        lambda c: c.route_adapter(None, 4),
        "POST /atropos/adapter",
        {},
        {"lora_name": None, "policy_version": 4},
    ),
]
QUESTIONS = [
    Case("is_paused", lambda c: c.is_paused(), "GET /is_paused"),
    Case("weight_version", lambda c: c.get_weight_version(), "GET /weight_info"),
    Case("is_sleeping", lambda c: c.is_sleeping(), "GET /is_sleeping"),
    Case("models", lambda c: c.list_models(), "GET /v1/models"),
    Case("world_size", lambda c: c.get_world_size(), "GET /get_world_size"),
    Case("server_info", lambda c: c.get_server_info(), "GET /server_info", {"config_format": ["json"]}),
    Case("environment", lambda c: c.get_server_environment(), "GET /server_info", {"config_format": ["json"]}),
    Case(
        "versions",
        lambda c: c.find_calls(["k"]),
        "POST /atropos/policy_versions",
        {},
        {"rollout_keys": ["k"]},
    ),
    Case(
        "logprobs",
        lambda c: c.get_prompt_logprobs([[1, 2, 3]]),
        "POST /v1/completions",
        {},
        {"model": "policy", "prompt": [[1, 2, 3]], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 1},
    ),
]
# With TRL's own sending: `session.post` and `_post`.
INHERITED = [
    Case("trl_generate", lambda c: c.generate([[1, 2]]), "POST /v1/completions"),
    Case("trl_chat", lambda c: c.chat([[{"role": "user", "content": "hi"}]]), "POST /v1/chat/completions"),
    Case("trl_images", lambda c: c.image_features([[Image.new("RGB", (2, 2))]]), "POST /v1/chat/completions/render"),
    Case("trl_logprobs", lambda c: c.get_sequence_logprobs([[1, 2]], [1]), "POST /v1/completions"),
]


def every(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def prepare(server: ScriptedServer, case: Case) -> None:
    """Bring the server into a state in which the call is allowed."""
    if case.route in ("POST /update_weights", "POST /finish_weight_update"):
        server.state.is_initialised = server.state.is_updating = True
    if case.name == "unload_lora":
        server.state.adapters["v3"] = "dir"
