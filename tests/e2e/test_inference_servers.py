"""The contract of `InferenceServer` on a real vLLM server. On a real SGLang server: tests/sglang/test_sglang_server.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from fork_server import ForkedProcess
from inference_server_contract import InferenceServerContract, Served
from servers import HOST, ROOT, save_tiny_model, serve

from trl_atropos.cli.launch.processes import free_port
from trl_atropos.errors import PreflightError, WeightSyncError
from trl_atropos.weight_sync.connecting import connect_server


class TestVLLM(InferenceServerContract):
    @pytest.fixture(scope="class")
    def served(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
        directory = tmp_path_factory.mktemp("vllm")
        model_dir = save_tiny_model(directory / "model", tied=True, seed=0)
        with serve(model_dir, "--enforce-eager", log_path=directory / "server.log") as url:
            yield Served("vLLM", url, model_dir)


def test_what_answers_and_is_no_server_is_named() -> None:
    port = free_port()
    process = ForkedProcess([sys.executable, "-m", "http.server", str(port), "--bind", HOST], cwd=ROOT)
    try:
        with pytest.raises((PreflightError, WeightSyncError), match="neither a vLLM nor an SGLang server"):
            connect_server(f"http://{HOST}:{port}", connection_timeout=20.0)
    finally:
        process.kill()
        process.wait()
