"""Evaluation during training: prompts of a file through the vLLM server, and what the environments' own `evaluate` logged."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AtroposProtocolError, PreflightError, VLLMServerError
from ..progress import Reminder
from ..weight_sync.http import MAX_CONCURRENT_REQUESTS, Answer
from ..weight_sync.inference_server import InferenceServer
from ..wire.journal import parse_json


logger = logging.getLogger(__name__)

FIELDS = {"prompt", "answer", "env"}


@dataclass(frozen=True)
class EvalPrompt:
    """One line of `eval_path`.

    `where` names file and line in messages. `prompt` is text, or the messages of a chat. `answer` is what the
    completion should be, and `env` the name of the environment, or of the task, that the prompt belongs to.
    """

    where: str
    prompt: str | list[dict[str, Any]]
    answer: str | None = None
    env: str | None = None


@dataclass(frozen=True)
class Completion:
    """What the policy answered: the text without special tokens and without white space around it, and its number of
    tokens.
    """

    text: str
    num_tokens: int


def load_prompts(path: str | os.PathLike[str]) -> list[EvalPrompt]:
    """Read the prompts of `eval_path`, at least one.

    The file holds JSON lines with `prompt` (text, or messages with `role` and `content`) and optionally `answer`
    (text) and `env` (text). Empty lines are skipped. Other fields are not read, and named in the log.

    Raises:
        [`PreflightError`]: there is no such file, a line is no such object, or there is no prompt.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as exc:
        raise PreflightError(
            f"The prompts of eval_path cannot be read: {exc}.",
            "They are evaluated during training.",
            "Correct --eval_path.",
        ) from exc
    unknown: Counter[str] = Counter()
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            values = parse_json(line)
            prompts.append(_parse_prompt(f"{path}, line {number}", values))
            unknown.update(values.keys() - FIELDS)
    if not prompts:
        raise PreflightError(
            f"{path} holds no prompt.",
            "An evaluation of nothing says nothing.",
            'Write one JSON object a line, such as {"prompt": "1 + 1 =", "answer": "2"}, or correct --eval_path.',
        )
    if unknown:
        counts = ", ".join(f"{name} ({count} times)" for name, count in sorted(unknown.items()))
        logger.warning(f"{path} has fields that are not read: {counts}.")
    return prompts


def evaluate_prompts(
    client: InferenceServer, prompts: Sequence[EvalPrompt], *, max_tokens: int = 256
) -> dict[str, float]:
    """Let the served policy complete all prompts greedily, and compare with the answers.

    The server is awake and not paused. `max_tokens` is the longest completion, in tokens. The results are named as in
    `report/metric_help.py` after `eval_`, and after `eval_<env>/` for the prompts of each `env`; the matches are left
    out where no prompt has an answer.

    Raises:
        [`AtroposProtocolError`]: the server refuses a prompt.
        [`WeightSyncError`]: it does not answer, or not as its kind does.
    """
    completions = _complete_all(client, prompts, max_tokens)
    pairs = list(zip(prompts, completions, strict=True))
    results = {f"eval_{name}": value for name, value in _compare(pairs).items()}
    for env in dict.fromkeys(prompt.env for prompt in prompts if prompt.env is not None):
        of_env = [(prompt, completion) for prompt, completion in pairs if prompt.env == env]
        results.update({f"eval_{env}/{name}": value for name, value in _compare(of_env).items()})
    return results


class EnvironmentEvals:
    """Finds what the environments' own `evaluate` logs: atroposlib's `evaluate_log` writes it to `metrics.json` in the
    `data_dir_to_save_evals` of the environment, over what it wrote before. What is there at first is left by an
    earlier run and not taken.

    `directory` is that of one environment, or one with a subdirectory for each; it need not exist yet.

    Raises:
        [`PreflightError`]: the directory is a file.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        if self.directory.is_file():
            raise PreflightError(
                f"eval_log_dir is {directory}, which is a file.",
                "Environments write their evaluations into a directory.",
                "Set --eval_log_dir to what the environment has as --env.data_dir_to_save_evals, or to its parent.",
            )
        self._seen = {path: _stamp(path) for path in self._files()}

    def new_metrics(self) -> dict[str, float]:
        """What was logged since the last call, as `eval_<name>/<metric>`; values that are not numbers are left out.

        `<name>` is the subdirectory; in the directory itself, it is the environment's name as `evaluate_log` writes it. An
        `eval/` before a metric is dropped. A file that cannot be read, or is being written, is read at the next call.
        """
        metrics: dict[str, float] = {}
        for path in self._files():
            try:
                # In this order: what is written in between is found at the next call.
                stamp, content = _stamp(path), path.read_bytes()
            except OSError as exc:
                logger.warning(f"{path} cannot be read ({exc}); looking again later.")
                continue
            if self._seen.get(path) == stamp:
                continue
            found = _task_results(parse_json(content))
            if found is None:
                logger.warning(
                    f"{path} is not, or not yet, what `evaluate_log` of atroposlib writes; looking again later."
                )
                continue
            self._seen[path] = stamp
            task, values = found
            name = "/".join(path.parent.relative_to(self.directory).parts) or task
            metrics.update({f"eval_{name}/{key.removeprefix('eval/')}": value for key, value in values.items()})
        return metrics

    def _files(self) -> list[Path]:
        return sorted(self.directory.rglob("metrics.json"))


class Evaluator:
    """What `evaluate` of a trainer does on rank 0, with three options of `AtroposConfig`.

    Raises:
        [`PreflightError`]: prompts or directory are refused, as [`load_prompts`] and [`EnvironmentEvals`] say.
    """

    def __init__(self, eval_path: str | None, eval_log_dir: str | None, eval_max_tokens: int):
        self.prompts = [] if eval_path is None else load_prompts(eval_path)
        self.environment_evals = None if eval_log_dir is None else EnvironmentEvals(eval_log_dir)
        self.max_tokens = eval_max_tokens

    def __call__(self, client: InferenceServer | None) -> dict[str, float]:
        """Complete the prompts, if there is a server, and look for what environments logged."""
        metrics: dict[str, float] = {}
        if self.prompts and client is not None:
            metrics |= evaluate_prompts(client, self.prompts, max_tokens=self.max_tokens)
        if self.environment_evals is not None:
            metrics |= self.environment_evals.new_metrics()
        return metrics


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _task_results(values: object) -> tuple[str, dict[str, float]] | None:
    """Task and metrics of a `metrics.json`: `{"results": {"atropos|<name>_eval|0": {...}, "all": {...}}}`."""
    results = values.get("results") if isinstance(values, dict) else None
    if not isinstance(results, dict) or not isinstance(results.get("all"), dict):
        return None
    task = next((key for key in results if key != "all"), "all")
    numbers = {key: float(value) for key, value in results["all"].items() if isinstance(value, int | float)}
    return task.removeprefix("atropos|").removesuffix("|0").removesuffix("_eval"), numbers


def _parse_prompt(where: str, values: Any) -> EvalPrompt:
    fix = 'Write one JSON object a line, such as {"prompt": "1 + 1 =", "answer": "2"}.'
    if not isinstance(values, dict):
        raise PreflightError(f"{where} is not a JSON object.", "Each line of eval_path is one prompt.", fix)
    prompt = values.get("prompt")
    is_chat = isinstance(prompt, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in prompt
    )
    if not prompt or not (isinstance(prompt, str) or is_chat):
        raise PreflightError(
            f"{where}: `prompt` is {_quoted(prompt)}.",
            "A prompt is text, or a list of messages with `role` and `content`.",
            fix,
        )
    for name in ("answer", "env"):
        value = values.get(name)
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise PreflightError(
                f"{where}: `{name}` is {_quoted(value)}.",
                "It is text that is not empty, or left out.",
                "Write numbers in quotes.",
            )
    return EvalPrompt(where, prompt, values.get("answer"), values.get("env"))


def _quoted(value: object) -> str:
    return json.dumps(value)[:100]


def _complete_all(client: InferenceServer, prompts: Sequence[EvalPrompt], max_tokens: int) -> list[Completion]:
    reminder = Reminder()
    executor = ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS, thread_name_prefix="evaluation")
    try:
        futures = [executor.submit(_complete, client, prompt, max_tokens) for prompt in prompts]
        for num_done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if reminder.is_due():
                logger.info(f"Evaluating: {num_done} of {len(prompts)} prompts")
        return [future.result() for future in futures]
    finally:
        # After an error: prompts that were not sent yet are not.
        executor.shutdown(cancel_futures=True)


def _complete(client: InferenceServer, prompt: EvalPrompt, max_tokens: int) -> Completion:
    body: dict[str, Any] = {"model": client.model, "max_tokens": max_tokens, "temperature": 0.0}
    if isinstance(prompt.prompt, str):
        route, body["prompt"] = "/v1/completions", prompt.prompt
    else:
        route, body["messages"] = "/v1/chat/completions", prompt.prompt
    try:
        answer = Answer(client.session.post(f"{client.base_url}{route}", json=body), kind=client.kind)
    except VLLMServerError as exc:
        if exc.status_code != 400:
            raise
        raise AtroposProtocolError(
            f"The {client.kind} server refused the prompt of {prompt.where}: {exc.detail}.",
            f"Mostly a prompt does not fit into the server's --max-model-len together with eval_max_tokens ({max_tokens}).",
            "Shorten or remove the prompt, or lower --eval_max_tokens.",
        ) from exc
    try:
        choice = answer["choices"][0]
        # A chat model that only called a tool has no content.
        text = choice["text"] if isinstance(prompt.prompt, str) else choice["message"]["content"] or ""
        return Completion(text.strip(), int(answer["usage"]["completion_tokens"]))
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise answer.unexpected("a completion with `usage`", dict(answer)) from exc


def _compare(pairs: Sequence[tuple[EvalPrompt, Completion]]) -> dict[str, float]:
    lengths = [completion.num_tokens for _, completion in pairs]
    answered = [(completion.text, prompt.answer.strip()) for prompt, completion in pairs if prompt.answer is not None]
    matches = {
        "exact_match": [text == answer for text, answer in answered],
        "contains_answer": [answer in text for text, answer in answered],
    }
    return {
        **{name: sum(found) / len(found) for name, found in matches.items() if found},
        "mean_length": sum(lengths) / len(lengths),
        "num_prompts": float(len(lengths)),
    }
