"""Weights that vLLM packs when it loads them, by family: what is published arrives in what the server computes with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import fork_server
import pytest


SCRIPT = Path(__file__).with_name("served_architectures.py")
TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "weight_sync.md"
FAMILIES = (
    "Gemma3", "Mistral", "Phi3", "Qwen3Moe", "Mixtral", "Olmoe", "GptOss", "Qwen3Next", "FalconH1", "GraniteMoeHybrid",
)  # fmt: skip
REFUSED = "DeepseekV2"
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
    command = [sys.executable, str(SCRIPT), str(directory), *FAMILIES, REFUSED]
    result = fork_server.run(command, env=environment, timeout=900)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == len(FAMILIES) + 1, result.stderr[-3000:]
    return dict(zip((*FAMILIES, REFUSED), lines, strict=True))


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


def test_plain_layers_are_loaded_beside_those_that_serve(served):
    whys = {family: served[family]["why_not_beside"] for family in FAMILIES}
    assert [family for family, why in whys.items() if not why] == ["Gemma3", "Mistral", "Phi3"]
    assert "holds its weights as" in whys["Mixtral"]
    assert "computes with a view of its weights" in whys["FalconH1"]
    for family in ("Gemma3", "Mistral", "Phi3"):
        assert served[family]["meanwhile"] == served[family]["start"]
        # Nothing of a twin stays, which would make the server grow with every publish.
        assert len(set(served[family]["num_known"])) == 1


def test_what_cannot_arrive_is_refused_when_a_trainer_connects(served):
    import torch

    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM packs the attention of this family on CPUs with AMX only")
    assert "is attention with a compressed cache (MLA)" in served[REFUSED]["error"]


def test_the_document_names_every_family():
    text = DOCUMENT.read_text()
    assert [family for family in (*FAMILIES, REFUSED) if f"`{family}`" not in text] == []
