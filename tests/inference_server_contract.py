"""What every inference server must do, as a class of tests that run on a real one.

Derive from it and give it a fixture `served`, a [`Served`] with the kind of the server. Policies are published to it, so
that it has another one afterwards.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import requests
import torch
from tiny_models import perturb
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_atropos import AtroposSGLangClient, AtroposVLLMClient, InferenceServer
from trl_atropos.checks.finding import diagnose, examine
from trl_atropos.checks.server import SERVER_CHECKS, TrainerSide
from trl_atropos.checks.vllm import VLLM_CHECKS, inspect_inference_server
from trl_atropos.errors import WeightSyncError
from trl_atropos.trainer.preflight import read_server_config
from trl_atropos.weight_sync.connecting import connect_server
from trl_atropos.weight_sync.http import UNKNOWN, ServerSession


REQUEST_TIMEOUT_S = 30.0


class Served:
    """A server, its checkpoint, and how many policies were published to it."""

    def __init__(self, kind: str, url: str, model_dir: Path):
        self.kind = kind
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


class InferenceServerContract:
    """Its tests, in an order in which the first one finds the server as it was started.

    `num_clients` ask for completions all the time while `num_publishes` policies are published.
    """

    num_clients = 4
    num_publishes = 5

    def test_the_server_says_which_kind_it_is(self, served: Served) -> None:
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
        question = [{"role": "user", "content": "hi"}]
        template = served.tokenizer.chat_template
        expected_ids = template and served.tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=False
        )
        assert client.render_messages(question) == expected_ids
        client.wait_until_healthy(1.0)

    def test_the_doctor_and_a_preflight_know_its_kind(self, served: Served) -> None:
        with ServerSession(served.url, REQUEST_TIMEOUT_S, kind=UNKNOWN) as session:
            facts = inspect_inference_server(session, max_length=256)
        assert (facts.kind, facts.error, facts.weight_version, facts.max_model_len) == (
            served.kind,
            None,
            "default",
            256,
        )
        assert [finding.name for finding in diagnose(facts, VLLM_CHECKS)] == []
        knows_versions = served.kind == "vLLM"
        seen = read_server_config(
            served.connect(), TrainerSide(max_length=256, device="cpu", weight_sync_mode="merged")
        )
        assert (seen.kind, seen.dtype, seen.knows_policy_versions) == (served.kind, "bfloat16", knows_versions)
        errors = [finding.name for finding in examine(seen, SERVER_CHECKS) if finding.level == "error"]
        assert errors == []

    def test_publishes_prove_themselves(self, served: Served) -> None:
        for seed in (1, 2, 3):
            # Two layers in bfloat16 with large weights: rounding explains 0.04, another policy is farther off by tens.
            assert served.publish(seed) < 0.1
            assert served.connect().get_weight_version() == str(served.version)

    def test_logprobs_are_those_of_the_published_policy(self, served: Served) -> None:
        served.publish(4)
        ids = served.tokenizer("Water boils at 100")["input_ids"]
        with torch.no_grad():
            logits = served.policy(4)(torch.tensor([ids])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        (found,) = served.connect().get_prompt_logprobs([ids])
        assert (torch.tensor(found) - expected).abs().mean() < 0.1

    @pytest.mark.parametrize("clear_cache", [True, False])
    def test_requests_wait_for_the_end_of_a_pause(self, served: Served, clear_cache: bool) -> None:
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

    def test_requests_in_flight_survive_publishes(self, served: Served) -> None:
        """Clients that complete all the time through publishes: every answer is whole."""
        client, stop = served.connect(), threading.Event()
        lengths: list[int] = []

        def complete() -> None:
            body = {"model": client.model, "prompt": "a", "max_tokens": 64, "temperature": 1.0, "ignore_eos": True}
            while not stop.is_set():
                response = requests.post(f"{served.url}/v1/completions", json=body, timeout=60)
                usage = response.json()["usage"] if response.status_code == 200 else {"completion_tokens": -1}
                lengths.append(usage["completion_tokens"])

        threads = [threading.Thread(target=complete) for _ in range(self.num_clients)]
        for thread in threads:
            thread.start()
        try:
            for seed in range(100, 100 + self.num_publishes):
                assert served.publish(seed) < 0.1
        finally:
            stop.set()
            for thread in threads:
                thread.join(90)
        assert lengths and set(lengths) == {64}

    def test_an_unfinished_update_is_replaced(self, served: Served, caplog: pytest.LogCaptureFixture) -> None:
        client = served.connect()
        client.pause()
        client.begin_weight_update()
        assert served.publish(10) < 0.1
        assert "has an unfinished weight update of another trainer" in caplog.text
