"""The real atroposlib API, served by uvicorn in a thread on a free loopback port.

There is no fake API in this suite: what the trainer meets in production is what the tests talk to.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from atropos_api import AtroposApi, RequestRecorder, restart_api
from atroposlib.api.server import app

from trl_atropos.wire.client import AtroposClient


@pytest.fixture(scope="session")
def served_app() -> Iterator[tuple[str, RequestRecorder]]:
    recorder = RequestRecorder(app)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    # Failing requests are part of these tests: their tracebacks are not worth printing.
    server = uvicorn.Server(uvicorn.Config(recorder, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "uvicorn did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", recorder
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def api(served_app: tuple[str, RequestRecorder]) -> AtroposApi:
    """The API as right after `run-api`: nobody registered, nothing queued, no request counted."""
    base_url, recorder = served_app
    restart_api()
    recorder.requests.clear()
    return AtroposApi(base_url, recorder.requests)


@pytest.fixture
def client(api: AtroposApi) -> Iterator[AtroposClient]:
    with AtroposClient(api.base_url, read_timeout_s=10.0) as client:
        yield client


@pytest.fixture
def unused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
