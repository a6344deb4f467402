"""HTTP to one inference server: every request is sent once, ends at its deadline, and says what came if it fails."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.auth import AuthBase
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ReadTimeoutError

from ..errors import PreflightError, VLLMServerError, VLLMServerUnreachable, WeightSyncError, WeightSyncTimeout
from ..network import proxies_for
from .transports.backends import MIDDLEWARE


T = TypeVar("T")

MAX_CONCURRENT_REQUESTS = 64
"""urllib3 logs a warning for each connection beyond this number of open ones."""

MAX_QUOTED_CHARS = 500
"""How much of a server's answer an error repeats."""

CONNECTION_FAILURES = (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)
"""The second one is requests' name for an answer that ends too early."""

UNKNOWN_ROUTE = '{"detail":"Not Found"}'
"""FastAPI's answer to a route that it does not have. A missing adapter is answered with 404, too, but with a message.
"""

MISSING_ROUTES = {
    "_lora_adapter": "Start the server with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment.",
    "/atropos/": f"Start the server with --middleware {MIDDLEWARE}.",
    "": "Start the server with `trl vllm-serve` (vLLM 0.32 or newer), or VLLM_SERVER_DEV_MODE=1.",
}
"""What a vLLM server lacks that answers 404, by a part of the route that was asked for."""

VLLM, SGLANG = "vLLM", "SGLang"
VLLM_ROUTES = frozenset(
    {"/pause", "/resume", "/start_weight_update", "/update_weights", "/finish_weight_update", "/weight_info"}
)
"""What a publish needs of vLLM, which has them in its developer mode only."""
SGLANG_ROUTES = frozenset(
    {"/begin_weight_update", "/end_weight_update", "/update_weights_from_distributed", "/pause_generation"}
)
"""What a publish needs of SGLang. The first version with all of them is 0.5.22."""
UNKNOWN = "inference"
"""Of a server of which it is not known yet which kind it is."""


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of server.

    For messages: its indefinite article and name, the command that starts it, the version to install, and what it lacks
    that answers 404, by a part of the route. Then its routes: `known_by` is one that no other kind has and that answers
    while generation is paused, too; `weight_version` one whose answer names the weights; `publish` those that a publish
    needs.
    """

    article: str
    command: str
    version: str
    missing_routes: dict[str, str]
    known_by: str = ""
    weight_version: str = ""
    publish: frozenset[str] = frozenset()


KINDS = {
    VLLM: Kind(
        "a vLLM",
        "trl vllm-serve --model ...",
        "vLLM 0.32",
        MISSING_ROUTES,
        known_by="/version",
        weight_version="/weight_info",
        publish=VLLM_ROUTES,
    ),
    SGLANG: Kind(
        "an SGLang",
        "python -m sglang.launch_server --model-path ...",
        "SGLang 0.5.22 or newer",
        {"": "Install SGLang 0.5.22 or newer, or look at the proxy in between."},
        known_by="/model_info",
        weight_version="/model_info",
        publish=SGLANG_ROUTES,
    ),
    UNKNOWN: Kind(
        "an inference",
        "trl vllm-serve --model ...",
        "vLLM 0.32, or SGLang 0.5.22 or newer",
        {"": "Correct --vllm_server_base_url."},
    ),
}


class ServerSession(requests.Session):
    """A session with one server, which messages call by its `kind`. TRL's client sends its own requests through it too, so they behave the same.

    1. A request has one deadline, from its start to the last byte of the answer; it is `timeout_s` seconds unless the
       request names another. requests' own `timeout` starts again with every byte; it still bounds what comes before there
       is a connection: each address of the host, and the handshake of TLS.
    2. A request is sent once. The control requests are not idempotent: a repeated `/update_weights` waits forever for
       bytes that were already taken. Redirects are not followed, because they would send it again, elsewhere.
    3. Connections are not kept. The server closes them after 5 s of idling and after every 500, and without retries
       the next request would fail for that.
    4. The API key is what the caller gave, sent as `Authorization: Bearer`, also if `~/.netrc` has an entry for the host.
       Proxies of the environment are used, but not for this machine.

    Raises:
        [`PreflightError`]: if the URL or the key cannot be sent.
    """

    def __init__(self, base_url: str, timeout_s: float, api_key: str | None = None, kind: str = VLLM):
        super().__init__()
        self.kind = kind
        self.base_url = base_url
        self.timeout_s = timeout_s
        _check_url(base_url)
        self._proxies = proxies_for(base_url)
        # Without an `auth`, requests would take one from ~/.netrc, and put it in the place of the header.
        self.auth = _BearerAuth(_checked_key(api_key))
        self.headers["Connection"] = "close"
        for scheme in ("http://", "https://"):
            self.mount(scheme, _InterruptibleAdapter(pool_maxsize=MAX_CONCURRENT_REQUESTS))

    def request(self, method: str | bytes, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request as the class says, read the whole answer, and return it if its status is below 300.

        Raises:
            [`WeightSyncTimeout`]: at the deadline.
            [`VLLMServerUnreachable`]: if the connection is refused or breaks.
            [`VLLMServerError`]: if the server answers with an error.
            [`WeightSyncError`]: if something answers that cannot be the server.
        """
        timeout_s = kwargs.pop("timeout", None) or self.timeout_s
        where = (
            f"{_text(method).upper()} {_text(url).removeprefix(self.base_url)} of the {self.kind} server at "
            f"{self.base_url}"
        )
        kwargs = {"proxies": dict(self._proxies), **kwargs, "allow_redirects": False, "timeout": timeout_s}
        with _Deadline(timeout_s) as deadline:
            try:
                response = super().request(method, url, *args, **kwargs)
            except requests.exceptions.RequestException as exc:
                if deadline.has_passed or _is_timeout(exc):
                    raise _timeout(where, timeout_s) from exc
                raise _connection_error(where, exc) from exc
        if deadline.has_passed:
            # An answer without a length ends where the connection does, also where the deadline has cut it.
            raise _timeout(where, timeout_s)
        if response.status_code >= 300:
            raise _status_error(where, response, KINDS[self.kind])
        return response


class Answer(dict[str, Any]):
    """The JSON object of an answer. A key that it lacks is a `WeightSyncError`, also for TRL's methods.

    Raises:
        [`WeightSyncError`]: if the answer is not a JSON object.
    """

    def __init__(self, response: requests.Response, kind: str = VLLM):
        self._kind = KINDS[kind]
        self._where = f"{response.request.method} {response.request.path_url}"
        self._url = response.url
        try:
            values = response.json()
        except requests.exceptions.JSONDecodeError as exc:
            raise self.unexpected("JSON", response.text) from exc
        if not isinstance(values, dict):
            raise self.unexpected("a JSON object", values)
        super().__init__(values)

    def __missing__(self, key: str) -> Any:
        raise self.unexpected(f"`{key}`", dict(self))

    def get_typed(self, key: str, kind: type[T]) -> T:
        """Return the value of `key`.

        Raises:
            [`WeightSyncError`]: if it is missing or not a `kind`.
        """
        value = self[key]
        if not isinstance(value, kind):
            raise self.unexpected(f"`{key}` of type {kind.__name__}", dict(self))
        return value

    def unexpected(self, expected: str, received: Any) -> WeightSyncError:
        """The error for an answer that is not what the route promises."""
        return WeightSyncError(
            f"{self._where} ({self._url}) answered {str(received)[:MAX_QUOTED_CHARS]!r} instead of {expected}.",
            f"What answers is not {self._kind.article} server, or one of a version that trl_atropos does not know.",
            f"Correct --vllm_server_base_url, look at the proxy in between, or install {self._kind.version}.",
        )


class _BearerAuth(AuthBase):
    def __init__(self, api_key: str | None):
        self.api_key = api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.api_key:
            request.headers["Authorization"] = f"Bearer {self.api_key}"
        return request


class _Deadline:
    """Shuts the connection of this thread's request down once its time is over, whatever it waits for."""

    current = threading.local()

    def __init__(self, timeout_s: float):
        self.has_passed = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(timeout_s, self._pass)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        _Deadline.current.deadline = self
        self._timer.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._timer.join()
        _Deadline.current.deadline = None

    def watch(self, connection: socket.socket) -> None:
        """Name the connection of the request."""
        with self._lock:
            self._socket = connection
            if self.has_passed:
                _shut_down(connection)

    def _pass(self) -> None:
        with self._lock:
            self.has_passed = True
            if self._socket is not None:
                _shut_down(self._socket)


def _shut_down(connection: socket.socket) -> None:
    # Already closed by the other side, or by the end of the request: then there is nothing to wake.
    with contextlib.suppress(OSError):
        # Of the plain socket: TLS would first say goodbye to a peer that does not listen.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Interruptible:
    """Mixin for urllib3's connections: serves one request, and tells its deadline which socket to shut down."""

    sock: socket.socket | None

    @property
    def is_connected(self) -> bool:
        # The pool asks before it uses a connection again. A server may not close what it was asked to close, or do so
        # while the next request is on its way.
        return False

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        deadline: _Deadline | None = getattr(_Deadline.current, "deadline", None)
        if deadline is not None and self.sock is not None:
            deadline.watch(self.sock)


class _HTTPConnection(_Interruptible, HTTPConnection):
    pass


class _HTTPSConnection(_Interruptible, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


POOLS = {"http": _HTTPPool, "https": _HTTPSPool}


class _InterruptibleAdapter(HTTPAdapter):
    """Connections that a deadline can end. The default of an adapter is to retry nothing."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        # SOCKS has connections of its own; there, requests' timeout per read has to do.
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = POOLS
        return manager


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _check_url(base_url: str) -> None:
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise PreflightError(
            f"The URL of the inference server is {parts.scheme}://{parts.netloc.rpartition('@')[2]}.",
            "It must have the form http://HOST:PORT or https://HOST:PORT, without a user name.",
            "Correct --vllm_server_base_url; credentials go into --vllm_api_key.",
        )


def _checked_key(api_key: str | None) -> str | None:
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise PreflightError(
            f"The API key of the inference server has {len(api_key)} characters, some of which no HTTP header can carry.",
            "Often it is the line break at the end of the file that the key was read from.",
            "Correct --vllm_api_key, or VLLM_API_KEY in the environment.",
        )
    return api_key


def _is_timeout(exc: requests.exceptions.RequestException) -> bool:
    # requests reports a stall after the headers of an answer as a ConnectionError around urllib3's timeout.
    cause = exc.args[0] if exc.args else None
    return isinstance(exc, requests.exceptions.Timeout) or isinstance(cause, ReadTimeoutError)


def _timeout(where: str, timeout_s: float) -> WeightSyncTimeout:
    return WeightSyncTimeout(
        f"{where} did not answer within {timeout_s} s.",
        "The engine is stuck, or the machine is overloaded; whether the request took effect is unknown.",
        "Look at the server's log, restart the server, then train with --resume_from_checkpoint; or raise "
        "--weight_sync_timeout.",
    )


def _connection_error(where: str, exc: requests.exceptions.RequestException) -> WeightSyncError:
    kind = VLLMServerUnreachable if isinstance(exc, CONNECTION_FAILURES) else WeightSyncError
    return kind(
        f"{where} failed: {type(exc).__name__}: {exc}.",
        "The server is not there, died, or closed the connection.",
        "Look at the server's log, restart the server, then train with --resume_from_checkpoint.",
    )


def _status_error(where: str, response: requests.Response, kind: Kind) -> WeightSyncError:
    status, detail = response.status_code, " ".join(response.text.split())[:MAX_QUOTED_CHARS]
    if status < 400:
        return WeightSyncError(
            f"{where} answered {status} and refers to {response.headers.get('Location')!r}.",
            "Redirects are not followed: they would send a request that must be sent once again, elsewhere.",
            "Correct --vllm_server_base_url.",
        )
    if status == 401:
        fix = "Set --vllm_api_key, or VLLM_API_KEY in the environment, to the key the server was started with."
    elif status == 404 and detail == UNKNOWN_ROUTE:
        fix = next(fix for prefix, fix in kind.missing_routes.items() if prefix in where)
    else:
        fix = "Look at the server's log; if it stays in this state, restart the server."
    return VLLMServerError(
        f"{where} answered {status}: {detail}.",
        "The server refused the request or failed while handling it.",
        fix,
        status_code=status,
        detail=detail,
    )
