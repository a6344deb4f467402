"""What preflight says about servers that cannot work with this run, over real HTTP with a scripted server.

The real server is met in tests/e2e/test_generate_endpoint.py.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny_models import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trl_atropos.errors import PreflightError, WeightSyncError
from trl_atropos.trainer.atropos_config import AtroposConfig
from trl_atropos.trainer.preflight import (
    ServerFacts,
    check_launch,
    inspect_run,
    inspect_server,
    trainer_side,
    warn_of_spinning_threads,
)
from trl_atropos.weight_sync.client import AtroposVLLMClient


VOCAB_SIZE = 32
MAX_LENGTH = 64
GOOD_FACTS = ServerFacts("trl_atropos_shm", torch.bfloat16, has_processed_logprobs=True, knows_policy_versions=True)


class ScriptedServer(ThreadingHTTPServer):
    """A vLLM server as far as preflight asks it.

    Args:
        answers (`dict[str, tuple[int, Any]]`):
            Path -> status and JSON; any other path is a 404.
    """

    def __init__(self, answers: dict[str, tuple[int, Any]]):
        super().__init__(("127.0.0.1", 0), ScriptedHandler)
        self.answers = answers
        self.requests: list[tuple[str, Any]] = []


class ScriptedHandler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_GET(self) -> None:
        request = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.partition("?")[0]
        self.server.requests.append((path, json.loads(request) if request else None))
        status, payload = self.server.answers.get(path, (404, {"detail": "Not Found"}))
        body = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Keep the report of pytest free of requests."""


def llama_config(**fields: Any) -> LlamaConfig:
    values = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(**{**values, **fields})


def good_answers(model: Path) -> dict[str, tuple[int, Any]]:
    """The answers of a server that fits, as vLLM 0.32 words them."""
    model_config = {
        "model": str(model),
        "dtype": "torch.bfloat16",
        "max_model_len": MAX_LENGTH,
        "logprobs_mode": "processed_logprobs",
    }
    info = {"model_config": model_config, "weight_transfer_config": {"backend": "trl_atropos_shm"}}
    return {
        "/health": (200, {}),
        "/v1/models": (200, {"data": [{"id": "served"}]}),
        "/server_info": (200, {"vllm_config": info}),
        "/atropos/policy_versions": (200, {"policy_versions": []}),
    }


def vllm_config(answers: dict[str, tuple[int, Any]]) -> dict[str, Any]:
    """The part of the answers that a test may change."""
    return answers["/server_info"][1]["vllm_config"]


@pytest.fixture
def answers(tmp_path: Path) -> dict[str, tuple[int, Any]]:
    llama_config().save_pretrained(tmp_path / "model")
    return good_answers(tmp_path / "model")


@contextmanager
def serving(answers: dict[str, tuple[int, Any]]) -> Iterator[tuple[AtroposVLLMClient, ScriptedServer]]:
    with ScriptedServer(answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield (
                AtroposVLLMClient(
                    f"http://127.0.0.1:{server.server_port}", connection_timeout=5.0, request_timeout=5.0
                ),
                server,
            )
        finally:
            server.shutdown()
            thread.join(timeout=10)
            assert not thread.is_alive()


def inspect(answers: dict[str, tuple[int, Any]], config: LlamaConfig | None = None) -> ServerFacts:
    with serving(answers) as (client, _):
        return inspect_server(client, config or llama_config(), MAX_LENGTH)


def refusal(answers: dict[str, tuple[int, Any]], config: LlamaConfig | None = None) -> PreflightError:
    with pytest.raises(PreflightError) as caught:
        inspect(answers, config)
    assert_three_parts(caught.value)
    assert "http://127.0.0.1:" in caught.value.what
    return caught.value


def assert_three_parts(error: PreflightError) -> None:
    parts = (error.what, error.why, error.fix)
    assert all(part.endswith(".") for part in parts)
    assert str(error) == " ".join(parts)


def test_server_that_fits_is_described_without_a_warning(answers, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_atropos"):
        assert inspect(answers) == GOOD_FACTS
    assert caplog.messages == []


def test_nothing_is_asked_that_an_engine_would_run(answers, tmp_path):
    # vLLM takes every id of its tokenizer, also one that the embedding does not have, and its engine ends of that one.
    model, tokenizer = LlamaForCausalLM(llama_config()), byte_tokenizer()
    tokenizer.save_pretrained(vllm_config(answers)["model_config"]["model"])
    args = AtroposConfig(output_dir=str(tmp_path), use_cpu=True, max_length=MAX_LENGTH, weight_sync_mode="merged")
    trainer = trainer_side(args, model, tokenizer, torch.device("cpu"))
    with serving(answers) as (client, server):
        inspect_run([client], trainer, args, model)
    assert {path for path, _ in server.requests} == {
        *("/health", "/server_info", "/v1/models", "/atropos/policy_versions", "/tokenize"),
    }


class TestRefusedServers:
    def test_without_dev_mode(self, answers):
        del answers["/server_info"]
        error = refusal(answers)
        assert "development routes" in error.what
        assert "VLLM_SERVER_DEV_MODE=1" in error.fix

    def test_without_weight_transfer_engine(self, answers):
        vllm_config(answers)["weight_transfer_config"] = None
        error = refusal(answers)
        assert "no weight transfer engine" in error.what
        assert "--weight-transfer-config" in error.fix

    def test_without_a_tokenizer(self, answers):
        vllm_config(answers)["model_config"]["skip_tokenizer_init"] = True
        error = refusal(answers)
        assert "--skip-tokenizer-init" in error.what
        assert "--skip-tokenizer-init" in error.fix

    @pytest.mark.parametrize(
        "theirs",
        [{"hidden_size": 32}, {"num_hidden_layers": 2}, {"vocab_size": 33}],
        ids=lambda value: next(iter(value)),
    )
    def test_with_another_model(self, answers, theirs):
        llama_config(**theirs).save_pretrained(vllm_config(answers)["model_config"]["model"])
        error = refusal(answers)
        (name, value), ours = next(iter(theirs.items())), llama_config()
        assert f"{name}={value}, the trainer's model has {name}={getattr(ours, name)}" in error.what
        assert "--model_name_or_path" in error.fix

    def test_with_another_model_type(self, answers):
        directory = Path(vllm_config(answers)["model_config"]["model"])
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
        assert "model_type=mistral, the trainer's model has model_type=llama" in refusal(answers).what

    @pytest.mark.parametrize("path", ["/server_info", "/atropos/policy_versions"])
    def test_failure_of_the_server_is_not_taken_for_an_answer(self, answers, path):
        answers[path] = (500, {"error": {"message": "engine dead"}})
        with pytest.raises(WeightSyncError, match=f"{path}.* answered 500: .*engine dead"):
            inspect(answers)


def test_all_errors_are_said_at_once(answers):
    vllm_config(answers)["weight_transfer_config"] = None
    vllm_config(answers)["model_config"]["skip_tokenizer_init"] = True
    with pytest.raises(PreflightError) as caught:
        inspect(answers)
    assert caught.value.what == "2 checks before the start failed."
    assert "weight_transfer_backend: " in caught.value.why and "server_tokenizer: " in caught.value.why
    assert "trl-atropos preflight" in caught.value.fix


def test_errors_of_all_servers_come_together_and_what_could_not_be_read_is_logged(answers, tmp_path, caplog):
    model, tokenizer = LlamaForCausalLM(llama_config()), byte_tokenizer()
    tokenizer.save_pretrained(vllm_config(answers)["model_config"]["model"])
    args = AtroposConfig(output_dir=str(tmp_path), use_cpu=True, max_length=MAX_LENGTH)
    broken = copy.deepcopy(answers)
    vllm_config(broken)["weight_transfer_config"] = None
    foreign = copy.deepcopy(answers)
    vllm_config(foreign)["weight_transfer_config"]["backend"] = "nccl"
    trainer = trainer_side(args, model, tokenizer, torch.device("cpu"))
    with serving(answers) as (first, _), serving(broken) as (second, _), serving(foreign) as (third, _):
        with caplog.at_level(logging.WARNING, logger="trl_atropos"):
            assert inspect_run([first], trainer, args, model) == [GOOD_FACTS]
        # The scripted server has no /tokenize.
        assert ["/tokenize" in message and "chat_template" in message for message in caplog.messages] == [True]
        with pytest.raises(PreflightError) as caught:
            inspect_run([first, second, third], trainer, args, model)
        assert caught.value.what == "2 checks before the start failed."
        assert second.base_url in caught.value.why and third.base_url in caught.value.why


class TestWarnings:
    @pytest.fixture(autouse=True)
    def at_warning_level(self, caplog):
        with caplog.at_level(logging.WARNING, logger="trl_atropos"):
            yield

    def test_without_our_middleware_versions_are_unknown(self, answers, caplog):
        del answers["/atropos/policy_versions"]
        facts = inspect(answers)
        assert facts.knows_policy_versions is False
        assert ["--middleware trl_atropos.serving" in message for message in caplog.messages] == [True]

    def test_raw_logprobs(self, answers, caplog):
        vllm_config(answers)["model_config"]["logprobs_mode"] = "raw_logprobs"
        facts = inspect(answers)
        assert facts.has_processed_logprobs is False
        assert ["raw_logprobs" in message for message in caplog.messages] == [True]

    def test_config_that_is_not_here_is_said_and_not_compared(self, answers, caplog, tmp_path):
        vllm_config(answers)["model_config"]["model"] = str(tmp_path / "elsewhere")
        assert inspect(answers) == GOOD_FACTS
        assert ["cannot be read here" in message for message in caplog.messages] == [True]

    def test_server_that_generates_longer_than_the_trainer_takes(self, answers, caplog):
        vllm_config(answers)["model_config"]["max_model_len"] = MAX_LENGTH + 1
        assert inspect(answers) == GOOD_FACTS
        assert [f"up to {MAX_LENGTH + 1} tokens" in message for message in caplog.messages] == [True]


class TestLaunch:
    @pytest.mark.parametrize("num_gpus", [0, 1])
    def test_a_process_with_one_device_is_accepted(self, num_gpus):
        check_launch(Accelerator(cpu=True), num_gpus)

    def test_a_process_that_would_spread_over_gpus_is_refused(self):
        with pytest.raises(
            PreflightError, match=r"sees 4 GPUs, and would train on all of them with nn\.DataParallel"
        ) as caught:
            check_launch(Accelerator(cpu=True), 4)
        assert "accelerate launch --num_processes 4" in caught.value.fix


class TestSpinningThreads:
    @pytest.mark.parametrize(
        ("device", "threads", "policy", "is_warned"),
        [
            ("cpu", 2, None, True),
            ("cpu", 2, "active", True),
            ("cpu", 2, "passive", False),
            ("cpu", 2, "PASSIVE", False),
            ("cpu", 1, None, False),
            ("cuda", 2, None, False),
        ],
    )
    def test_they_are_said_where_they_cost(self, monkeypatch, caplog, device, threads, policy, is_warned):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if policy is not None:
            monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        warn_of_spinning_threads(torch.device(device))
        assert ("OMP_WAIT_POLICY=passive" in caplog.text) is is_warned

    @pytest.mark.parametrize(
        ("before", "given", "expected"),
        [("", None, "passive"), ("", "active", "active"), ("import torch;", None, None)],
    )
    def test_the_package_makes_them_sleep_if_it_comes_before_torch(self, before, given, expected):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        if given is not None:
            environment["OMP_WAIT_POLICY"] = given
        code = f"{before}import os, trl_atropos; print(os.environ.get('OMP_WAIT_POLICY'))"
        printed = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert printed.strip() == str(expected)
