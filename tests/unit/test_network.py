"""What is asked through a proxy and what is not, and how servers listen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import requests

import trl_atropos
from trl_atropos.network import is_this_machine, listening_socket, proxies_for


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("api.localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("0.0.0.0", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("example.com", False),
        ("", False),
    ],
)
def test_this_machine_is_known_by_name_and_address(host, expected):
    assert is_this_machine(host) is expected


@pytest.mark.parametrize(
    ("url", "proxy"),
    [("http://127.0.0.1:8000/x", None), ("http://[::1]:8000", None), ("http://api.example:8000", "http://proxy:1")],
)
def test_requests_takes_the_proxy_of_the_environment_for_other_machines_only(monkeypatch, url, proxy):
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    settings = requests.Session().merge_environment_settings(url, proxies_for(url), None, None, None)
    assert settings["proxies"].get("http") == proxy


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_of_a_server_send_at_once(host):
    with listening_socket(host, 0, backlog=1) as listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_no_server_opens_its_socket_in_another_way():
    package = Path(trl_atropos.__file__).parent
    files = [path.relative_to(package) for path in package.rglob("*.py") if "create_server(" in path.read_text()]
    assert files == [Path("network.py")]
