"""What tests of `trl-atropos env` need."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What shims and the command change in this process is as before when a test ends."""
    import aiohttp
    from atroposlib.envs import base
    from atroposlib.envs.server_handling import openai_server
    from atroposlib.envs.server_handling.server_manager import ServerManager
    from atroposlib.envs.server_handling.sglang_server import SGLangServer
    from transformers import PreTrainedTokenizerBase

    for owner, name in (
        (PreTrainedTokenizerBase, "apply_chat_template"),
        (base, "resolve_openai_configs"),
        (base, "merge_dicts"),
        (base.BaseEnv, "__init__"),
        (base.BaseEnv, "cli"),
        (base.BaseEnv, "handle_send_to_api"),
        (ServerManager, "managed_server"),
        (SGLangServer, "_tokens_and_logprobs_completion_wrapper"),
        (aiohttp.ClientResponse, "json"),
        (runpy, "run_path"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield
    for module in (base, openai_server):
        vars(module).pop("__getattr__", None)


@pytest.fixture
def signals() -> Iterator[None]:
    """The handlers of signals that the command replaces."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def run(signals: None) -> Callable[..., str | int | None]:
    """Runs `trl-atropos env ARGUMENTS` in this process and returns its exit code."""
    from trl_atropos.cli.main import main

    def run_command(*arguments: str) -> str | int | None:
        try:
            return main(["env", *arguments])
        except SystemExit as exc:
            return exc.code

    return run_command
