"""Prompts through a server, over real sockets; results of environments as atroposlib writes them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from atroposlib.envs.base import BaseEnv
from atroposlib.envs.eval import evaluate_log
from scripted_routes import Refusal, Request
from scripted_server import ScriptedServer

from trl_atropos.errors import (
    AtroposProtocolError,
    PreflightError,
    TrlAtroposError,
    VLLMServerError,
    VLLMServerUnreachable,
    WeightSyncError,
)
from trl_atropos.report.metric_help import EVALUATION_METRICS
from trl_atropos.trainer.evaluation import EnvironmentEvals, EvalPrompt, evaluate_prompts, load_prompts
from trl_atropos.weight_sync.client import AtroposVLLMClient


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="}]


class CompletingServer(ScriptedServer):
    """Completes a prompt with what `completions` has for its text, or for the last turn of its chat."""

    def __init__(self) -> None:
        super().__init__()
        self.completions: dict[str, str] = {}

    def post_v1_completions(self, request: Request) -> Any:
        return self.complete({"index": 0}, "text", request.body["prompt"])

    def post_v1_chat_completions(self, request: Request) -> Any:
        answer = self.complete({}, "content", request.body["messages"][-1]["content"])
        return {**answer, "choices": [{"index": 0, "message": {"role": "assistant", **answer["choices"][0]}}]}

    def complete(self, choice: dict[str, Any], key: str, prompt: str) -> Any:
        if len(prompt) > 100:
            raise Refusal(400, f"This model's maximum context length is 100, your prompt has {len(prompt)} tokens.")
        text = self.completions[prompt]
        # One token a character.
        return {"choices": [{**choice, key: text}], "usage": {"completion_tokens": len(text), "prompt_tokens": 1}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompletingServer]:
    # Connections that wait to be accepted: 5 in Python's servers, 2048 in vLLM's.
    monkeypatch.setattr("scripted_server._HTTPServer.request_queue_size", 128)
    with CompletingServer() as server:
        yield server


@pytest.fixture
def client(server: CompletingServer) -> AtroposVLLMClient:
    client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=20)
    server.requests.clear()
    return client


def prompt(text: str | list[dict[str, Any]], answer: str | None = None, env: str | None = None) -> EvalPrompt:
    return EvalPrompt("prompts.jsonl, line 1", text, answer, env)


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


class TestLoadPrompts:
    def test_text_and_chats_with_and_without_answer_and_environment(self, tmp_path):
        path = write_lines(
            tmp_path / "prompts.jsonl",
            {"prompt": "1 + 1 =", "answer": "2", "env": "math"},
            "",
            {"prompt": CHAT, "answer": None},
        )
        assert load_prompts(path) == [
            EvalPrompt(f"{path}, line 1", "1 + 1 =", "2", "math"),
            EvalPrompt(f"{path}, line 3", CHAT),
        ]

    def test_line_separators_inside_a_text_do_not_cut_the_line(self, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
        assert load_prompts(path)[0].prompt == "a\u2028b\x85c"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 2 is not a JSON object"),
            ('["a"]', "line 2 is not a JSON object"),
            ({"question": "a"}, "line 2: `prompt` is null"),
            ({"prompt": ""}, 'line 2: `prompt` is ""'),
            ({"prompt": []}, "line 2: `prompt` is []"),
            ({"prompt": [1, 2]}, "line 2: `prompt` is [1, 2]"),
            ({"prompt": [{"role": "user"}]}, 'line 2: `prompt` is [{"role": "user"}]'),
            ({"prompt": [{"role": 1, "content": "a"}]}, "line 2: `prompt` is [{"),
            ({"prompt": "a", "answer": 4}, "line 2: `answer` is 4"),
            # Every text contains it.
            ({"prompt": "a", "answer": " "}, 'line 2: `answer` is " "'),
            ({"prompt": "a", "env": 0}, "line 2: `env` is 0"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, message):
        path = write_lines(tmp_path / "prompts.jsonl", {"prompt": "good"}, line)
        with pytest.raises(PreflightError) as caught:
            load_prompts(path)
        assert message in caught.value.what
        assert str(path) in caught.value.what

    @pytest.mark.parametrize("content", [b"", b"\n \n"])
    def test_a_file_without_a_prompt(self, tmp_path, content):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(content)
        with pytest.raises(PreflightError, match="holds no prompt"):
            load_prompts(path)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(PreflightError, match=r"missing\.jsonl.*--eval_path"):
            load_prompts(tmp_path / "missing.jsonl")

    def test_fields_that_are_not_read_are_named_once(self, tmp_path, caplog):
        lines = [{"prompt": "a", "anwser": "b"}, {"prompt": "a", "anwser": "b", "id": 1}]
        load_prompts(write_lines(tmp_path / "prompts.jsonl", *lines))
        (record,) = caplog.records
        assert "fields that are not read: anwser (2 times), id (1 times)" in record.getMessage()


class TestEvaluatePrompts:
    def test_matches_and_lengths_overall_and_of_each_environment(self, client, server):
        server.completions = {"1 + 1 =": " 2\n", "2 + 2 =": "It is 4.", "Hello": "Hi there", "3 + 3 =": "7"}
        prompts = [
            prompt("1 + 1 =", "2", "math"),
            prompt(CHAT, " 4 ", "math"),
            prompt("Hello", None, "talk"),
            prompt("3 + 3 =", "6"),
        ]
        # Of three answers " 2\n" equals one and contains it, "It is 4." contains one. Lengths 3, 8, 8, 1.
        assert evaluate_prompts(client, prompts) == {
            "eval_exact_match": pytest.approx(1 / 3),
            "eval_contains_answer": pytest.approx(2 / 3),
            "eval_mean_length": 5,
            "eval_num_prompts": 4,
            "eval_math/exact_match": 0.5,
            "eval_math/contains_answer": 1,
            "eval_math/mean_length": 5.5,
            "eval_math/num_prompts": 2,
            "eval_talk/mean_length": 8,
            "eval_talk/num_prompts": 1,
        }

    def test_the_names_are_those_of_the_table(self, client, server):
        server.completions = {"a": "b"}
        found = evaluate_prompts(client, [prompt("a", "b")])
        assert {name.removeprefix("eval_") for name in found} == set(EVALUATION_METRICS)

    def test_completions_are_greedy_of_the_served_model_and_as_long_as_asked(self, client, server):
        server.completions = {"a": "b", "2 + 2 =": "4"}
        evaluate_prompts(client, [prompt("a"), prompt(CHAT)], max_tokens=7)
        common = {"model": "policy", "max_tokens": 7, "temperature": 0.0}
        assert server.last("POST /v1/completions").body == {**common, "prompt": "a"}
        assert server.last("POST /v1/chat/completions").body == {**common, "messages": CHAT}

    def test_many_prompts_at_once_are_each_compared_with_their_own_answer(self, client, server, caplog):
        numbers = [str(number) for number in range(200)]
        server.completions = {number: f"<{number}>" for number in numbers}
        prompts = [prompt(number, f"<{number}>") for number in numbers]
        with caplog.at_level(logging.WARNING):
            found = evaluate_prompts(client, prompts)
        assert (found["eval_exact_match"], found["eval_num_prompts"]) == (1, 200)
        assert caplog.records == []

    def test_a_chat_without_text_is_an_empty_completion(self, client, server):
        message = {"role": "assistant", "content": None, "tool_calls": []}
        server.script["POST /v1/chat/completions"] = {
            "choices": [{"message": message}],
            "usage": {"completion_tokens": 3},
        }
        found = evaluate_prompts(client, [prompt(CHAT, "4")])
        assert (found["eval_exact_match"], found["eval_mean_length"]) == (0, 3)

    def test_a_refused_prompt_is_named_by_its_line(self, client, server):
        long = EvalPrompt("prompts.jsonl, line 17", "x" * 101)
        with pytest.raises(AtroposProtocolError) as caught:
            evaluate_prompts(client, [long], max_tokens=9)
        assert "prompts.jsonl, line 17" in caught.value.what
        assert "your prompt has 101 tokens" in caught.value.what
        assert "eval_max_tokens (9)" in caught.value.why

    @pytest.mark.parametrize(
        ("action", "error"),
        [
            (500, VLLMServerError),
            ("close", VLLMServerUnreachable),
            ("missing", WeightSyncError),
            ({"choices": [{"text": "b"}]}, WeightSyncError),
            ({"choices": [], "usage": {"completion_tokens": 1}}, WeightSyncError),
            ({"choices": [{"text": 5}], "usage": {"completion_tokens": 1}}, WeightSyncError),
            ({"choices": [{"text": "b"}], "usage": {"completion_tokens": None}}, WeightSyncError),
        ],
    )
    def test_a_server_that_fails_ends_the_evaluation_with_its_error(self, client, server, action, error):
        server.script["POST /v1/completions"] = action
        with pytest.raises(error) as caught:
            evaluate_prompts(client, [prompt("a")])
        assert isinstance(caught.value, TrlAtroposError)

    def test_after_an_error_the_prompts_that_wait_are_not_sent(self, client, server):
        server.script["POST /v1/completions"] = 500
        with pytest.raises(VLLMServerError):
            evaluate_prompts(client, [prompt("a")] * 2000)
        assert len(server.requests) < 1000

    def test_progress_is_shown(self, client, server, caplog, monkeypatch):
        monkeypatch.setattr("trl_atropos.progress.REMINDER_INTERVAL_S", 0.0)
        server.completions = {"a": "b"}
        with caplog.at_level(logging.INFO, logger="trl_atropos.trainer.evaluation"):
            evaluate_prompts(client, [prompt("a")] * 3)
        assert "Evaluating: 3 of 3 prompts" in [record.getMessage() for record in caplog.records]


def log_evaluation(directory: Path, metrics: dict[str, Any], name: str | None = "gsm8k") -> None:
    """As an environment does: with the method of its base class."""
    environment = SimpleNamespace(config=SimpleNamespace(data_dir_to_save_evals=str(directory)), name=name)
    asyncio.run(BaseEnv.evaluate_log(environment, metrics, model_name="policy", verbose=False))


class TestEnvironmentEvals:
    def test_what_an_environment_logs_is_reported_once_under_its_name(self, tmp_path):
        evals = EnvironmentEvals(tmp_path)
        assert evals.new_metrics() == {}
        log_evaluation(tmp_path, {"eval/percent_correct": 0.25, "num_correct": 3})
        assert evals.new_metrics() == {"eval_gsm8k/percent_correct": 0.25, "eval_gsm8k/num_correct": 3}
        assert evals.new_metrics() == {}
        log_evaluation(tmp_path, {"eval/percent_correct": 0.5})
        assert evals.new_metrics() == {"eval_gsm8k/percent_correct": 0.5}

    def test_the_same_result_again_is_a_new_one(self, tmp_path):
        evals = EnvironmentEvals(tmp_path)
        for _ in range(2):
            log_evaluation(tmp_path, {"eval/percent_correct": 0.5})
            assert evals.new_metrics() == {"eval_gsm8k/percent_correct": 0.5}

    def test_what_was_there_before_is_of_an_earlier_run(self, tmp_path):
        log_evaluation(tmp_path, {"eval/percent_correct": 0.25})
        assert EnvironmentEvals(tmp_path).new_metrics() == {}

    def test_a_subdirectory_names_its_environment(self, tmp_path):
        evals = EnvironmentEvals(tmp_path / "evals")
        log_evaluation(tmp_path / "evals" / "easy", {"score": 1.0})
        log_evaluation(tmp_path / "evals" / "hard", {"score": 0.0})
        assert evals.new_metrics() == {"eval_easy/score": 1, "eval_hard/score": 0}

    def test_the_evaluators_of_atroposlib_without_an_environment_are_read_too(self, tmp_path):
        evals = EnvironmentEvals(tmp_path)
        evaluate_log({"pass": 0.5}, eval_dir=str(tmp_path), task_name="GSM8K@1", model_name="policy", verbose=False)
        assert evals.new_metrics() == {"eval_GSM8K@1/pass": 0.5}

    def test_values_that_are_not_numbers_are_left_out(self, tmp_path):
        evals = EnvironmentEvals(tmp_path)
        log_evaluation(tmp_path, {"score": 0.5, "note": "good", "by_level": {"1": 0.5}, "samples": [1], "none": None})
        assert evals.new_metrics() == {"eval_gsm8k/score": 0.5}

    @pytest.mark.parametrize("content", ["", '{"results": {"atro', "[]", '{"results": {"all": 3}}'])
    def test_a_file_that_is_being_written_is_read_later(self, tmp_path, caplog, content):
        evals = EnvironmentEvals(tmp_path)
        (tmp_path / "metrics.json").write_text(content)
        assert evals.new_metrics() == {}
        assert "looking again later" in caplog.text
        log_evaluation(tmp_path, {"score": 0.5})
        assert evals.new_metrics() == {"eval_gsm8k/score": 0.5}

    def test_a_file_that_cannot_be_read_does_not_end_the_run(self, tmp_path, caplog):
        evals = EnvironmentEvals(tmp_path)
        log_evaluation(tmp_path / "easy", {"score": 0.5})
        # Of no use to read: a directory.
        (tmp_path / "hard" / "metrics.json").mkdir(parents=True)
        assert evals.new_metrics() == {"eval_easy/score": 0.5}
        assert "cannot be read" in caplog.text

    def test_a_file_in_its_place_is_refused(self, tmp_path):
        path = write_lines(tmp_path / "metrics.json", {})
        with pytest.raises(PreflightError, match="which is a file"):
            EnvironmentEvals(path)
