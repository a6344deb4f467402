"""Real vLLM servers and small real models for the end-to-end tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


HOST = "127.0.0.1"
START_TIMEOUT_S = 240.0
VOCAB_SIZE = 320


def save_tiny_llama(directory: Path, *, tied: bool, seed: int) -> Path:
    """Save a two-layer Llama with a byte-level tokenizer. Weights are large, so that wrong ones show."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<eos>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        directory
    )
    return directory


def free_port() -> int:
    """Return a TCP port that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def serve(model: Path, *extra_args: str, log_path: Path, has_dev_mode: bool = True) -> Iterator[str]:
    """Run `trl vllm-serve` (plain `vllm serve` without dev mode) with our engine and middleware; yield its URL once it
    is healthy; leave no process behind."""
    port = free_port()
    bin_dir = Path(sys.executable).parent
    program = [bin_dir / "trl", "vllm-serve", "--model", model] if has_dev_mode else [bin_dir / "vllm", "serve", model]
    command = [
        *map(str, program),
        *("--host", HOST, "--port", str(port), "--max-model-len", "256"),
        *("--weight-transfer-config", '{"backend": "trl_atropos_shm"}'),
        *("--middleware", "trl_atropos.serving.generate_endpoint.GenerateEndpoint"),
        *extra_args,
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    url = f"http://{HOST}:{port}"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait_until_healthy(url, process, log_path)
        yield url
    finally:
        _end_session(process)


def _wait_until_healthy(url: str, process: subprocess.Popen, log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log_path.read_text()[-4000:]}"
        try:
            if requests.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except requests.exceptions.RequestException:
            pass
        time.sleep(0.25)
    raise TimeoutError(f"the server is not healthy after {START_TIMEOUT_S} s:\n{log_path.read_text()[-4000:]}")


def _end_session(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue
