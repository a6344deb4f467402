"""LoRA adapters on a real server: what it answers is the newest policy, under any load, and nothing is left behind.

The server runs LoRA on the modules that the adapter changes and not on the output head: with it, vLLM 0.32 on a CPU ends
at the first request for prompt logprobs.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from publishing import SEQUENCES, Publishing, load, max_abs_diff
from servers import save_tiny_model, serve

from trl_atropos.errors import PreflightError, WeightSyncError
from trl_atropos.types import ServedCall
from trl_atropos.weight_sync.adapter_publisher import AdapterPublisher
from trl_atropos.weight_sync.client import AtroposVLLMClient
from trl_atropos.weight_sync.transports.adapter_files import AdapterTransfer, check_server, routed_adapter
from trl_atropos.weight_sync.weights.adapter import check_adapter, take_adapter
from trl_atropos.wire.rollout_key import rollout_key


RANK = 4
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_ARGS = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-target-modules", *MODULES]
LORA_ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT = SEQUENCES[0]
MAX_MODEL_LEN = 512
NUM_LONG = MAX_MODEL_LEN - len(PROMPT)
LONG_PROMPT = [(7 * i) % 250 for i in range(200)]

NOISE_MARGIN = 4
"""The largest accepted difference to the server, as a multiple of what rounding this policy to bf16 changes here."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("adapter") / "model", tied=True, seed=1)


@pytest.fixture(scope="module")
def url(model_dir: Path) -> Iterator[str]:
    # The last of two lengths counts.
    args = ["--enforce-eager", *LORA_ARGS, "--chat-template", CHAT_TEMPLATE, "--max-model-len", str(MAX_MODEL_LEN)]
    log_path = model_dir.parent / "server.log"
    with serve(model_dir, *args, log_path=log_path, environment=LORA_ENVIRONMENT) as server_url:
        yield server_url


class Trainer:
    """What a trainer does with adapters, with policies made from seeds."""

    def __init__(self, url: str, model_dir: Path):
        self.client = AtroposVLLMClient(url, request_timeout=120.0)
        self.model_dir = model_dir
        self.transfer = AdapterTransfer([self.client], model_dir.parent / "adapters")

    def policy(self, seed: int) -> PeftModel:
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(load(self.model_dir), config)

    def publish(self, model: PeftModel, version: int) -> str:
        saved = self.transfer.save(take_adapter(model, torch.bfloat16), version)
        self.transfer.load(self.client, saved)
        self.transfer.discard_old(self.client)
        return saved.name


@pytest.fixture
def trainer(url: str, model_dir: Path) -> Trainer:
    return Trainer(url, model_dir)


@torch.no_grad()
def logprobs(model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([sequence])).logits[0].float().log_softmax(-1)


def scores(model: torch.nn.Module) -> list[list[float]]:
    return [
        logprobs(model, sequence)[:-1].gather(1, torch.tensor(sequence)[1:, None])[:, 0].tolist()
        for sequence in SEQUENCES
    ]


def behind_the_best(model: torch.nn.Module, ids: list[int]) -> float:
    """How far a greedy completion of `PROMPT` is from the policy's own choice, at its worst token, in nats."""
    after = logprobs(model, PROMPT + ids)[len(PROMPT) - 1 : -1]
    return float((after.max(-1).values - after.gather(1, torch.tensor(ids)[:, None])[:, 0]).max())


def rounding_noise(trainer: Trainer, seed: int) -> float:
    return max_abs_diff(scores(trainer.policy(seed)), scores(trainer.policy(seed).to(torch.bfloat16)))


def complete(url: str, model: str | None, **fields: Any) -> requests.Response:
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
    named = {} if model is None else {"model": model}
    return requests.post(f"{url}/v1/completions", json={**body, **named, **fields}, timeout=120)


def completed_ids(answer: requests.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def generate(url: str, prompt: list[int], num_tokens: int) -> list[dict[str, float]]:
    body = {"prompt": {"prompt_token_ids": prompt}, "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
    answer = requests.post(f"{url}/generate", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return [entry[0] for entry in answer.json()["logprobs"][0]]


def stream(url: str, model: str, num_tokens: int) -> list[int]:
    """The token ids of a streamed completion, every event of which names the model that was asked for."""
    answer = complete(url, model, max_tokens=num_tokens, stream=True)
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["model"] for chunk in chunks} == {model}
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"] or []]


def test_this_server_and_this_adapter_fit(trainer: Trainer) -> None:
    check_server(trainer.client, check_adapter(trainer.policy(1)))


def test_an_adapter_that_needs_more_than_the_server_offers_is_refused(trainer: Trainer) -> None:
    needs = check_adapter(trainer.policy(1))
    with pytest.raises(PreflightError, match="ranks up to 8, the adapter has 9"):
        check_server(trainer.client, replace(needs, rank=9))
    with pytest.raises(PreflightError, match="runs up to 2 adapters"):
        check_server(trainer.client, needs, keep=3)


def test_answers_are_those_of_the_policy_and_not_of_the_base(trainer: Trainer) -> None:
    trainer.client.route_adapter(None, 0)
    base = trainer.client.get_prompt_logprobs(SEQUENCES)
    trainer.publish(trainer.policy(1), 1)
    served = trainer.client.get_prompt_logprobs(SEQUENCES)
    noise = NOISE_MARGIN * rounding_noise(trainer, 1)
    assert max_abs_diff(served, scores(trainer.policy(1))) < noise
    assert max_abs_diff(served, base) > 10 * noise
    assert trainer.client.get_weight_version() == "1"
    # The model itself is still there, and comes back.
    trainer.client.route_adapter(None, 1)
    assert trainer.client.get_prompt_logprobs(SEQUENCES) == base


def test_every_route_that_generates_follows_the_policy_greedily(trainer: Trainer, url: str) -> None:
    name = trainer.publish(trainer.policy(2), 2)
    served_model = trainer.client.model
    ids = completed_ids(complete(url, served_model))
    assert behind_the_best(trainer.policy(2), ids) < NOISE_MARGIN * rounding_noise(trainer, 2)
    # By every way to ask, but not if the model itself answers.
    assert completed_ids(complete(url, None)) == completed_ids(complete(url, name)) == ids
    assert stream(url, served_model, 12) == ids
    assert [int(next(iter(entry))) for entry in generate(url, PROMPT, 12)] == ids
    inner = {"token_ids": PROMPT, "sampling_params": {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}}
    answer = requests.post(f"{url}/inference/v1/generate", json=inner, timeout=120).json()
    assert answer["choices"][0]["token_ids"] == ids
    trainer.client.route_adapter(None, 2)
    assert completed_ids(complete(url, served_model)) != ids


def test_chat_follows_the_policy(trainer: Trainer, url: str) -> None:
    text = "what is it?"
    messages = {"messages": [{"role": "user", "content": text}], "return_token_ids": True, "max_tokens": 8}
    trainer.publish(trainer.policy(3), 3)
    sampling = {"temperature": 0.0, "ignore_eos": True, "model": trainer.client.model}
    answer = requests.post(f"{url}/v1/chat/completions", json={**messages, **sampling}, timeout=120).json()
    same_prompt = complete(url, trainer.client.model, prompt=answer["prompt_token_ids"], max_tokens=8)
    assert answer["choices"][0]["token_ids"] == completed_ids(same_prompt)
    assert answer["model"] == same_prompt.json()["model"] == trainer.client.model
    trainer.client.route_adapter(None, 3)
    of_base = requests.post(f"{url}/v1/chat/completions", json={**messages, **sampling}, timeout=120).json()
    assert answer["choices"][0]["token_ids"] != of_base["choices"][0]["token_ids"]


def test_requests_end_with_the_adapter_and_the_version_that_they_began_with(trainer: Trainer, url: str) -> None:
    seeds = range(10, 14)
    policies = {seed: trainer.policy(seed) for seed in seeds}
    names: list[str] = []
    with ThreadPoolExecutor(max_workers=len(seeds)) as executor:
        pending = []
        try:
            for seed in seeds:
                names.append(trainer.publish(policies[seed], seed))
                # The first one has begun when generation is frozen, the others come later. None ends before the last policy
                # is published.
                pending.append(begin_and_freeze(trainer, executor, url, names[-1]))
            in_flight = routed_adapter(trainer.client).num_in_flight
            still_loaded = trainer.client.list_models()[1:]
        finally:
            trainer.client.resume()
        answers = [[int(next(iter(entry))) for entry in request.result()] for request in pending]
    # More than the two that the server holds and that a trainer keeps: their files are read again.
    assert in_flight == dict.fromkeys(names, 1)
    assert still_loaded == names
    for seed, ids in zip(seeds, answers, strict=True):
        assert behind_the_best(policies[seed], ids) < NOISE_MARGIN * rounding_noise(trainer, seed)
    calls = trainer.client.find_calls([rollout_key([*PROMPT, *ids], len(PROMPT)) for ids in answers])
    assert calls == [ServedCall(seed) for seed in seeds]


def test_ten_publishes_under_load_fail_no_request_and_leave_two_adapters(trainer: Trainer, url: str) -> None:
    trainer.publish(trainer.policy(20), 20)
    policies = [trainer.policy(seed) for seed in range(21, 31)]
    is_over = threading.Event()

    def run_client() -> int:
        lengths = itertools.cycle((16, 48, 120))
        num_done = 0
        while not is_over.is_set():
            num_tokens = next(lengths)
            assert len(stream(url, trainer.client.model, num_tokens)) == num_tokens
            num_done += 1
        return num_done

    with ThreadPoolExecutor(max_workers=4) as executor:
        clients = [executor.submit(run_client) for _ in range(4)]
        try:
            names = [trainer.publish(policy, version) for version, policy in enumerate(policies, start=21)]
        finally:
            is_over.set()
        assert sum(client.result() for client in clients) >= 4
    # In use are the last two, and once for each list of `discard_old` what was before.
    for _ in range(2):
        trainer.transfer.discard_old(trainer.client)
    assert trainer.client.list_models() == [trainer.client.model, *names[-2:]]
    assert sorted(path.name for path in trainer.transfer.directory.iterdir()) == sorted(names[-2:])
    assert routed_adapter(trainer.client).num_in_flight == {}


def test_a_cached_prefix_of_the_previous_policy_is_not_used(trainer: Trainer, url: str) -> None:
    trainer.publish(trainer.policy(40), 40)
    of_the_old = generate(url, LONG_PROMPT, 4)
    trainer.publish(trainer.policy(41), 41)
    warm = generate(url, LONG_PROMPT, 4)
    assert trainer.client.reset_prefix_cache()
    assert warm == generate(url, LONG_PROMPT, 4)
    assert warm != of_the_old


def test_a_trainer_that_was_restarted_goes_on_and_clears_up(trainer: Trainer, url: str, model_dir: Path) -> None:
    left_behind = [trainer.publish(trainer.policy(50 + i), 50 + i) for i in range(2)]
    (trainer.transfer.directory / f".{left_behind[0]}-unfinished").mkdir()
    restarted = Trainer(url, model_dir)
    # As after a resume: the same version once more.
    names = [restarted.publish(restarted.policy(seed), 51) for seed in (51, 52)]
    restarted.transfer.discard_old(restarted.client)
    assert restarted.client.list_models() == [restarted.client.model, *names]
    assert sorted(path.name for path in restarted.transfer.directory.iterdir()) == sorted(names)
    served = restarted.client.get_prompt_logprobs(SEQUENCES)
    assert max_abs_diff(served, scores(restarted.policy(52))) < NOISE_MARGIN * rounding_noise(restarted, 52)


def test_an_adapter_that_the_server_cannot_see_leaves_the_previous_policy(trainer: Trainer) -> None:
    name = trainer.publish(trainer.policy(60), 60)
    saved = trainer.transfer.save(take_adapter(trainer.policy(61), torch.bfloat16), 61)
    elsewhere = saved.path.rename(saved.path.parent / "elsewhere")
    with pytest.raises(WeightSyncError, match="--weight_sync_adapter_dir"):
        trainer.transfer.load(trainer.client, saved)
    assert (routed_adapter(trainer.client).name, trainer.client.get_weight_version()) == (name, "60")
    # The same call again, once it can.
    elsewhere.rename(saved.path)
    for _ in range(2):
        trainer.transfer.load(trainer.client, saved)
    assert (routed_adapter(trainer.client).name, trainer.client.get_weight_version()) == (saved.name, "61")


def begin_and_freeze(trainer: Trainer, executor: ThreadPoolExecutor, url: str, name: str) -> Future[Any]:
    """Begin a request for an adapter, and freeze generation before it ends."""
    for _ in range(20):
        request = executor.submit(generate, url, PROMPT, NUM_LONG)
        trainer.client.pause()
        wait_until(lambda request=request: request.done() or name in routed_adapter(trainer.client).num_in_flight)
        if not request.done():
            return request
        # The server was faster than this process, which another one has held up.
        trainer.client.resume()
    raise AssertionError("every request ended before generation was frozen")


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_merged_weights_can_follow_on_a_server_with_lora_and_adapters_cannot_follow_those(
    trainer: Trainer, url: str, model_dir: Path
) -> None:
    """Last of this server: afterwards it no longer holds the checkpoint that adapters belong on."""
    model = trainer.policy(seed=30)
    trainer.publish(model, version=30)
    publishing = Publishing(url, model_dir)
    adapters = AdapterPublisher([publishing.link], model_dir.parent / "adapters")
    adapters.check(model)
    adapters.withdraw()
    report = publishing.publish(model, policy_version=31)
    assert report.mode == "full"
    assert max_abs_diff(publishing.logprobs(), scores(model)) < NOISE_MARGIN * rounding_noise(trainer, 30)
    with pytest.raises(PreflightError, match=r"holds weights that were published as version 31"):
        adapters.check(model)
    publishing.publisher.close()
