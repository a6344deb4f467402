"""Atropos' `/generate` on a real server, with authentication and without dev mode."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from servers import VOCAB_SIZE, save_tiny_model, serve
from transformers import AutoConfig

from trl_atropos.errors import PreflightError, WeightSyncError
from trl_atropos.gateway.gateway import Gateway
from trl_atropos.trainer.preflight import inspect_server
from trl_atropos.weight_sync.client import AtroposVLLMClient


KEY = "secret"
PROMPT = [7, 11, 13, 17]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("generate")
    model = save_tiny_model(directory / "model", tied=True, seed=1)
    with serve(model, "--enforce_eager", "True", "--api-key", KEY, log_path=directory / "server.log") as server_url:
        yield server_url


def generate(url: str, key: str = KEY, **fields: object) -> requests.Response:
    body = {"prompt": {"prompt_token_ids": PROMPT}, **fields}
    return requests.post(f"{url}/generate", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def tokens(answer: requests.Response) -> list[list[int]]:
    return [[int(token) for entry in choice for token in entry[0]] for choice in answer.json()["logprobs"]]


def complete(url: str, **fields: object) -> list[int]:
    body = {"prompt": PROMPT, "model": None, "return_token_ids": True, **fields}
    headers = {"Authorization": f"Bearer {KEY}"}
    body["model"] = requests.get(f"{url}/v1/models", headers=headers, timeout=60).json()["data"][0]["id"]
    answer = requests.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
    return answer.json()["choices"][0]["token_ids"]


def test_greedy_tokens_equal_those_of_the_openai_route(url: str) -> None:
    answer = generate(url, max_tokens=12, temperature=0.0, ignore_eos=True)
    assert tokens(answer) == [complete(url, max_tokens=12, temperature=0.0, ignore_eos=True)]
    assert answer.json()["finish_reasons"] == ["length"]
    assert all(value <= 0 for choice in answer.json()["logprobs"] for entry in choice for value in entry[0].values())


def test_n_completions_come_whole_and_seeded_ones_repeat(url: str) -> None:
    first = generate(url, n=4, max_tokens=9, seed=3, ignore_eos=True)
    assert [len(choice) for choice in tokens(first)] == [9, 9, 9, 9]
    assert tokens(first) == tokens(generate(url, n=4, max_tokens=9, seed=3, ignore_eos=True))


def test_sampling_parameters_act(url: str) -> None:
    greedy = tokens(generate(url, max_tokens=8, temperature=0.0, ignore_eos=True))[0]
    for neutral_to_greedy in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert tokens(generate(url, max_tokens=8, ignore_eos=True, **neutral_to_greedy))[0] == greedy
    stopped = generate(url, max_tokens=8, temperature=0.0, ignore_eos=True, stop_token_ids=[greedy[2]])
    assert tokens(stopped)[0] == greedy[: greedy.index(greedy[2]) + 1]
    assert stopped.json()["finish_reasons"] == ["stop"]
    penalised = tokens(generate(url, max_tokens=8, temperature=0.0, ignore_eos=True, repetition_penalty=50.0))[0]
    assert len(set(penalised)) == 8


def test_prompt_logprobs_are_mapped(url: str) -> None:
    answer = generate(url, prompt_logprobs=2, max_tokens=1, temperature=0.0).json()["prompt_logprobs"]
    assert answer[0] is None
    assert [str(token) in position for token, position in zip(PROMPT[1:], answer[1:], strict=True)] == [True] * 3
    assert all(len(position) >= 2 for position in answer[1:])


def test_text_prompt_is_tokenised_by_the_server(url: str) -> None:
    body = {"prompt": "hello", "max_tokens": 2, "prompt_logprobs": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = requests.post(f"{url}/generate", json=body, headers=headers, timeout=60)
    assert len(answer.json()["prompt_logprobs"]) == len("hello")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature must be non-negative"),
        ({"prompt": {"prompt_token_ids": [VOCAB_SIZE + 1000]}}, "out of vocabulary"),
        ({"prompt": {"prompt_token_ids": [1] * 300}}, "maximum model length"),
        ({"prompt": None}, "`prompt` must be"),
        ({"top-k": 3}, "Not a sampling parameter of this vLLM: top-k"),
        ({"stream": True}, "`stream` is not supported"),
    ],
)
def test_bad_requests_get_400_with_the_servers_words(url: str, fields: dict, words: str) -> None:
    answer = generate(url, **fields)
    assert answer.status_code == 400
    assert words in answer.text


def test_api_key_guards_our_routes(url: str) -> None:
    assert generate(url, key="wrong", max_tokens=1).status_code == 401
    unauthorised = requests.post(f"{url}/atropos/policy_versions", json={"rollout_keys": []}, timeout=60)
    assert unauthorised.status_code == 401
    assert AtroposVLLMClient(url, api_key=KEY).find_calls(["0" * 32]) == [None]
    with pytest.raises(WeightSyncError, match="--vllm_api_key"):
        AtroposVLLMClient(url, api_key="wrong")


def test_a_gateway_answers_an_environment_as_its_server_does(url: str) -> None:
    options = {"n": 2, "max_tokens": 9, "seed": 3, "ignore_eos": True}

    async def through_a_gateway() -> requests.Response:
        async with Gateway([url], api_key=KEY, environment_key="environment") as gateway:
            return await asyncio.to_thread(generate, gateway.address, "environment", **options)

    assert asyncio.run(through_a_gateway()).json() == generate(url, **options).json()


def test_other_routes_are_untouched(url: str) -> None:
    assert requests.get(f"{url}/health", timeout=60).status_code == 200
    assert requests.get(f"{url}/generate", timeout=60).status_code in (404, 405)


def test_server_without_dev_mode_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", tied=False, seed=1)
    with serve(model, "--enforce-eager", log_path=tmp_path / "server.log", has_dev_mode=False) as plain_url:
        client = AtroposVLLMClient(plain_url)
        with pytest.raises(PreflightError, match="VLLM_SERVER_DEV_MODE=1"):
            inspect_server(client, AutoConfig.from_pretrained(model), max_length=256)
