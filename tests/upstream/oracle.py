"""A server that can answer: right and wrong answers at a given rate, as real tokens with the real model's logprobs.

    with Oracle(policy, answers, error_rate=0.5) as oracle:
        environment(base_url=f"{oracle.url}/v1")

An environment that a small model cannot solve drops all of its groups. Here the text comes from a script and the data set, and
what it is worth under the policy from the policy: `/generate` computes the logprobs of the tokens that it returns, as the
server would that had sampled them.

An answer follows from the prompt and from how often this prompt was asked before, not from what was asked in between: groups
that ask at once get what each would get alone, in every turn, as long as they ask other things.
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_atropos.policy.logprobs import token_logprobs_and_entropy


MAX_MODEL_LEN = 8192
MAX_TOKENS = 1024
"""Of an answer to a request that says nothing."""


class Policy:
    """The model that is to be trained, and its tokenizer. One forward pass at a time."""

    def __init__(self, directory: Path):
        self.name = str(directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.lock = threading.Lock()
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...], float], list[float]] = {}

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int], temperature: float) -> list[float]:
        """Logprobs of the tokens of an answer behind its prompt, in nats."""
        with self.lock:
            key = (tuple(prompt), tuple(answer), temperature)
            if key not in self._known:
                self._known[key] = self._compute(*key)
            return self._known[key]

    @torch.no_grad()
    def _compute(self, prompt: Sequence[int], answer: Sequence[int], temperature: float) -> list[float]:
        ids = torch.tensor([[*prompt, *answer]])
        logits = self.model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
        return token_logprobs_and_entropy(logits, torch.tensor(answer), temperature)[0].tolist()


@dataclass(frozen=True)
class Answers:
    """What is answered, right and wrong: to a prompt that is asked more than once each of the texts in turn.

    `$name` in a text stands for what `facts` say about the prompt: `facts` have a question, or another text that tells one
    task from the others, and the names with their values. Of several in a prompt the last one that has a name counts.
    """

    right: tuple[str, ...]
    wrong: tuple[str, ...]
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def text(self, number: int, is_right: bool, prompt: str) -> str:
        texts = self.right if is_right else self.wrong
        found = sorted(
            (prompt.rfind(question), len(question), question) for question in self.facts if question in prompt
        )
        known: dict[str, str] = {}
        for _, _, question in found:
            known |= self.facts[question]
        return Template(texts[number % len(texts)]).safe_substitute(known)


class Oracle:
    """See the module.

    Args:
        policy (`Policy`):
            Whose tokens and logprobs these are.
        answers (`Answers`):
            What is said.
        error_rate (`float`):
            Between 0 and 1: an answer is wrong with this probability. Of any answers to one prompt that follow each other
            this share is wrong, to less than one answer: of four at one half two.

    Attributes:
        num_answers (`int`): given so far.
        temperatures (`set[float]`): at which logprobs were asked for.
    """

    def __init__(self, policy: Policy, answers: Answers, error_rate: float = 0.5):
        self.policy = policy
        self.answers = answers
        self.error_rate = error_rate
        self.num_answers = 0
        self.temperatures: set[float] = set()
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        # What is being computed is waited for, not left behind.
        self._http.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Oracle:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def next_text(self, prompt: str) -> str:
        """The next answer to a prompt."""
        with self._lock:
            number = self._asked[prompt]
            self._asked[prompt] += 1
            self.num_answers += 1
        draw = random.Random(prompt)
        start, first_text = draw.random(), draw.getrandbits(16)
        # Steps of `error_rate` from a start that the prompt draws: an answer is wrong where one passes a whole number.
        num_wrong = math.floor(start + number * self.error_rate)
        is_right = math.floor(start + (number + 1) * self.error_rate) == num_wrong
        num_alike = number - num_wrong if is_right else num_wrong
        return self.answers.text(first_text + num_alike, is_right, prompt)

    def sample(self, prompt: str, max_tokens: int) -> tuple[list[int], str]:
        """The tokens of the next answer, its end among them, and why it ended."""
        tokenizer = self.policy.tokenizer
        ids = tokenizer.encode(self.next_text(prompt), add_special_tokens=False)
        whole = [*ids, tokenizer.eos_token_id]
        return whole[:max_tokens], "stop" if len(whole) <= max_tokens else "length"

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What vLLM answers."""
        tokenizer = self.policy.tokenizer
        num = body.get("n") or 1
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or MAX_TOKENS
        if path == "/generate":
            prompt_ids = body["prompt"]["prompt_token_ids"]
            sampled = [self.sample(tokenizer.decode(prompt_ids), max_tokens) for _ in range(num)]
            # Greedy sampling has no distribution; the trainer is told another temperature then.
            temperature = body.get("temperature") or 1.0
            self.temperatures.add(temperature)
            logprobs = [self.policy.logprobs(prompt_ids, ids, temperature) for ids, _ in sampled]
            return {
                "logprobs": [
                    [[{str(token): logprob}] for token, logprob in zip(ids, values, strict=True)]
                    for (ids, _), values in zip(sampled, logprobs, strict=True)
                ],
                "finish_reasons": [reason for _, reason in sampled],
            }
        if path == "/v1/chat/completions":
            prompt = "\n".join(_text_of(message.get("content")) for message in body["messages"])
        else:
            prompt = body["prompt"] if isinstance(body["prompt"], str) else tokenizer.decode(body["prompt"])
        choices = []
        for index in range(num):
            ids, reason = self.sample(prompt, max_tokens)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
            choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
            choices.append(choice)
        kind = "chat.completion" if "messages" in body else "text_completion"
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return {
            "id": "x",
            "object": kind,
            "created": 1,
            "model": body.get("model"),
            "choices": choices,
            "usage": usage,
        }


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part.get("text", "") for part in content)
    return content or ""


def _handler(oracle: Oracle) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = re.sub(r"\?.*", "", self.path)
            model = {"id": oracle.policy.name, "object": "model", "max_model_len": MAX_MODEL_LEN}
            self._send({"object": "list", "data": [model]} if path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = oracle.answer(self.path, body)
            # An environment that has what it needs is ended while it asks for more.
            with suppress(BrokenPipeError, ConnectionResetError):
                self._send(answer)

        def _send(self, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
