"""A policy published into a running `trl vllm-serve` is the policy that a fresh server loads from the checkpoint.

Both pitfalls of vLLM's CPU backend are real here: a tied output head that keeps its old weights after a reload, and
parameters that do not exist between start and finish of an update.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch
from peft import LoraConfig, get_peft_model
from servers import VOCAB_SIZE, save_tiny_llama, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_atropos.errors import PreflightError, WeightSyncError
from trl_atropos.preflight import inspect_server, make_transport
from trl_atropos.rollout_key import rollout_key
from trl_atropos.weight_sync.probe import LogprobProbe
from trl_atropos.weight_sync.publisher import PolicyPublisher
from trl_atropos.weight_sync.shm import SharedMemoryTransport
from trl_atropos.weight_sync.vllm_client import AtroposVLLMClient


SEQUENCES = [[7, 11, 13, 17, 19, 23, 29, 31, 37, 41], [250, 3, 250, 3, 99, 98, 97, 96], [5, 5, 5, 5, 5, 5]]

# Two vLLM processes on the same bf16 weights differ only by the order of sums; one bf16 step at a logprob of -6 is
# 2^2 * 2^-8 = 0.016.
BF16_NOISE = 0.02


@dataclass(frozen=True)
class Setting:
    """A server that was started from checkpoint A, and the trainer's model B."""

    url: str
    start: Path
    policy: Path
    is_tied: bool


@pytest.fixture(scope="module", params=["tied", "untied"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp(request.param)
    is_tied = request.param == "tied"
    start = save_tiny_llama(directory / "A", tied=is_tied, seed=1)
    policy = save_tiny_llama(directory / "B", tied=is_tied, seed=2)
    with serve(start, "--enforce_eager", "True", log_path=directory / "server.log") as url:
        yield Setting(url, start, policy, is_tied)


def make_publisher(client: AtroposVLLMClient, model_dir: Path, tolerance: float = 4.0) -> PolicyPublisher:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model_config = AutoModelForCausalLM.from_pretrained(model_dir).config
    facts = inspect_server(client, model_config, max_length=256)
    transport = make_transport(facts, client, torch.device("cpu"))
    return PolicyPublisher(client, transport, LogprobProbe(tokenizer, VOCAB_SIZE), facts.dtype, tolerance)


def load(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def max_abs_diff(left: list[list[float]], right: list[list[float]]) -> float:
    return max(abs(a - b) for row, other in zip(left, right, strict=True) for a, b in zip(row, other, strict=True))


def test_published_policy_equals_a_fresh_server_from_the_saved_checkpoint(setting: Setting, tmp_path: Path) -> None:
    client = AtroposVLLMClient(setting.url)
    before = client.get_prompt_logprobs(SEQUENCES)
    report = make_publisher(client, setting.policy).publish(load(setting.policy), policy_version=1)
    published = client.get_prompt_logprobs(SEQUENCES)

    with serve(setting.policy, "--enforce_eager", "True", log_path=tmp_path / "fresh.log") as fresh_url:
        fresh = AtroposVLLMClient(fresh_url).get_prompt_logprobs(SEQUENCES)

    assert max_abs_diff(published, fresh) < BF16_NOISE
    # The check above can fail: the two checkpoints are far apart.
    assert max_abs_diff(published, before) > 1.0
    assert client.get_weight_version() == "1"
    assert not client.is_paused()
    num_parameters = sum(parameter.numel() for parameter in load(setting.policy).parameters())
    assert report.num_bytes == 2 * num_parameters


def test_merged_lora_is_what_the_server_answers_with_and_the_base_stays(setting: Setting) -> None:
    client = AtroposVLLMClient(setting.url)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(load(setting.policy), lora)
    base = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    publisher = make_publisher(client, setting.policy)
    publisher.publish(model, policy_version=2)
    published = client.get_prompt_logprobs(SEQUENCES)

    merged = get_peft_model(load(setting.policy), lora)
    merged.load_state_dict(model.state_dict())
    publisher.publish(merged.merge_and_unload(), policy_version=3)
    assert max_abs_diff(published, client.get_prompt_logprobs(SEQUENCES)) < BF16_NOISE

    publisher.publish(load(setting.policy), policy_version=4)
    assert max_abs_diff(published, client.get_prompt_logprobs(SEQUENCES)) > 0.5
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in base.items())


def test_eight_clients_generate_without_an_error_through_twenty_publishes(setting: Setting) -> None:
    client = AtroposVLLMClient(setting.url)
    publisher = make_publisher(client, setting.policy)
    models = [load(setting.start), load(setting.policy)]
    stop = threading.Event()

    def generate(seed: int) -> list[int]:
        statuses = []
        while not stop.is_set():
            body = {"prompt": {"prompt_token_ids": [seed, 7, 11]}, "n": 2, "max_tokens": 24, "ignore_eos": True}
            answer = requests.post(f"{setting.url}/generate", json=body, timeout=120)
            statuses.append(answer.status_code)
            if answer.status_code == 200:
                assert [len(choice) for choice in answer.json()["logprobs"]] == [24, 24]
        return statuses

    with ThreadPoolExecutor(max_workers=8) as executor:
        futures = [executor.submit(generate, seed) for seed in range(8)]
        try:
            for version in range(10, 30):
                publisher.publish(models[version % 2], version)
        finally:
            stop.set()
        statuses = [status for future in futures for status in future.result()]

    assert set(statuses) == {200}
    assert len(statuses) >= 8
    assert not client.is_paused()
    assert client.get_weight_version() == "29"


def test_server_remembers_which_policy_sampled_a_rollout(setting: Setting) -> None:
    client = AtroposVLLMClient(setting.url)
    make_publisher(client, setting.policy).publish(load(setting.policy), policy_version=40)
    prompt = [1, 2, 3]
    body = {"prompt": {"prompt_token_ids": prompt}, "max_tokens": 5, "temperature": 1.0, "ignore_eos": True}
    answer = requests.post(f"{setting.url}/generate", json=body, timeout=60).json()
    completion = [int(token) for entry in answer["logprobs"][0] for token in entry[0]]
    versions = client.get_policy_versions([rollout_key(prompt + completion), rollout_key(prompt)])
    assert versions == [40, None]


def test_a_policy_that_did_not_arrive_leaves_the_server_paused(setting: Setting) -> None:
    """The transport moves the start checkpoint while the trainer holds another: the probe must notice."""
    client = AtroposVLLMClient(setting.url)
    publisher = make_publisher(client, setting.policy)

    class StaleTransport(SharedMemoryTransport):
        def stage(self, source: object) -> None:
            super().stage(type(source)(load(setting.start), publisher.dtype))

    publisher.transport = StaleTransport()
    with pytest.raises(WeightSyncError, match=r"phase `verify`.*is accepted \(4\.0 x") as caught:
        publisher.publish(load(setting.policy), policy_version=50)
    assert "The server is paused" in str(caught.value)
    assert client.is_paused()

    # The next good publish heals it.
    make_publisher(client, setting.policy).publish(load(setting.policy), policy_version=51)
    assert not client.is_paused()


def test_an_update_that_a_dead_trainer_left_open_is_completed(setting: Setting) -> None:
    client = AtroposVLLMClient(setting.url)
    client.pause()
    client.start_weight_update()
    make_publisher(client, setting.policy).publish(load(setting.policy), policy_version=60)
    assert not client.is_paused()
    assert client.get_weight_version() == "60"


def test_incomplete_policy_is_refused_and_never_served(setting: Setting) -> None:
    client = AtroposVLLMClient(setting.url)
    publisher = make_publisher(client, setting.policy)
    publisher.publish(load(setting.policy), policy_version=70)
    good = client.get_prompt_logprobs(SEQUENCES)

    class IncompleteTransport(SharedMemoryTransport):
        def open(self, client: AtroposVLLMClient, manifest: list) -> None:
            super().open(client, [spec for spec in manifest if "layers.1.mlp" not in spec.name])

        def stage(self, source: object) -> None:
            pairs = ((name, tensor) for name, tensor in source if "layers.1.mlp" not in name)
            super().stage(pairs)

    incomplete = make_publisher(client, setting.policy)
    incomplete.transport = IncompleteTransport()
    with pytest.raises(WeightSyncError, match=r"phase `finish`.*were not sent.*layers\.1\.mlp"):
        incomplete.publish(load(setting.policy), policy_version=71)
    assert client.is_paused()

    make_publisher(client, setting.policy).publish(load(setting.policy), policy_version=72)
    assert max_abs_diff(good, client.get_prompt_logprobs(SEQUENCES)) == 0.0


def test_shared_memory_has_no_name_while_the_transport_is_open(setting: Setting) -> None:
    names = set(os.listdir("/dev/shm"))
    client = AtroposVLLMClient(setting.url)
    publisher = make_publisher(client, setting.policy)
    publisher.publish(load(setting.policy), policy_version=80)
    # Compared, because other trainers of this machine may be opening segments of their own.
    assert not [name for name in set(os.listdir("/dev/shm")) - names if name.startswith("trl_atropos-")]


def test_another_model_is_refused_before_anything_is_sent(setting: Setting) -> None:
    client = AtroposVLLMClient(setting.url)
    config = AutoModelForCausalLM.from_pretrained(setting.policy).config
    config.num_hidden_layers = 3
    with pytest.raises(PreflightError, match=r"num_hidden_layers=2.*num_hidden_layers=3"):
        inspect_server(client, config, max_length=256)
