"""A policy published into a running `trl vllm-serve` is the policy that a fresh server loads from the checkpoint.

Two architectures, tied and untied, eager and compiled, over shared memory and gloo. Both pitfalls of vLLM's CPU backend
are real here: a tied output head that keeps its old weights after a reload, and parameters that do not exist between
start and finish of an update.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from publishing import BF16_NOISE, SEQUENCES, Publishing, load, max_abs_diff
from servers import VLLMServer, save_tiny_model, serve
from shared_segments import left_since, segments
from tiny_models import perturb

from trl_atropos.errors import PreflightError, WeightSyncError
from trl_atropos.trainer.preflight import inspect_server
from trl_atropos.types import ServedCall
from trl_atropos.weight_sync.server_group import ServerGroup
from trl_atropos.weight_sync.transports.shm import SharedMemoryTransport
from trl_atropos.weight_sync.weights.named_tensors import NamedTensors
from trl_atropos.wire.rollout_key import rollout_key


BEHAVIOUR = ["llama-untied-eager-shm", "llama-tied-eager-gloo"]
"""One server per transport is enough for what does not depend on the architecture."""

on_two_servers = pytest.mark.parametrize("setting", BEHAVIOUR, indirect=True, scope="module")


@dataclass(frozen=True)
class Setting:
    """A server that was started from checkpoint A, and the trainer's model B."""

    url: str
    start: Path
    policy: Path
    backend: str
    is_tied: bool
    flags: tuple[str, ...]


SETTINGS = {
    "llama-untied-eager-shm": ("llama", False, "--enforce_eager", "trl_atropos_shm"),
    "qwen3-tied-compiled-shm": ("qwen3", True, None, "trl_atropos_shm"),
    "llama-tied-eager-gloo": ("llama", True, "--enforce_eager", "trl_atropos_gloo"),
    "qwen3-untied-eager-gloo": ("qwen3", False, "--enforce_eager", "trl_atropos_gloo"),
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    directory = tmp_path_factory.mktemp(request.param)
    architecture, is_tied, eager, backend = SETTINGS[request.param]
    start = save_tiny_model(directory / "A", tied=is_tied, seed=1, architecture=architecture)
    policy = save_tiny_model(directory / "B", tied=is_tied, seed=2, architecture=architecture)
    flags = () if eager is None else (eager, "True")
    with serve(start, *flags, log_path=directory / "server.log", backend=backend) as url:
        yield Setting(url, start, policy, backend, is_tied, flags)


@pytest.fixture
def publishing(setting: Setting) -> Iterator[Publishing]:
    publishing = Publishing(setting.url, setting.policy)
    yield publishing
    publishing.publisher.close()


def test_published_policy_equals_a_fresh_server_from_the_saved_checkpoint(
    setting: Setting, publishing: Publishing, tmp_path: Path
) -> None:
    before = publishing.logprobs()
    report = publishing.publish(load(setting.policy), policy_version=1)
    published = publishing.logprobs()

    with serve(setting.policy, *setting.flags, log_path=tmp_path / "fresh.log") as fresh_url:
        fresh = Publishing(fresh_url, setting.policy).logprobs()

    assert max_abs_diff(published, fresh) < BF16_NOISE
    # The check above can fail: the two checkpoints are far apart.
    assert max_abs_diff(published, before) > 1.0
    assert publishing.client.get_weight_version() == "1"
    assert not publishing.client.is_paused()
    num_parameters = sum(parameter.numel() for parameter in load(setting.policy).parameters())
    assert report.num_bytes == 2 * num_parameters


def lora(model: torch.nn.Module, **options: object) -> PeftModel:
    torch.manual_seed(3)
    defaults = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**{**defaults, **options}))


ADAPTED: dict[str, Callable[[torch.nn.Module], PeftModel]] = {
    "lora": lora,
    "rslora": lambda model: lora(model, use_rslora=True),
    "dora": lambda model: lora(model, use_dora=True),
    "q_and_v_only": lambda model: lora(model, target_modules=["q_proj", "v_proj"]),
    "modules_to_save_norm": lambda model: lora(model, modules_to_save=["norm"]),
}
UNTIED_ONLY: dict[str, Callable[[torch.nn.Module], PeftModel]] = {
    "embeddings": lambda model: lora(model, target_modules=["embed_tokens", "q_proj"]),
    "modules_to_save_lm_head": lambda model: lora(model, modules_to_save=["lm_head"]),
}


def test_what_peft_merges_is_what_the_server_answers_with(setting: Setting, publishing: Publishing) -> None:
    """Every adapter against a full publish of PEFT's own float32 merge, which the test above shows to be a fresh load."""
    cases = ADAPTED if setting.is_tied else {**ADAPTED, **UNTIED_ONLY}
    publishing.publish(load(setting.policy), policy_version=0)
    base_logprobs = publishing.logprobs()
    for version, (name, make) in enumerate(cases.items()):
        model = make(load(setting.policy))
        perturb(model, seed=version, scale=0.02)
        first = publishing.publish(model, policy_version=10 * version)
        perturb(model, seed=100 + version, scale=0.02)
        # The second publish sends only what training can have changed.
        changed = publishing.publish(model, policy_version=10 * version + 1)
        published = publishing.logprobs()
        assert (first.mode, changed.mode) == ("full", "merged"), name
        assert changed.num_bytes < first.num_bytes, name

        merged = model.merge_and_unload(safe_merge=True)
        publishing.publish(merged, policy_version=10 * version + 2)
        assert max_abs_diff(published, publishing.logprobs()) < BF16_NOISE, name
        assert max_abs_diff(published, base_logprobs) > 0.2, name


@pytest.mark.parametrize("setting", ["llama-tied-eager-gloo"], indirect=True, scope="module")
def test_one_side_of_tied_embeddings_is_refused_by_name(setting: Setting, publishing: Publishing) -> None:
    before = publishing.logprobs()
    with pytest.raises(
        PreflightError, match=r"lm_head\.weight` is tied to `model\.embed_tokens\.weight`.*ensure_weight_tying"
    ):
        publishing.publish(UNTIED_ONLY["embeddings"](load(setting.policy)), policy_version=1)
    assert publishing.logprobs() == before


@on_two_servers
def test_a_prefix_that_was_cached_under_the_old_policy_is_computed_again(
    setting: Setting, publishing: Publishing
) -> None:
    """vLLM does not forget cached prefixes by itself: a completion after a long prompt shows which policy computed it."""
    prompt = list(range(2, 130))
    body = {"prompt": {"prompt_token_ids": prompt}, "max_tokens": 1, "temperature": 1.0, "seed": 0}

    def logprob_of_next_token() -> tuple[str, float]:
        answer = requests.post(f"{setting.url}/generate", json=body, timeout=60).json()
        ((token, logprob),) = answer["logprobs"][0][0][0].items()
        return token, logprob

    publishing.publish(load(setting.start), policy_version=1)
    old = [logprob_of_next_token() for _ in range(2)]
    publishing.publish(load(setting.policy), policy_version=2)
    warm = logprob_of_next_token()
    publishing.client.reset_prefix_cache()
    cold = logprob_of_next_token()
    assert old[0] == old[1] != warm
    assert warm[0] == cold[0]
    assert warm[1] == pytest.approx(cold[1], abs=BF16_NOISE)


@on_two_servers
def test_sixteen_clients_stream_without_an_error_through_fifty_publishes(
    setting: Setting, publishing: Publishing
) -> None:
    models = [load(setting.start), load(setting.policy)]
    stop = threading.Event()

    def generate(seed: int) -> list[int]:
        counts = []
        while not stop.is_set():
            body = {"model": publishing.client.model, "prompt": [seed, 7, 11], "max_tokens": 24, "ignore_eos": True}
            with requests.post(
                f"{setting.url}/v1/completions", json={**body, "stream": True}, stream=True, timeout=120
            ) as answer:
                assert answer.status_code == 200
                chunks = [line for line in answer.iter_lines() if line.startswith(b"data: {")]
                assert not any(b'"abort"' in line or b'"error"' in line for line in chunks)
                counts.append(len(chunks))
        return counts

    with ThreadPoolExecutor(max_workers=16) as executor:
        futures = [executor.submit(generate, seed) for seed in range(16)]
        try:
            for version in range(50):
                publishing.publish(models[version % 2], version)
        finally:
            stop.set()
        counts = [count for future in futures for count in future.result()]

    assert len(counts) >= 16
    assert min(counts) >= 1
    assert not publishing.client.is_paused()
    assert publishing.client.get_weight_version() == "49"


@on_two_servers
def test_server_remembers_which_policy_sampled_a_rollout(setting: Setting, publishing: Publishing) -> None:
    publishing.publish(load(setting.policy), policy_version=40)
    prompt = [1, 2, 3]
    body = {"prompt": {"prompt_token_ids": prompt}, "max_tokens": 5, "temperature": 1.0, "ignore_eos": True}
    answer = requests.post(f"{setting.url}/generate", json=body, timeout=60).json()
    completion = [int(token) for entry in answer["logprobs"][0] for token in entry[0]]
    keys = [rollout_key(prompt + completion, length) for length in (len(prompt), len(prompt) + 1)]
    assert publishing.client.find_calls(keys) == [ServedCall(40), None]
    nucleus = {**body, "max_tokens": 3, "top_p": 0.5, "min_p": 0.1}
    answer = requests.post(f"{setting.url}/generate", json=nucleus, timeout=60).json()
    completion = [int(token) for entry in answer["logprobs"][0] for token in entry[0]]
    (call,) = publishing.client.find_calls([rollout_key(prompt + completion, len(prompt))])
    assert call == ServedCall(40, ("min_p", "top_p"))


@on_two_servers
def test_a_policy_that_did_not_arrive_leaves_the_server_paused(setting: Setting, publishing: Publishing) -> None:
    """What is staged is the start checkpoint while the trainer holds another: the probe must notice."""
    stage = publishing.servers.stage
    stale = load(setting.start)

    def stage_stale(source: object, specs: object) -> None:
        del source
        stage(NamedTensors(stale.named_parameters(), publishing.facts.dtype), specs)

    publishing.servers.stage = stage_stale
    with pytest.raises(WeightSyncError, match=r"state `verified`.*is accepted \(4\.0 x") as caught:
        publishing.publish(load(setting.policy), policy_version=50)
    assert "The server is paused" in str(caught.value)
    assert publishing.client.is_paused()

    # The next good publish heals it.
    Publishing(setting.url, setting.policy).publish(load(setting.policy), policy_version=51)
    assert not publishing.client.is_paused()


@on_two_servers
def test_incomplete_policy_is_refused_and_never_served(setting: Setting, publishing: Publishing) -> None:
    publishing.publish(load(setting.policy), policy_version=70)
    good = publishing.logprobs()
    sync = publishing.client.weight_sync(policy_version=71)
    with pytest.raises(WeightSyncError, match=r"state `finishing`.*were not sent.*layers\.1\.mlp"), sync as session:
        tensors = load(setting.policy).named_parameters()
        session.push((name, tensor) for name, tensor in tensors if "layers.1.mlp" not in name)
    assert publishing.client.is_paused()

    Publishing(setting.url, setting.policy).publish(load(setting.policy), policy_version=72)
    assert max_abs_diff(good, publishing.logprobs()) == 0.0


@on_two_servers
def test_the_client_publishes_on_its_own(setting: Setting, publishing: Publishing) -> None:
    """The example of the class docstring."""
    client, model = publishing.client, load(setting.policy)
    with client.weight_sync(policy_version=75) as sync:
        assert client.is_paused()
        sync.push(model)
    assert sync.report is not None
    assert sync.report.probe.mean_abs_diff < 0.1
    assert (client.get_weight_version(), client.is_paused()) == ("75", False)


@on_two_servers
def test_shared_memory_has_no_name_while_the_transport_is_open(setting: Setting, publishing: Publishing) -> None:
    names = segments()
    publishing.publish(load(setting.policy), policy_version=80)
    assert not left_since(names)
    assert isinstance(publishing.link.transport, SharedMemoryTransport) == (setting.backend == "trl_atropos_shm")


@on_two_servers
def test_another_model_is_refused_before_anything_is_sent(setting: Setting, publishing: Publishing) -> None:
    config = load(setting.policy).config
    config.num_hidden_layers = 3
    with pytest.raises(PreflightError, match=r"num_hidden_layers=2.*num_hidden_layers=3"):
        inspect_server(publishing.client, config, max_length=256)


def test_two_servers_hold_the_same_policy_after_one_publish(tmp_path: Path) -> None:
    """One over shared memory, one over gloo; a third party sees one publish."""
    start = save_tiny_model(tmp_path / "A", tied=True, seed=1)
    policy = save_tiny_model(tmp_path / "B", tied=True, seed=2)
    servers = [
        VLLMServer(start, "--enforce_eager", "True", log_path=tmp_path / f"{backend}.log", backend=backend)
        for backend in ("trl_atropos_shm", "trl_atropos_gloo")
    ]
    try:
        for server in servers:
            server.start()
        both = [Publishing(server.url, policy) for server in servers]
        servers_of_both = ServerGroup([publishing.link for publishing in both], both[0].options)
        publisher = both[0].publisher_of(servers_of_both)
        publisher.publish(load(policy), 5)
        answers = [publishing.logprobs(SEQUENCES) for publishing in both]
        assert answers[0] == answers[1]
        assert [publishing.client.get_weight_version() for publishing in both] == ["5", "5"]
        publisher.close()
    finally:
        for server in servers:
            server.stop()
