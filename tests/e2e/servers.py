"""Real vLLM servers and small real models for the end-to-end tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import torch
from fork_server import ForkedProcess
from tiny_models import byte_tokenizer, tiny_llama, tiny_qwen3
from transformers import AutoTokenizer
from trl.scripts.vllm_serve import build_command, make_parser

from trl_atropos import AtroposConfig
from trl_atropos.cli.launch.processes import free_port


ROOT = Path(__file__).resolve().parent.parent.parent
VLLM = (sys.executable, str(Path(__file__).with_name("forking_vllm.py")))
HOST = "127.0.0.1"
START_TIMEOUT_S = 240.0
VOCAB_SIZE = 320


def save_tiny_model(
    directory: Path, *, tied: bool, seed: int, architecture: str = "llama", max_length: int = 512
) -> Path:
    """Save a two-layer model in bfloat16, for sequences of up to `max_length` tokens, with a byte-level tokenizer.

    Weights are large, so that wrong ones show.
    """
    make = {"llama": tiny_llama, "qwen3": tiny_qwen3}[architecture]
    model = make(
        seed=seed,
        tied=tied,
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        initializer_range=0.1,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def add_chat_template(model_dir: Path) -> Path:
    """Give the tokenizer a template in which every turn ends with an end-of-sequence token, as in most."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] or '' }}"
        "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<eos>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(model_dir)
    return model_dir


def config(output_dir: Path, api_url: str, vllm_url: str, **options: object) -> AtroposConfig:
    """Options of a short run on this machine."""
    return AtroposConfig(
        output_dir=str(output_dir),
        atropos_api_url=api_url,
        vllm_server_base_url=vllm_url,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        **{"max_length": 128, **options},
    )


@contextmanager
def running(*command: str, log_path: Path) -> Iterator[None]:
    """A process that is killed at the end; it starts in the repository's root."""
    with log_path.open("wb") as log:
        process = ForkedProcess(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def trl_vllm_serve(arguments: list[str]) -> list[str]:
    """The command that `trl vllm-serve` turns itself into. Its own start, which imports TRL first, is part of test_training.py."""
    options, others = make_parser(prog="trl vllm-serve").parse_args_and_config(
        arguments, return_remaining_strings=True
    )
    return build_command(options, others)


class VLLMServer:
    """A `trl vllm-serve` process (plain `vllm serve` without dev mode) with our middleware and one of our engines.

    It computes on one thread that may run on any core: others would wait for each other, where tests share the cores.
    `start` returns when it is healthy, on the same port every time; `kill` ends it with all of its workers at once.
    """

    def __init__(
        self,
        model: Path,
        *extra_args: str,
        log_path: Path,
        backend: str = "trl_atropos_shm",
        has_dev_mode: bool = True,
        environment: dict[str, str] | None = None,
    ):
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self.log_path = log_path
        self.process: ForkedProcess | None = None
        self._sockets: tempfile.TemporaryDirectory[str] | None = None
        arguments = [
            *("--host", HOST, "--port", str(port), "--max-model-len", "256"),
            *("--weight-transfer-config", f'{{"backend": "{backend}"}}'),
            *("--middleware", "trl_atropos.serving.generate_endpoint.GenerateEndpoint"),
            *extra_args,
        ]
        command = ["serve", str(model), *arguments]
        if has_dev_mode:
            interpreter, m, module, *command = trl_vllm_serve(["--model", str(model), *arguments])
            assert (interpreter, m, module) == (sys.executable, "-m", "vllm.entrypoints.cli.main")
        self.command = [*VLLM, *command]
        self.environment = {
            **os.environ,
            **({"VLLM_SERVER_DEV_MODE": "1"} if has_dev_mode else {}),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **(environment or {}),
        }

    def start(self) -> None:
        """Start the server and wait until it is healthy."""
        # Those of a server that is killed stay. pytest's directories have names that are too long for sockets.
        self._sockets = self._sockets or tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True)
        environment = {**self.environment, "VLLM_RPC_BASE_PATH": self._sockets.name}
        with self.log_path.open("ab") as log:
            self.process = ForkedProcess(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        wait_until_healthy(self.url, self.process, self.log_path)

    def kill(self) -> None:
        """SIGKILL to every process of the server."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._wait_for_port()
        self._remove_sockets()

    def stop(self) -> None:
        """End the server and leave no process behind."""
        if self.process is not None:
            _end_session(self.process)
        self._remove_sockets()

    def _wait_for_port(self) -> None:
        # Its engine has the listening socket, too, and may take longer to end than the process that was waited for.
        address = urlsplit(self.url)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_server((address.hostname, address.port)).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _remove_sockets(self) -> None:
        if self._sockets is not None:
            self._sockets.cleanup()
            self._sockets = None


@contextmanager
def serve(model: Path, *extra_args: str, log_path: Path, **options: Any) -> Iterator[str]:
    """Run a [`VLLMServer`] and yield its URL."""
    server = VLLMServer(model, *extra_args, log_path=log_path, **options)
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


def wait_until_healthy(url: str, process: ForkedProcess | subprocess.Popen[bytes], log_path: Path) -> None:
    """Return when a server answers `/health`, unless it ends before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended:\n{log_path.read_text()[-4000:]}"
        try:
            if requests.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except requests.exceptions.RequestException:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"the server is not healthy after {START_TIMEOUT_S} s:\n{log_path.read_text()[-4000:]}")


def _end_session(process: ForkedProcess) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            continue
