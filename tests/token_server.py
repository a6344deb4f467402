"""A stand-in for vLLM's routes from tokens to tokens: a real tokenizer, a real chat template, and replies out of a script.

    with TokenServer(template, end="<|im_end|>") as server:
        server.replies = ["Hello.", "<tool_call>..."]
        Gateway([server.url])

It samples text one character at a time, while its tokenizer merges characters where it renders: what was sampled is not
what the same text is rendered as, so that whoever tokenises again is found out. `answer` does without HTTP.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_atropos.serving.generate_endpoint import NEUTRAL_SAMPLING_PARAMS


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ {'name': c['function']['name'], 'arguments': "
    "c['function']['arguments']} | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Some models write their markers between wide lines.
MARKERS = re.compile(
    r"<[|\uff5c][^<>\s{}'\"]+?[|\uff5c]>|</?[a-z]+_of_(?:turn|utterance)>|</?s>|\[/?INST\]|<(?:bos|eos)>"
)
TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.S)
MAX_MODEL_LEN = 4096
TOKENS_OF_PART = 3
GENERATE = "/inference/v1/generate"
DISTRIBUTION = (
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
)


def merging_tokenizer(chat_template: str, end: str) -> PreTrainedTokenizerFast:
    """Bytes, merges of every two lower-case letters of a few, and the markers of a template as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "aehilnorstu" for b in "aehilnorstu"]
    words = [*alphabet, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = sorted({*MARKERS.findall(chat_template), end, "<s>"})
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, bos_token="<s>", chat_template=chat_template
    )


class Refused(Exception):
    """An answer with status 400."""


def _logprobs(ids: list[int]) -> list[dict[str, Any]]:
    # Exact in float32, so that every layer must repeat them exactly.
    return [{"token_id": token, "logprob": -(token % 64) / 64} for token in ids]


class TokenServer:
    """See the module.

    Args:
        chat_template (`str`, *optional*):
            By which conversations are rendered.
        end (`str`, *optional*):
            The special token that ends a reply.
        parses_thoughts (`bool`, *optional*):
            Whether text between `<think>` and `</think>` is shown as `reasoning`.
        max_model_len (`int`, *optional*):
            Tokens that prompt and reply may have together.

    Attributes:
        replies (`list[str | Callable]`):
            What is sampled next, without its end; a `\\0` at the end of a text says that it is cut off there. Used up one by
            one. A callable is called with nothing, may block or raise, and returns the text, or its parts: of a stream each
            comes when it is made.
        requests (`list[tuple[str, dict]]`):
            What arrived.
        version (`str`):
            Label of the weights.
        owned_by (`str`):
            What kind of server it says that it is.
        gives_parts (`bool`):
            Whether it answers in parts who asks for them.
    """

    def __init__(
        self,
        chat_template: str = CHATML,
        end: str = "<|im_end|>",
        parses_thoughts: bool = False,
        max_model_len: int = MAX_MODEL_LEN,
    ):
        self.tokenizer = merging_tokenizer(chat_template, end)
        self.end = self.tokenizer.convert_tokens_to_ids(end)
        self.parses_thoughts = parses_thoughts
        self.max_model_len = max_model_len
        self.replies: list[str | Callable[[], str | Iterable[str]]] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.version = "3"
        self.owned_by = "vllm"
        self.gives_parts = True
        self.headers: dict[str, str] = {}
        self._http: ThreadingHTTPServer | None = None

    def __enter__(self) -> TokenServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, port: int = 0) -> None:
        """Listen."""
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Be gone, as after SIGKILL: connections break."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    @property
    def is_there(self) -> bool:
        return self._http is not None

    def sampled_ids(self, text: str) -> list[int]:
        """One token a character, and the template's markers as the tokens that they are."""
        parts = MARKERS.split(text)
        markers = MARKERS.findall(text)
        ids: list[int] = []
        for index, part in enumerate(parts):
            for character in part:
                ids += self.tokenizer.encode(character, add_special_tokens=False)
            if index < len(markers):
                ids.append(self.tokenizer.convert_tokens_to_ids(markers[index]))
        return ids

    def text(self, ids: Any) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What vLLM answers.

        Raises:
            Refused: where it answers with an error.
        """
        self.requests.append((path, body))
        handlers = {
            "/v1/chat/completions/render": self._render,
            GENERATE: self._generate,
            "/v1/chat/completions/derender": self._derender,
            "/v1/completions/derender": self._derender_text,
            "/detokenize": lambda body: {"prompt": self.text(body["tokens"])},
            "/generate": self._generate_for_environments,
        }
        return handlers[path](body)

    def rendered(self, body: dict[str, Any]) -> list[int]:
        """The ids of a request."""
        messages = [dict(message) for message in body["messages"]]
        for message in messages:
            # As vLLM does: templates take arguments as objects.
            for call in message.get("tool_calls") or []:
                with contextlib.suppress(ValueError, TypeError):
                    call["function"] = {**call["function"], "arguments": json.loads(call["function"]["arguments"])}
        text = self.tokenizer.apply_chat_template(
            json.loads(json.dumps(messages)),
            tools=body.get("tools"),
            tokenize=False,
            add_generation_prompt=body.get("add_generation_prompt", True),
            **(body.get("chat_template_kwargs") or {}),
        )
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _render(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.rendered(body)
        if len(ids) >= self.max_model_len:
            raise Refused(f"This model's maximum context length is {self.max_model_len} tokens")
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if limit and limit > self.max_model_len:
            raise Refused(f"max_tokens={limit} cannot be greater than max_model_len={self.max_model_len}")
        parameters = {name: body.get(name) for name in DISTRIBUTION}
        grammar = body.get("tool_choice") not in (None, "auto", "none") or body.get("response_format")
        parameters |= {
            "n": 1,
            "max_tokens": min(limit or self.max_model_len, self.max_model_len - len(ids)),
            "stop": [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or [],
            "structured_outputs": {"json": {}} if grammar else None,
        }
        # As vLLM's parameters, which leave out their defaults.
        said = {
            name: value
            for name, value in parameters.items()
            if value is not None and value != NEUTRAL_SAMPLING_PARAMS.get(name)
        }
        # As vLLM, which says so if it has a reasoning parser.
        of_reasoning = {"chat_template_kwargs": {}} if self.parses_thoughts else None
        return {"token_ids": ids, "sampling_params": said, "reasoning_parser_kwargs": of_reasoning}

    def parts(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What it answers in parts, with their texts: some tokens each, or each part of a reply that has them."""
        self.requests.append((GENERATE, body))
        reply = self.replies[0]
        made = reply() if callable(reply) else reply
        if not isinstance(made, str):
            self.replies.pop(0)
            yield from (self._part(self.sampled_ids(text), text) for text in made)
            yield self._part([self.end], "", finish_reason="stop", weight_versions=self._versions(1))
            return
        self.replies[0] = made
        (choice,) = self._generate(body)["choices"]
        ids = choice["token_ids"]
        sampled = ids[:-1] if ids[-1:] == [self.end] else ids
        text = self.text(sampled)
        if choice["stop_reason"]:
            text = text[: text.index(choice["stop_reason"])]
        # As an engine, which looks for the beginning of a stop string before it gives text away.
        num_held = max((len(stop) - 1 for stop in body["sampling_params"].get("stop") or []), default=0)
        num_given = 0
        for start in range(0, len(sampled), TOKENS_OF_PART):
            end = start + TOKENS_OF_PART
            known = self.text(sampled[:end]).rstrip("\ufffd")
            given = text[: max(len(known) - num_held, num_given)]
            yield self._part(sampled[start:end], given[num_given:])
            num_given = len(given)
        last = {name: choice[name] for name in ("finish_reason", "stop_reason", "weight_versions")}
        yield self._part(ids[len(sampled) :], text[num_given:], **last)

    def _part(self, ids: list[int], text: str, **last: Any) -> dict[str, Any]:
        choice = {"index": 0, "token_ids": ids, "text": text, "logprobs": {"content": _logprobs(ids)}}
        return {"request_id": "r", "choices": [{**choice, "finish_reason": None, **last}]}

    def _versions(self, num_tokens: int) -> list[dict[str, Any]]:
        return [{"version": self.version, "start": 0, "end": num_tokens}]

    def _generate(self, body: dict[str, Any]) -> dict[str, Any]:
        reply = self.replies.pop(0)
        made = reply() if callable(reply) else reply
        text = made if isinstance(made, str) else "".join(made)
        ids, finish_reason, stop_reason = self.sampled_ids(text.rstrip("\0")), "length", None
        if not text.endswith("\0"):
            ids, finish_reason = [*ids, self.end], "stop"
        limit = body["sampling_params"]["max_tokens"]
        if len(ids) > limit:
            ids, finish_reason = ids[:limit], "length"
        for stop in body["sampling_params"].get("stop") or []:
            if stop in text:
                ids = self.sampled_ids(text[: text.index(stop) + len(stop)])
                finish_reason, stop_reason = "stop", stop
        choice = {
            "index": 0,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
            "token_ids": ids,
            "logprobs": {"content": _logprobs(ids)},
            "weight_versions": self._versions(len(ids)),
        }
        return {"request_id": "r", "choices": [choice]}

    def _generate_for_environments(self, body: dict[str, Any]) -> dict[str, Any]:
        if "prompt" not in body:
            raise Refused("prompt is missing")
        reply = self.replies.pop(0)
        ids = self.sampled_ids(reply() if callable(reply) else reply)
        return {"logprobs": [[[{str(token): -(token % 64) / 64}] for token in ids]], "finish_reasons": ["stop"]}

    def _derender(self, body: dict[str, Any]) -> dict[str, Any]:
        (choice,) = body["generate_response"]["choices"]
        text = self.text(choice["token_ids"])
        message: dict[str, Any] = {"role": "assistant", "content": text, "reasoning": None, "tool_calls": []}
        if self.parses_thoughts and "</think>" in text:
            thoughts, text = text.removeprefix("<think>").split("</think>", 1)
            message |= {"reasoning": thoughts.strip("\n"), "content": text.lstrip("\n")}
        calls = TOOL_CALL.findall(text) if body["chat_request"].get("tools") else []
        for number, call in enumerate(map(json.loads, calls)):
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
            message["tool_calls"].append({"id": f"{number}", "type": "function", "function": function})
        if calls:
            message["content"] = TOOL_CALL.sub("", text).strip() or None
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    def _derender_text(self, body: dict[str, Any]) -> dict[str, Any]:
        (response,) = body["generate_responses"]
        ids = response["choices"][0]["token_ids"]
        return {"choices": [{"text": self.tokenizer.decode(ids, skip_special_tokens=True)}]}


class SGLangTokenServer(TokenServer):
    """The same with SGLang's routes, and its parsers of thoughts and tools."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.owned_by = "sglang"

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append((path, body))
        handlers = {
            "/v1/tokenize": lambda body: {"tokens": self.rendered(body)},
            "/v1/detokenize": self._detokenize,
            "/generate": self._generate_as_sglang,
            "/separate_reasoning": self._separate_reasoning,
            "/parse_function_call": self._parse_function_call,
        }
        return handlers[path](body)

    def _detokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"text": self.tokenizer.decode(body["tokens"], skip_special_tokens=body["skip_special_tokens"])}

    def _generate_as_sglang(self, body: dict[str, Any]) -> dict[str, Any]:
        given = body["sampling_params"]
        answer = self._generate({"sampling_params": {**given, "max_tokens": given["max_new_tokens"]}})
        (choice,) = answer["choices"]
        finish = {"type": choice["finish_reason"]}
        if finish["type"] == "stop":
            finish["matched"] = choice["stop_reason"] or choice["token_ids"][-1]
        info = {
            "finish_reason": finish,
            "weight_versions": choice["weight_versions"],
            "output_token_logprobs": [
                [entry["logprob"], entry["token_id"], None] for entry in choice["logprobs"]["content"]
            ],
        }
        return {"text": "", "meta_info": info}

    def _separate_reasoning(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["reasoning_parser"] == "thoughts"
        thoughts, text = "", body["text"]
        if "<think>" in text:
            thoughts, _, text = text.removeprefix("<think>").partition("</think>")
        return {"reasoning_text": thoughts.strip("\n"), "text": text.lstrip("\n")}

    def _parse_function_call(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["tool_call_parser"] == "calls" and body["tools"]
        calls = [json.loads(call) for call in TOOL_CALL.findall(body["text"])]
        return {
            "normal_text": TOOL_CALL.sub("", body["text"]).strip() if calls else body["text"],
            "calls": [
                {"tool_index": index, "name": call["name"], "parameters": json.dumps(call["arguments"])}
                for index, call in enumerate(calls)
            ],
        }


def _handler(server: TokenServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are sent one after the other, which waits 40 ms for the client's word otherwise.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            model = {
                "id": "policy",
                "max_model_len": server.max_model_len,
                "parent": None,
                "owned_by": server.owned_by,
            }
            models = {"data": [model]}
            # By these a launch knows what it is, and which policy it holds.
            of_vllm = {"/version": {"version": "0.32.0"}, "/weight_info": {"weight_version": server.version}}
            of_sglang = {
                "/model_info": {"weight_version": server.version},
                "/server_info": {"tool_call_parser": "calls", "reasoning_parser": "thoughts"},
            }
            of_kind = of_sglang if server.owned_by == "sglang" else of_vllm
            answers: dict[str, Any] = {"/health": {}, "/v1/models": models, **of_kind}
            self.send(200 if self.path in answers else 404, answers.get(self.path, {"detail": "Not Found"}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == GENERATE and body["stream"] and server.gives_parts:
                return self.send_parts(server.parts(body))
            try:
                answer = server.answer(self.path, body)
            except Refused as exc:
                error = {"message": str(exc), "code": 400}
                is_sglang = server.owned_by == "sglang"
                return self.send(400, {"object": "error", **error} if is_sglang else {"error": error})
            except ConnectionAbortedError:
                self.close_connection = True
                return None
            return self.send(200, answer)

        def send(self, status: int, values: Any) -> None:
            if not server.is_there:
                self.close_connection = True
                return
            payload = json.dumps(values).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(payload)), **server.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(payload)

        def send_parts(self, parts: Iterator[dict[str, Any]]) -> None:
            # Its end is that of the connection.
            self.close_connection = True
            try:
                self.send_response(200)
                for name, value in {
                    "Content-Type": "text/event-stream",
                    "Connection": "close",
                    **server.headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                for part in parts:
                    self.wfile.write(f"data: {json.dumps(part)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")
            except ConnectionError:
                return

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler
