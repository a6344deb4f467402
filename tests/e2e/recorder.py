"""Stands between environments and a vLLM server, and notes what was really sampled."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests
from servers import HOST


class Recorder(ThreadingHTTPServer):
    """Stands between environments and server, and notes what was really sampled.

    Attributes:
        sampled (`dict[tuple[int, ...], int]`):
            Prompt and completion of every call -> length of the prompt.
    """

    daemon_threads = True

    def __init__(self, target: str):
        super().__init__((HOST, 0), RecordingHandler)
        self.target = target
        self.sampled: dict[tuple[int, ...], int] = {}

    def note(self, request: dict[str, Any], answer: dict[str, Any]) -> None:
        prompt = request["prompt"]["prompt_token_ids"]
        for completion in answer["logprobs"]:
            ids = [int(next(iter(token[0]))) for token in completion]
            self.sampled[(*prompt, *ids)] = len(prompt)


class RecordingHandler(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        headers = {"Content-Type": self.headers["Content-Type"] or "", "Accept-Encoding": "identity"}
        answer = requests.request(
            self.command, self.server.target + self.path, data=body, headers=headers, timeout=120
        )
        if self.path == "/generate" and answer.status_code == 200:
            self.server.note(json.loads(body), answer.json())
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""


@contextmanager
def recording(target: str) -> Iterator[tuple[str, Recorder]]:
    with Recorder(target) as recorder:
        thread = threading.Thread(target=recorder.serve_forever, daemon=True)
        thread.start()
        yield f"http://{HOST}:{recorder.server_address[1]}", recorder
        recorder.shutdown()
