"""AtroposClient against the real API, and against real sockets that misbehave.

What matters most: `/batch` gives each batch away once, so it is asked once, and an error says whether one can be lost.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import requests
from atropos_api import make_registration, wait_for_batch

from trl_atropos.errors import (
    AtroposConnectionError,
    AtroposDataTimeout,
    AtroposProtocolError,
    AtroposRegistrationError,
    PreflightError,
    TrlAtroposError,
)
from trl_atropos.wire.client import ApiStatus, AtroposClient


# A raw server that dies would look like one that stalls.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

Answer = bytes | None


class RawServer:
    """A listening socket whose answers are bytes chosen by the test; counts the requests that reached it.

    Args:
        answer (`Callable[[str], Answer]`):
            Path of a request -> all bytes of the answer; None: never answer.
        closes (`bool`, *optional*, defaults to `True`):
            Whether it closes a connection after its answer. Either way it reads one request per connection.
    """

    def __init__(self, answer: Callable[[str], Answer], closes: bool = True):
        self.paths: list[str] = []
        self._answer = answer
        self._closes = closes
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection.makefile("rb") as request:
                request_line = request.readline()
                if not request_line:
                    connection.close()
                    return  # the wake-up of `__exit__`
                headers = http.client.parse_headers(request)
                # To the last byte: closing a socket with unread data resets the connection.
                request.read(int(headers["Content-Length"] or 0))
            path = request_line.split()[1].decode()
            self.paths.append(path)
            answer = self._answer(path)
            if answer is not None:
                connection.sendall(answer)
            if answer is not None and self._closes:
                connection.close()
            else:
                self._open.append(connection)

    def __enter__(self) -> RawServer:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()
        for connection in (*self._open, self._listener):
            connection.close()


def answer_of(body: bytes, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n".encode() + body


@contextmanager
def client_of(answer: Answer | Callable[[str], Answer]) -> Iterator[tuple[AtroposClient, RawServer]]:
    with (
        RawServer(answer if callable(answer) else lambda path: answer) as server,
        AtroposClient(server.base_url, read_timeout_s=0.2 if answer is None else 10.0) as client,
    ):
        yield client, server


# The way things go


def test_from_registration_to_a_batch(api, client):
    client.wait_until_reachable(timeout_s=5)
    assert client.info() == (-1, -1)
    client.register(make_registration(starting_step=7))
    assert client.info() == (4, 33)
    assert client.fetch_batch() is None
    api.post_group(2, scores=[0.25, 0.75])
    assert client.status() == ApiStatus(current_step=7, queue_size=1)
    assert client.fetch_batch() is None
    api.post_group(2, scores=[1.0, -1.0])

    batch = client.fetch_batch()

    assert [group["scores"] for group in batch] == [[0.25, 0.75], [1.0, -1.0]]
    assert batch[0]["tokens"] == [[5, 6, 7], [5, 6, 7]]
    assert client.status() == ApiStatus(current_step=8, queue_size=0)


def test_all_eight_fields_reach_the_api(api, client):
    client.register(make_registration(starting_step=7))
    client.fetch_batch()  # lets environments in

    assert api.get("/wandb_info").json() == {"group": "group", "project": "project"}
    env = api.register_env()
    assert (env["checkpoint_dir"], env["checkpoint_interval"]) == ("checkpoints", 10)
    assert (env["starting_step"], env["num_steps"]) == (7, 100)


def test_a_slash_at_the_end_of_the_url_does_no_harm(api):
    with AtroposClient(api.base_url + "/") as client:
        assert client.info() == (-1, -1)


def test_waiting_polls_quickly_at_first_and_returns_a_batch_that_comes_later(api, client, tmp_path):
    client.register(make_registration())
    timer = threading.Timer(0.5, api.post_group, args=(4,))
    timer.start()

    start = time.monotonic()
    batch = wait_for_batch(client, tmp_path, timeout_s=10)

    # Pauses of 0.1, 0.125, 0.156, 0.195 s: polls at 0, 0.1, 0.225, 0.381 and 0.576 s, where the batch of 0.5 s is found; a
    # busy machine polls later, never more often.
    assert 0.5 <= time.monotonic() - start < 3
    assert 2 <= api.count("GET", "/batch") <= 5
    assert len(batch) == 1
    timer.join()


def test_a_batch_that_is_ready_is_taken_with_one_request(api, client, tmp_path):
    client.register(make_registration())
    api.post_group(4)

    wait_for_batch(client, tmp_path, timeout_s=10)

    assert api.count("GET", "/batch") == 1


def test_the_pause_between_polls_is_capped(api, client, tmp_path):
    client.register(make_registration())

    with pytest.raises(AtroposDataTimeout):
        wait_for_batch(client, tmp_path, timeout_s=0.5, refresh_interval_s=0.05)
    # 0.5 s of pauses of 0.05 s are 10 polls and a last one; without the cap there are 5 (at 0, 0.1, 0.225, 0.381 and 0.5 s).
    assert 5 < api.count("GET", "/batch") <= 12


def test_progress_is_reported_with_the_status_and_the_likeliest_cause(api, client, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("trl_atropos.progress.REMINDER_INTERVAL_S", 0.2)
    caplog.set_level("INFO", logger="trl_atropos.data.sources")
    client.register(make_registration())
    api.post_group(3)

    with pytest.raises(AtroposDataTimeout):
        wait_for_batch(client, tmp_path, timeout_s=0.9, refresh_interval_s=0.02)
    reports = [record for record in caplog.records if "Waiting for a batch" in record.message]
    assert 1 <= len(reports) <= 4  # at most every 0.2 s in 0.9 s
    assert "current_step 0 and queue_size 1 (groups)" in reports[0].message
    assert reports[0].message.endswith("those of 3 do not pack. (group_sizes_do_not_pack)")


# No data


def test_a_timeout_without_any_data_names_what_the_api_shows_and_why_nothing_comes(client, tmp_path):
    client.register(make_registration(starting_step=5))

    with pytest.raises(AtroposDataTimeout) as caught:
        wait_for_batch(client, tmp_path, timeout_s=0.3)
    assert caught.value.what.startswith("No batch within 0.3 s from http://127.0.0.1:")
    assert "current_step 5 and queue_size 0 (groups), the registered batch_size is 4" in caught.value.what
    assert "No environment posts groups: none is started, it died" in caught.value.why
    assert "`no_environment` in docs/troubleshooting.md" in caught.value.fix


def test_a_timeout_of_zero_asks_once(api, client, tmp_path):
    client.register(make_registration())

    with pytest.raises(AtroposDataTimeout):
        wait_for_batch(client, tmp_path, timeout_s=0)
    assert api.count("GET", "/batch") == 1


# Registration


def test_another_trainers_max_token_len_is_refused_as_well(api, client):
    client.register(make_registration())

    with pytest.raises(AtroposRegistrationError, match="max_token_len 33, this trainer needs 4 and 65"):
        client.register(make_registration(max_token_len=65))


def test_a_registration_that_slips_in_between_is_found_by_reading_back():
    # Two trainers ask /info before either registers; the API tells both "success".
    infos = iter([b'{"batch_size": -1, "max_token_len": -1}', b'{"batch_size": 16, "max_token_len": 33}'])

    def answer(path: str) -> bytes:
        return answer_of(b'{"uuid": 1}' if path == "/register" else next(infos))

    with (
        client_of(answer) as (client, server),
        pytest.raises(AtroposRegistrationError, match="registered with batch_size 16"),
    ):
        client.register(make_registration())
    assert server.paths == ["/info", "/register", "/info"]


def test_an_answer_to_register_without_uuid_is_refused():
    info = b'{"batch_size": -1, "max_token_len": -1}'

    def answer(path: str) -> bytes:
        return answer_of(b'{"ok": true}' if path == "/register" else info)

    with client_of(answer) as (client, _), pytest.raises(AtroposProtocolError, match="without `uuid`"):
        client.register(make_registration())


# Nobody there


def test_a_refused_connection_says_that_nothing_is_lost(unused_url):
    with AtroposClient(unused_url) as client, pytest.raises(AtroposConnectionError) as caught:
        client.fetch_batch()

    assert caught.value.what.startswith(f"GET {unused_url}/batch reached nobody (ConnectionRefusedError")
    assert "Nothing was sent, so nothing is lost." in caught.value.why
    assert "run-api --port" in caught.value.fix
    assert isinstance(caught.value.__cause__, requests.exceptions.ConnectionError)


def test_a_host_that_does_not_exist_says_that_nothing_is_lost():
    with AtroposClient("http://no-such-host.invalid:8000") as client, pytest.raises(AtroposConnectionError) as caught:
        client.fetch_batch()

    assert "Nothing was sent, so nothing is lost." in caught.value.why


def test_a_connection_that_is_never_accepted_says_that_nothing_is_lost():
    # A full backlog: the kernel drops further connection requests, as a firewall does.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        with AtroposClient(url, connect_timeout_s=0.2) as client, pytest.raises(AtroposConnectionError) as caught:
            client.fetch_batch()
        for filler in fillers:
            filler.close()

    assert "Nothing was sent, so nothing is lost." in caught.value.why


def test_waiting_for_an_api_that_does_not_come_names_url_seconds_and_command(unused_url):
    start = time.monotonic()

    with AtroposClient(unused_url) as client, pytest.raises(AtroposConnectionError) as caught:
        client.wait_until_reachable(timeout_s=0.5)
    assert 0.5 <= time.monotonic() - start < 2
    assert caught.value.what == f"The Atropos API at {unused_url} did not answer within 0.5 s."
    assert "ConnectionRefusedError" in caught.value.why
    assert "run-api --port" in caught.value.fix


def test_waiting_for_an_api_that_stalls_ends_in_time_too():
    start = time.monotonic()

    with client_of(None) as (client, _):
        client.read_timeout_s = 600.0
        with pytest.raises(AtroposConnectionError, match=r"did not answer within 0\.3 s"):
            client.wait_until_reachable(timeout_s=0.3)
    assert time.monotonic() - start < 2


def test_waiting_for_an_api_that_comes_up_later(unused_url, caplog, monkeypatch):
    monkeypatch.setattr("trl_atropos.progress.REMINDER_INTERVAL_S", 0.2)
    caplog.set_level("INFO")
    port = int(unused_url.rsplit(":", 1)[1])
    answer = answer_of(b'{"batch_size": -1, "max_token_len": -1}')
    late: list[socket.socket] = []

    def come_up() -> None:
        with socket.create_server(("127.0.0.1", port)) as listener:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer)
            late.append(connection)

    timer = threading.Timer(0.5, come_up)
    timer.start()
    with AtroposClient(unused_url) as client:
        client.wait_until_reachable(timeout_s=10)
    timer.join()
    late[0].close()

    assert f"Waiting for the Atropos API at {unused_url}" in caplog.text


def test_another_service_on_the_port_is_named_at_once():
    start = time.monotonic()

    with (
        client_of(answer_of(b"nginx", status="404 Not Found")) as (client, _),
        pytest.raises(AtroposProtocolError, match=r"/info answered HTTP 404: nginx\. This is not how the Atropos"),
    ):
        client.wait_until_reachable(timeout_s=30)
    assert time.monotonic() - start < 5


# /batch is asked once, and the message says that a batch may be lost

LOST = "A batch may be lost: /batch gives each one away once."


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"", "RemoteDisconnected"),
        (b"HTT", "BadStatusLine|RemoteDisconnected"),
        # Without a Content-Length, what ends early is a whole answer with an empty body.
        (b"HTTP/1.1 200 OK\r\nContent-", "not JSON .JSONDecodeError"),
        (answer_of(b'{"batch": [{"tokens', length=1000), "IncompleteRead"),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"ba', "IncompleteRead|InvalidChunkLength"),
        (None, "(?i)timed? ?out"),
    ],
    ids=[
        "closes without an answer",
        "closes in the status",
        "closes in the headers",
        "closes in the body",
        "closes in a chunk",
        "stalls",
    ],
)
def test_an_answer_that_breaks_off_is_not_asked_for_again(answer, cause):
    with client_of(answer) as (client, server), pytest.raises(TrlAtroposError) as caught:
        client.fetch_batch()

    assert server.paths == ["/batch"]
    assert re.search(cause, caught.value.what)
    assert LOST in caught.value.why


def test_a_stall_in_the_middle_of_the_body_is_a_lost_batch():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        connections: list[socket.socket] = []

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(answer_of(b'{"batch": [', length=1000))
            connections.append(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        with AtroposClient(url, read_timeout_s=0.2) as client, pytest.raises(AtroposConnectionError) as caught:
            client.fetch_batch()
        thread.join()
        connections[0].close()

    assert LOST in caught.value.why


def test_a_broken_answer_to_a_harmless_request_loses_nothing():
    with client_of(b"") as (client, _), pytest.raises(AtroposConnectionError) as caught:
        client.status()

    assert "lost" not in str(caught.value)


def test_every_request_has_a_connection_of_its_own():
    # On a kept connection the second request would wait for good: this server reads one per connection.
    with (
        RawServer(lambda path: answer_of(b'{"batch": null}'), closes=False) as server,
        AtroposClient(server.base_url, read_timeout_s=10.0) as client,
    ):
        assert client.fetch_batch() is None
        assert client.fetch_batch() is None

    assert server.paths == ["/batch", "/batch"]


def test_a_redirect_is_not_followed():
    with (
        client_of(answer_of(b"", "307 Temporary Redirect", "Location: /batch\r\n")) as (client, server),
        pytest.raises(AtroposProtocolError, match="HTTP 307"),
    ):
        client.fetch_batch()

    assert server.paths == ["/batch"]


@pytest.mark.parametrize(
    "body",
    [b"<html>busy</html>", b"", b'{"batch": [', b"\xff\xfe", b'{"batch": ' + b"9" * 5000 + b"}"],
    ids=["html", "empty", "cut off", "not text", "an integer that Python refuses to read"],
)
def test_an_answer_that_is_not_json_is_a_protocol_error(body):
    with client_of(answer_of(body)) as (client, server), pytest.raises(AtroposProtocolError) as caught:
        client.fetch_batch()

    assert "answered something that is not JSON" in caught.value.what
    assert LOST in caught.value.why
    assert server.paths == ["/batch"]


def test_an_answer_that_is_not_what_its_encoding_says_is_a_protocol_error():
    with (
        client_of(answer_of(b"no gzip", headers="Content-Encoding: gzip\r\n")) as (client, _),
        pytest.raises(AtroposProtocolError, match="not JSON"),
    ):
        client.fetch_batch()


@pytest.mark.parametrize("body", [b"[]", b"null", b"{}", b'{"batch": []}', b'{"batch": {}}', b'{"batch": "x"}', b"3"])
def test_json_that_is_no_answer_of_batch_is_a_protocol_error(body):
    with client_of(answer_of(body)) as (client, _), pytest.raises(AtroposProtocolError, match="/batch answered"):
        client.fetch_batch()


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"batch_size": "4", "max_token_len": 1}', b'{"batch_size": true}'])
def test_json_that_is_no_answer_of_info_is_a_protocol_error(body):
    with (
        client_of(answer_of(body)) as (client, _),
        pytest.raises(AtroposProtocolError, match="without an integer `batch_size`"),
    ):
        client.info()


def test_a_long_answer_is_shortened_in_the_message():
    with (
        client_of(answer_of(b"x" * 100_000, status="404 Not Found")) as (client, _),
        pytest.raises(AtroposProtocolError) as caught,
    ):
        client.info()

    assert len(str(caught.value)) < 1000


# The URL


@pytest.mark.parametrize(
    "url", ["localhost:8000", "", "ftp://host", "http://", "http://host:port", "http://[::1", "/x"]
)
def test_something_that_is_no_url_is_found_before_any_request(url):
    with pytest.raises(PreflightError, match="The URL of the Atropos API is"):
        AtroposClient(url)


def test_an_api_on_this_machine_is_not_asked_through_a_proxy(api, monkeypatch):
    # Port 9: nobody listens there.
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    AtroposClient(api.base_url, connect_timeout_s=2.0).wait_until_reachable(5.0)
