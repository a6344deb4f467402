"""A real SGLang server keeps the contract of `InferenceServer`; what it does not have is refused. The first tests of the session."""

from __future__ import annotations

import pytest
from inference_server_contract import InferenceServerContract, Served

from trl_atropos.errors import PreflightError


class TestSGLang(InferenceServerContract):
    """With the server of the session."""

    num_clients = 16
    num_publishes = 20


def test_what_sglang_does_not_have_is_refused_by_name(served: Served) -> None:
    client = served.connect()
    with pytest.raises(PreflightError, match="--weight_sync_mode merged"):
        client.load_lora_adapter("a", "/nowhere")
    with pytest.raises(PreflightError, match="--vllm_enable_sleep_mode off"):
        client.sleep(1)
    assert client.find_calls(["a", "b"]) == [None, None]
