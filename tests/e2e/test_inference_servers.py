"""The verbs of `InferenceServer` on real servers of each kind, and publishes to them that prove themselves.

SGLang is not a part of requirements/cpu.txt: its half runs where `TRL_ATROPOS_SGLANG_PYTHON` names a Python that has it
(docs/servers.md), and is skipped by that name elsewhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import torch
from fork_server import ForkedProcess
from servers import HOST, ROOT, save_tiny_model, serve
from tiny_models import perturb
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_atropos import AtroposSGLangClient, AtroposVLLMClient, InferenceServer
from trl_atropos.checks.finding import diagnose, examine
from trl_atropos.checks.server import SERVER_CHECKS, TrainerSide
from trl_atropos.checks.vllm import VLLM_CHECKS, inspect_inference_server
from trl_atropos.cli.launch.processes import free_port
from trl_atropos.errors import PreflightError, WeightSyncError
from trl_atropos.trainer.preflight import read_server_config
from trl_atropos.weight_sync.connecting import connect_server
from trl_atropos.weight_sync.http import UNKNOWN, ServerSession
from trl_atropos.weight_sync.options import WeightSyncOptions
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.server_link import ServerLink
from trl_atropos.weight_sync.transports.sglang_group import SGLangGlooTransport


SGLANG_PYTHON = os.environ.get("TRL_ATROPOS_SGLANG_PYTHON")
START_TIMEOUT_S = 240.0
REQUEST_TIMEOUT_S = 30.0


class SGLangServer:
    """SGLang on a CPU with the shims of tests/sglang_shims, on the same port after every start.

    Args:
        model (`Path`):
            The checkpoint.
        log_path (`Path`):
            Where the newest process writes.
    """

    def __init__(self, model: Path, log_path: Path):
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self.log_path = log_path
        self.process: subprocess.Popen[bytes] | None = None
        self.command = [
            *(
                str(SGLANG_PYTHON),
                str(ROOT / "tests" / "sglang_shims" / "launch_server.py"),
                "--model-path",
                str(model),
            ),
            *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
            *("--grammar-backend", "none", "--disable-overlap-schedule", "--mem-fraction-static", "0.3"),
            *("--max-total-tokens", "8192", "--context-length", "256", "--host", HOST, "--port", str(port)),
        ]

    def start(self) -> None:
        """Return when it is healthy."""
        environment = {
            **os.environ,
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self.process.poll() is None, f"the server ended:\n{self.log_path.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"the server is not up:\n{self.log_path.read_text()[-4000:]}"
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except requests.exceptions.RequestException:
                pass
            time.sleep(0.5)

    def kill(self) -> None:
        """End all of its processes at once."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def sglang_server(model: Path, log_path: Path) -> Iterator[SGLangServer]:
    """Run SGLang."""
    server = SGLangServer(model, log_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Served:
    """A server, its checkpoint, and how many policies were published to it."""

    def __init__(self, kind: str, url: str, model_dir: Path, sglang: SGLangServer | None = None):
        self.kind = kind
        self.sglang = sglang
        self.url = url
        self.model_dir = model_dir
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.version = 0

    def connect(self) -> InferenceServer:
        return connect_server(self.url, connection_timeout=REQUEST_TIMEOUT_S, request_timeout=REQUEST_TIMEOUT_S)

    def policy(self, seed: int) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32)
        perturb(model, seed=seed, scale=0.02)
        return model

    def publish(self, seed: int) -> float:
        """Publish another policy; returns the mean logprob difference that the probe found."""
        self.version += 1
        client = self.connect()
        assert isinstance(client, AtroposVLLMClient | AtroposSGLangClient)
        with client.weight_sync(self.version, tokenizer=self.tokenizer) as sync:
            sync.push(self.policy(seed))
        assert sync.report is not None and sync.report.probe is not None
        return sync.report.probe.mean_abs_diff

    def publish_fails(self, seed: int, *, match: str) -> None:
        """Publish another policy, which fails with this message and leaves the server paused."""
        with pytest.raises(WeightSyncError, match=match):
            self.publish(seed)


@pytest.fixture(scope="module", params=["vLLM", "SGLang"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if request.param == "SGLang" and SGLANG_PYTHON is None:
        pytest.skip("TRL_ATROPOS_SGLANG_PYTHON names no Python that has SGLang (docs/servers.md)")
    directory = tmp_path_factory.mktemp(request.param)
    model_dir = save_tiny_model(directory / "model", tied=True, seed=0)
    log_path = directory / "server.log"
    if request.param == "SGLang":
        with sglang_server(model_dir, log_path) as sglang:
            yield Served(request.param, sglang.url, model_dir, sglang)
    else:
        with serve(model_dir, "--enforce-eager", log_path=log_path) as url:
            yield Served(request.param, url, model_dir)


def test_the_server_says_which_kind_it_is(served: Served) -> None:
    client = served.connect()
    expected = {"vLLM": AtroposVLLMClient, "SGLang": AtroposSGLangClient}[served.kind]
    assert type(client) is expected
    assert client.kind == served.kind
    description = client.describe()
    assert (description.model, description.dtype, description.max_model_len) == (
        str(served.model_dir),
        "bfloat16",
        256,
    )
    assert description.backend == {"vLLM": "trl_atropos_shm", "SGLang": "sglang_gloo"}[served.kind]
    assert client.get_world_size() == 1
    assert client.list_models() == [client.model]
    assert client.get_weight_version() == "default"
    assert client.render_messages([{"role": "user", "content": "hi"}]) is None
    client.wait_until_healthy(1.0)


def test_the_doctor_and_a_preflight_know_its_kind(served: Served) -> None:
    with ServerSession(served.url, REQUEST_TIMEOUT_S, kind=UNKNOWN) as session:
        facts = inspect_inference_server(session, max_length=256)
    assert (facts.kind, facts.error, facts.weight_version, facts.max_model_len) == (served.kind, None, "default", 256)
    knows_versions = served.kind == "vLLM"
    found = [finding.name for finding in diagnose(facts, VLLM_CHECKS)]
    assert found == ([] if knows_versions else ["vllm_without_policy_versions"])
    seen = read_server_config(served.connect(), TrainerSide(max_length=256, device="cpu", weight_sync_mode="merged"))
    assert (seen.kind, seen.dtype, seen.knows_policy_versions) == (served.kind, "bfloat16", knows_versions)
    errors = [finding.name for finding in examine(seen, SERVER_CHECKS) if finding.level == "error"]
    assert errors == []


def test_publishes_prove_themselves(served: Served) -> None:
    for seed in (1, 2, 3):
        # Two layers in bfloat16 with large weights: rounding explains 0.04, another policy is farther off by tens.
        assert served.publish(seed) < 0.1
        assert served.connect().get_weight_version() == str(served.version)


def test_logprobs_are_those_of_the_published_policy(served: Served) -> None:
    served.publish(4)
    ids = served.tokenizer("Water boils at 100")["input_ids"]
    with torch.no_grad():
        logits = served.policy(4)(torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    (found,) = served.connect().get_prompt_logprobs([ids])
    assert (torch.tensor(found) - expected).abs().mean() < 0.1


@pytest.mark.parametrize("clear_cache", [True, False])
def test_requests_wait_for_the_end_of_a_pause(served: Served, clear_cache: bool) -> None:
    client = served.connect()
    client.pause(clear_cache=clear_cache)
    client.pause(clear_cache=clear_cache)
    answers: list[list[list[float]]] = []
    asking = threading.Thread(target=lambda: answers.append(served.connect().get_prompt_logprobs([[1, 2, 3]])))
    asking.start()
    try:
        client.wait_until_healthy(2.0)
        asking.join(1.5)
        assert asking.is_alive() and not answers
    finally:
        client.resume()
    asking.join(REQUEST_TIMEOUT_S)
    assert len(answers) == 1 and len(answers[0][0]) == 2


def test_requests_in_flight_survive_publishes(served: Served) -> None:
    """Clients that complete all the time through five publishes: every answer is whole."""
    client, stop = served.connect(), threading.Event()
    lengths: list[int] = []

    def complete() -> None:
        body = {"model": client.model, "prompt": "a", "max_tokens": 64, "temperature": 1.0, "ignore_eos": True}
        while not stop.is_set():
            response = requests.post(f"{served.url}/v1/completions", json=body, timeout=60)
            usage = response.json()["usage"] if response.status_code == 200 else {"completion_tokens": -1}
            lengths.append(usage["completion_tokens"])

    threads = [threading.Thread(target=complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(5, 10):
            assert served.publish(seed) < 0.1
    finally:
        stop.set()
        for thread in threads:
            thread.join(90)
    assert lengths and set(lengths) == {64}


def test_an_unfinished_update_is_replaced(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    client = served.connect()
    client.pause()
    client.begin_weight_update()
    assert served.publish(10) < 0.1
    assert "has an unfinished weight update of another trainer" in caplog.text


def test_a_tensor_that_does_not_arrive_is_found(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the workers report nothing, SGLang answers 200 to a part of a policy: the probe finds it."""
    if served.kind != "SGLang":
        pytest.skip("vLLM's workers count what arrives: tests/process/transport_contract.py")
    send = SGLangGlooTransport.send
    monkeypatch.setattr(SGLangGlooTransport, "send", lambda self, specs: send(self, specs[: len(specs) // 2]))
    served.publish_fails(11, match="logprob")
    monkeypatch.undo()
    assert served.publish(12) < 0.1


def test_a_server_that_is_killed_in_mid_publish_is_given_everything_once_it_is_back(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every other phase: tests/unit/weight_sync/test_sglang_publisher.py."""
    sglang = served.sglang
    if sglang is None:
        pytest.skip("vLLM: test_faults.py")
    is_killed = threading.Event()
    broadcast = SGLangGlooTransport._broadcast

    def kill_in_the_first(transport: SGLangGlooTransport, tensors: Sequence[torch.Tensor]) -> None:
        if not is_killed.is_set():
            sglang.kill()
            is_killed.set()
        broadcast(transport, tensors)

    def restart() -> None:
        assert is_killed.wait(REQUEST_TIMEOUT_S)
        sglang.start()

    monkeypatch.setattr(SGLangGlooTransport, "_broadcast", kill_in_the_first)
    options = WeightSyncOptions(on_publish_failure="retry", vllm_server_timeout=START_TIMEOUT_S)
    link = ServerLink(served.connect(), SGLangGlooTransport(REQUEST_TIMEOUT_S), torch.bfloat16, options)
    policy = served.policy(13)
    probe = LogprobProbe(served.tokenizer, policy.config.vocab_size)
    publisher = PolicyPublisher(options, torch.bfloat16, ServerGroup([link], options), make_probe=lambda model: probe)
    restarting = threading.Thread(target=restart)
    restarting.start()
    served.version += 1
    report = publisher.publish(policy, served.version)
    restarting.join()
    publisher.close()
    assert (report.num_retries, report.num_failures) == (1, 1)
    assert "failed in state `transferring`" in caplog.text and "holds no complete policy" in caplog.text
    assert report.probe is not None and report.probe.mean_abs_diff < 0.1
    assert served.connect().get_weight_version() == str(served.version)


def test_what_sglang_does_not_have_is_refused_by_name(served: Served) -> None:
    if served.kind != "SGLang":
        pytest.skip("vLLM has these verbs: test_adapter_publish.py")
    client = served.connect()
    with pytest.raises(PreflightError, match="--weight_sync_mode merged"):
        client.load_lora_adapter("a", "/nowhere")
    with pytest.raises(PreflightError, match="--vllm_enable_sleep_mode off"):
        client.sleep(1)
    assert client.find_calls(["a", "b"]) == [None, None]


def test_what_answers_and_is_no_server_is_named() -> None:
    port = free_port()
    process = ForkedProcess([sys.executable, "-m", "http.server", str(port), "--bind", HOST], cwd=ROOT)
    try:
        with pytest.raises((PreflightError, WeightSyncError), match="neither a vLLM nor an SGLang server"):
            connect_server(f"http://{HOST}:{port}", connection_timeout=20.0)
    finally:
        process.kill()
        process.wait()
