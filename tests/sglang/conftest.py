"""One SGLang server for every test that needs one; real vLLM servers are started as in the end-to-end tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest


sys.path.append(str(Path(__file__).resolve().parent.parent / "e2e"))

if TYPE_CHECKING:
    from inference_server_contract import Served
    from sglang_server import SGLangServer


@pytest.fixture(scope="session")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """Serves a small model with a chat template. Skipped where `TRL_ATROPOS_SGLANG_PYTHON` names no Python with SGLang."""
    # Not above: the process that deals tests to others reads this file, too, and runs none.
    from servers import add_chat_template, save_tiny_model
    from sglang_server import SGLANG_PYTHON, SGLangServer

    if SGLANG_PYTHON is None:
        pytest.skip("TRL_ATROPOS_SGLANG_PYTHON names no Python that has SGLang (docs/servers.md)")
    directory = tmp_path_factory.mktemp("sglang")
    model_dir = add_chat_template(save_tiny_model(directory / "model", tied=True, seed=0))
    server = SGLangServer(model_dir, directory / "server.log")
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def served(sglang: SGLangServer) -> Served:
    """That server, as the contract of inference servers wants it."""
    from inference_server_contract import Served

    return Served("SGLang", sglang.url, sglang.model_dir)
