"""How requests reach the vLLM server: once, until a deadline, with the right key, by the right way."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from client_cases import API_KEY, CONTROL_POSTS, DEADLINE_S, INHERITED, QUESTIONS, SLACK_S, every
from scripted_server import ScriptedServer

from trl_atropos.errors import VLLMServerUnreachable, WeightSyncError, WeightSyncTimeout
from trl_atropos.weight_sync.client import AtroposVLLMClient


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def client(server: ScriptedServer) -> AtroposVLLMClient:
    client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=20, api_key=API_KEY)
    server.requests.clear()
    return client


class TestOnce:
    @pytest.mark.parametrize("action", [500, 503, "close", "reset", "stall", "dribble", "dribble headers", "redirect"])
    @every(CONTROL_POSTS)
    def test_a_control_request_is_sent_exactly_once(self, client, server, case, action):
        client.request_timeout = DEADLINE_S
        server.script[case.route] = action
        with pytest.raises(WeightSyncError):
            case.call(client)
        assert server.routes == [case.route]

    @pytest.mark.parametrize("action", [500, "close", "stall"])
    @every(INHERITED)
    def test_so_is_what_trl_sends_itself(self, client, server, case, action):
        client.request_timeout = DEADLINE_S
        server.script[case.route] = action
        with pytest.raises(WeightSyncError):
            case.call(client)
        assert server.routes == [case.route]

    def test_a_connection_that_the_server_closes_while_it_idles_is_never_used_again(self, client, server):
        # The server lets the second request on any connection die, which is what vLLM's closing it looks like at worst.
        with requests.Session() as session:
            session.get(f"{server.base_url}/is_paused")
            with pytest.raises(requests.exceptions.ConnectionError):
                session.post(f"{server.base_url}/pause")
        for _ in range(3):
            client.pause()
            client.resume()

    def test_a_redirect_is_not_followed(self, client, server):
        server.script["GET /weight_info"] = "redirect"
        with pytest.raises(WeightSyncError, match="answered 307 and refers to '/weight_info'"):
            client.get_weight_version()
        assert server.routes == ["GET /weight_info"]


class _full_listener:
    """Listens on the port of a stopped server and accepts nothing."""

    def __init__(self, url: str):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        self.socket.listen(1)

    def __enter__(self) -> _full_listener:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.socket.close()


class TestDeadline:
    @pytest.mark.parametrize("action", ["stall", "dribble", "dribble headers"])
    @every([*CONTROL_POSTS[:1], *QUESTIONS[-1:], *INHERITED[:1]])
    def test_of_the_whole_request(self, client, server, case, action):
        client.request_timeout = DEADLINE_S
        server.script[case.route] = action
        start = time.monotonic()
        with pytest.raises(
            WeightSyncTimeout, match=rf"{case.route} of the vLLM server .* within {DEADLINE_S} s"
        ) as caught:
            case.call(client)
        assert DEADLINE_S <= time.monotonic() - start < DEADLINE_S + SLACK_S
        assert isinstance(caught.value, TimeoutError)
        assert "--weight_sync_timeout" in caught.value.fix

    def test_an_answer_that_comes_in_time_is_read_to_its_end(self, client, server):
        server.script["GET /v1/models"] = {"data": [{"id": "m" * 2_000_000}]}
        assert client.list_models() == ["m" * 2_000_000]

    def test_a_connection_that_is_never_accepted(self, server):
        client = AtroposVLLMClient(server.base_url, connection_timeout=5, request_timeout=DEADLINE_S)
        # The kernel completes connections up to the backlog by itself; nobody reads what is sent.
        server.stop()
        with _full_listener(server.base_url):
            start = time.monotonic()
            with pytest.raises(WeightSyncTimeout):
                client.pause()
            assert time.monotonic() - start < DEADLINE_S + SLACK_S

    def test_ends_only_the_request_that_is_late(self, client, server):
        server.script["POST /pause"] = "dribble"
        server.state.is_paused = True
        answers: list[Any] = []

        def score() -> None:
            answers.append(client.get_prompt_logprobs([[1, 2]]))

        waiting = threading.Thread(target=score)
        waiting.start()
        client.request_timeout = DEADLINE_S
        with pytest.raises(WeightSyncTimeout):
            client.pause()
        client.resume()
        waiting.join(SLACK_S)
        # The scripted server answers -1 for every token.
        assert answers == [[[-1.0]]]

    def test_leaves_no_thread(self, client, server):
        client.request_timeout = DEADLINE_S
        server.script["POST /pause"] = "stall"
        with pytest.raises(WeightSyncTimeout):
            client.pause()
        client.resume()
        assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


class TestUnreachable:
    @pytest.mark.parametrize("action", ["close", "reset", "die"])
    def test_a_connection_that_breaks(self, client, server, action):
        server.script["POST /update_weights"] = action
        with pytest.raises(VLLMServerUnreachable, match="POST /update_weights") as caught:
            client.update_weights({})
        assert isinstance(caught.value, ConnectionError)
        arrived = pickle.loads(pickle.dumps(caught.value))
        assert (type(arrived), str(arrived)) == (VLLMServerUnreachable, str(caught.value))

    def test_a_server_that_is_gone_and_comes_back(self, client, server):
        client.set_weight_version("3")
        server.script["POST /pause"] = "answer and die"
        client.pause()
        with pytest.raises(VLLMServerUnreachable):
            client.get_weight_version()
        server.restart()
        client.wait_until_healthy(5)
        assert (client.get_weight_version(), client.is_paused()) == ("default", False)


class TestEnvironment:
    @pytest.fixture
    def netrc(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ScriptedServer) -> None:
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        # requests itself obeys it.
        requests.get(f"{server.base_url}/is_paused")
        assert server.requests.pop().headers["Authorization"].startswith("Basic ")

    @pytest.mark.usefixtures("netrc")
    def test_netrc_does_not_replace_the_key(self, client, server):
        client.pause()
        assert server.requests[-1].headers["Authorization"] == f"Bearer {API_KEY}"

    @pytest.mark.usefixtures("netrc")
    def test_netrc_is_not_sent_in_the_place_of_no_key(self, server):
        AtroposVLLMClient(server.base_url, connection_timeout=5).pause()
        assert not any("Authorization" in request.headers for request in server.requests)

    @pytest.fixture
    def no_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.usefixtures("no_proxy")
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
    def test_this_machine_is_not_asked_for_through_a_proxy(self, server, monkeypatch, host):
        with ScriptedServer() as proxy:
            monkeypatch.setenv("http_proxy", proxy.base_url)
            AtroposVLLMClient(server.base_url.replace("127.0.0.1", host), connection_timeout=5).pause()
            assert proxy.requests == []
        assert server.routes[-1] == "POST /pause"

    @pytest.mark.usefixtures("no_proxy")
    def test_other_hosts_are_and_the_deadline_holds(self, server, monkeypatch):
        monkeypatch.setenv("http_proxy", server.base_url)
        # No resolver knows this name: only a proxy can answer for it.
        client = AtroposVLLMClient("http://vllm.invalid:8000", connection_timeout=5, api_key=API_KEY)
        client.pause()
        assert server.requests[-1].headers["Host"] == "vllm.invalid:8000"
        assert server.requests[-1].headers["Authorization"] == f"Bearer {API_KEY}"
        client.request_timeout = DEADLINE_S
        server.script["POST /resume"] = "dribble headers"
        with pytest.raises(WeightSyncTimeout):
            client.resume()
