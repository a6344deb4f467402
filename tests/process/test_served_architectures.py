"""Weights that vLLM packs when it loads them, by family: what is published arrives in what the server computes with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fork_server
import pytest


SCRIPT = Path(__file__).with_name("served_architectures.py")
TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "weight_sync.md"
FAMILIES = (
    "Gemma3", "Mistral", "Phi3", "Qwen3Moe", "Mixtral", "Olmoe", "GptOss", "Qwen3Next", "Lfm2", "FalconH1", "GraniteMoeHybrid",
)  # fmt: skip
COMPRESSED = "DeepseekV2"
"""Attention whose weights are packed alone on CPUs with AMX. On the others vLLM rotates its queries, which have three
dimensions, wrongly, so that no policy of it has the logprobs of transformers."""

NOISE = 0.03
"""Mean difference in nats of one policy in bfloat16 by vLLM and in float32 by transformers; another policy is at 0.3 and more."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("served")
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, str(SCRIPT), str(directory), *FAMILIES, COMPRESSED]
    result = fork_server.run(command, env=environment, timeout=900)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(FAMILIES) + 1, result.stderr[-3000:]
    return dict(zip((*FAMILIES, COMPRESSED), lines, strict=True))


def mean_difference(left: list[list[float]], right: list[list[float]]) -> float:
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_change_no_logprob_and_others_arrive(served, family):
    logprobs = served[family]
    assert "error" not in logprobs, logprobs["error"]
    assert logprobs["again"] == logprobs["start"] == logprobs["back"]
    assert mean_difference(logprobs["start"], logprobs["start_trainer"]) < NOISE
    assert mean_difference(logprobs["other"], logprobs["other_trainer"]) < NOISE
    assert mean_difference(logprobs["other"], logprobs["start"]) > 10 * NOISE
    assert_all_ways_are_the_same(logprobs)


def assert_all_ways_are_the_same(logprobs: dict[str, Any]) -> None:
    """What was loaded beside the served policy, in its place or over the half of another one is the same to the bit."""
    assert logprobs["why_not_beside"] == ""
    assert logprobs["meanwhile"] == logprobs["start"]
    assert logprobs["part_again"] == logprobs["part"] != logprobs["start"]
    assert logprobs["healed"] == logprobs["other"]
    # Nothing of a twin stays, which would make the server grow with every publish.
    assert len(set(logprobs["num_known"])) == 1


def test_compressed_attention_arrives_or_is_refused_when_a_trainer_connects(served):
    import torch

    logprobs = served[COMPRESSED]
    if torch.cpu._is_amx_tile_supported():
        assert "is attention with a compressed cache (MLA)" in logprobs["error"]
        return
    assert logprobs["again"] == logprobs["start"] == logprobs["back"] != logprobs["other"]
    assert_all_ways_are_the_same(logprobs)
    assert mean_difference(logprobs["start"], logprobs["start_trainer"]) > NOISE, (
        "vLLM is mended: so should the document be"
    )


class TestWhyNotBeside:
    """A worker that could not put a policy in place by a swap says so, and loads in the pause."""

    @pytest.fixture
    def why_no_twin(self, monkeypatch):
        import torch

        from trl_atropos.weight_sync.transports import twin_engine

        monkeypatch.setattr(twin_engine, "_available_bytes", lambda: 10**9)
        return lambda module: twin_engine.why_no_twin(torch.nn.Sequential(module), torch.device("cpu"))

    @pytest.mark.parametrize(
        ("backend", "moves", "why"),
        [
            ("CPU", False, None),
            ("AITER", False, "0 has experts whose kernel is ROCm AITER"),
            ("CPU", True, "--enable-eplb"),
        ],
    )
    def test_experts(self, why_no_twin, backend, moves, why):
        import torch
        from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

        experts = torch.nn.Module()
        experts.quant_method = torch.nn.Module.__new__(UnquantizedFusedMoEMethod)
        torch.nn.Module.__init__(experts.quant_method)
        experts.quant_method.moe = SimpleNamespace(moe_parallel_config=SimpleNamespace(enable_eplb=moves))
        experts.quant_method.unquantized_backend = UnquantizedMoeBackend[backend]
        answer = why_no_twin(experts)
        assert answer is why or why in answer

    def test_an_adapter(self, why_no_twin):
        import torch

        module = torch.nn.Module()
        module.base_layer = torch.nn.Linear(2, 2)
        assert why_no_twin(module) == "0 is wrapped for adapters"

    def test_other_ways_to_hold_weights(self, why_no_twin):
        import torch
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        module = torch.nn.Linear(2, 2)
        module.quant_method = SimpleNamespace()
        get_layerwise_info(module).restore_metadata = (dict(module.named_parameters()), {})
        assert why_no_twin(module) == "0 holds its weights as SimpleNamespace does"

    def test_memory(self, why_no_twin):
        import torch
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        module = torch.nn.Linear(20_000, 20_000, device="meta", bias=False)
        get_layerwise_info(module).restore_metadata = (dict(module.named_parameters()), {})
        assert why_no_twin(module) == "2.0 GB are needed for it, and 1.0 GB are free"


def test_the_document_names_every_family():
    text = DOCUMENT.read_text()
    assert [family for family in (*FAMILIES, COMPRESSED) if f"`{family}`" not in text] == []
