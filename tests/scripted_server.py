"""A fake vLLM server for the ways things fail: its control routes and their state over real sockets, no engine.

    with ScriptedServer(tiny_llama(seed=1)) as server:
        server.script["POST /update_weights"] = ["close", None]  # breaks once, then works
        ...
        assert server.routes == ["POST /pause", ...]
        assert server.offences == []

Actions, by "METHOD /route"; a list is used up one per request, and its last one stays:

    None               answer as vLLM does
    500 (any status)   an error; the request has no effect
    "close"            the connection ends without an answer
    "reset"            the same, with a TCP RST
    "stall"            no answer until the server is stopped
    "dribble"          200, then one byte of a body every 0.2 s, forever
    "dribble headers"  the same from the first line on
    "html"             200 with something else than JSON
    b"..."             200 with these bytes
    "redirect"         307 to the same route
    "missing"          200 with a JSON object that has none of the route's keys
    {...}              200 with this JSON, or 400 if it has an `error`
    "die"              the process is gone: no answer, and nobody listens until `restart`
    "answer and die"   the request takes effect and is answered, then the process is gone
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from scripted_routes import MAX_WAIT_S, UNKNOWN_ROUTE, Refusal, Request, ScriptedRoutes, State


DRIBBLE_INTERVAL_S = 0.2
IDLE_S = 0.5
"""A connection that no request comes on is closed after this."""


class ScriptedServer(ScriptedRoutes):
    """See the module. Starts when it is entered.

    Args:
        model (`torch.nn.Module`, *optional*):
            What it serves, its starting checkpoint; without one, weights are taken and every logprob is -1.

    Attributes:
        script (`dict[str, Any]`):
            "METHOD /route" -> action, or list of actions.
        requests (`list[Request]`):
            Everything that arrived, in order, also what was then made to fail.
        offences (`list[str]`):
            What would have killed or corrupted a real server.
        state ([`State`]):
            Of the running process.
        config (`dict[str, Any]`):
            What `/server_info` answers as `vllm_config`.
        environment (`dict[str, Any]`):
            What it answers as `vllm_env`.
        load (`Callable[[dict], None]`):
            Takes an `update_info`; a test may put another one in its place.
    """

    def __init__(self, model: torch.nn.Module | None = None):
        super().__init__(model)
        self.script: dict[str, Any] = {}
        self.requests: list[Request] = []
        self._port = 0
        self._http: _HTTPServer | None = None

    # Process

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def routes(self) -> list[str]:
        """ "METHOD /route" of every request. Without `/health`: how often it is asked depends on the machine."""
        return [request.route for request in self.requests if request.route != "GET /health"]

    def last(self, route: str) -> Request:
        """The newest request to a route."""
        return [request for request in self.requests if request.route == route][-1]

    def start(self) -> None:
        """Listen, on the same port every time."""
        assert self._http is None, "it runs already"
        self.ended = threading.Event()
        self._http = _HTTPServer(self, self._port)
        self._port = self._http.server_address[1]
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, name="scripted-server", daemon=True
        ).start()

    def stop(self) -> None:
        """End at once: nobody listens, and no pending request is answered."""
        with self._changed:
            http, self._http = self._http, None
            self.ended.set()
            self._changed.notify_all()
        if http is not None:
            http.shutdown()
            http.server_close()

    def restart(self) -> None:
        """A new process on the same port. It serves the starting checkpoint and knows nothing of a trainer."""
        self.stop()
        self.state = State()
        if self.model is not None:
            self.model.load_state_dict(self._checkpoint)
        self.start()

    def __enter__(self) -> ScriptedServer:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # Requests

    def take(self, request: Request) -> Any:
        """Record a request and return its action."""
        with self._changed:
            self.requests.append(request)
            actions = self.script.get(request.route)
            if not isinstance(actions, list):
                action, is_last = actions, True
            else:
                action, is_last = actions[0], len(actions) == 1
            if isinstance(actions, list) and not is_last:
                actions.pop(0)
            elif action in ("die", "answer and die"):
                # Once: the next process answers.
                del self.script[request.route]
            return action


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, scripted: ScriptedServer, port: int):
        self.scripted = scripted
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HTTPServer
    timeout = IDLE_S
    num_requests = 0

    def do_GET(self) -> None:
        self.respond("GET")

    def do_POST(self) -> None:
        self.respond("POST")

    def respond(self, method: str) -> None:
        scripted, url = self.server.scripted, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.num_requests += 1
        # Kept in spite of what the client asks for, but not for a second request: vLLM closes a connection after 5 s of
        # idling, in the worst case while a request is on its way.
        self.close_connection = self.num_requests > 1
        if self.close_connection:
            return
        request = Request(
            f"{method} {url.path}", parse_qs(url.query), json.loads(body) if body else None, dict(self.headers)
        )
        action = scripted.take(request)
        if action is None or action == "answer and die":
            self.send_answer(request)
        elif action == 404:
            self.send(404, "application/json", UNKNOWN_ROUTE)
        elif isinstance(action, int):
            self.send_json(action, {"error": {"message": f"scripted {action}"}})
        elif isinstance(action, dict):
            self.send_json(400 if "error" in action else 200, action)
        elif action == "html":
            self.send(200, "text/html", b"<html>a proxy</html>")
        elif isinstance(action, bytes):
            self.send(200, "application/json", action)
        elif action == "redirect":
            self.send(307, "text/plain", b"", Location=self.path)
        elif action == "missing":
            self.send_json(200, {"other": "keys"})
        else:
            self.break_off(action)
        if action in ("die", "answer and die"):
            scripted.stop()

    def break_off(self, action: str) -> None:
        """The actions without an answer, or without an end."""
        self.close_connection = True
        ended = self.server.scripted.ended
        if action == "stall":
            ended.wait(MAX_WAIT_S)
        elif action == "reset":
            # With this option, closing sends an RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
        elif action in ("dribble", "dribble headers"):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            if action == "dribble":
                self.wfile.write(b"no\r\n\r\n{")
            with contextlib.suppress(OSError):
                while not ended.wait(DRIBBLE_INTERVAL_S):
                    self.wfile.write(b" ")
        else:
            assert action in ("close", "die"), action

    def send_answer(self, request: Request) -> None:
        try:
            answer = self.server.scripted.answer(request)
        except Refusal as exc:
            return self.send_json(exc.status, {"error": {"message": str(exc), "code": exc.status}})
        if self.server.scripted.ended.is_set():
            self.close_connection = True
        elif answer is UNKNOWN_ROUTE:
            self.send(404, "application/json", UNKNOWN_ROUTE)
        elif isinstance(answer, str):
            self.send(200, "text/plain", answer.encode())
        else:
            self.send_json(200, answer)

    def send_json(self, status: int, values: Any) -> None:
        self.send(status, "application/json", json.dumps(values).encode())

    def send(self, status: int, content_type: str, payload: bytes, **headers: str) -> None:
        self.send_response(status)
        headers |= {"Content-Type": content_type, "Content-Length": str(len(payload))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: Any) -> None:
        """Quiet."""
