"""`trl-atropos api` over HTTP: what it does beyond atroposlib's API, and what happens when somebody goes away."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import requests
from atropos_api import make_group, make_registration
from trajectory_api import served

from trl_atropos.api.app import TrajectoryApp
from trl_atropos.api.metrics import METRICS, PREFIX
from trl_atropos.api.options import ApiOptions
from trl_atropos.api.refusals import ApiDatabaseError


class Client:
    """Environments and trainers, by their requests."""

    def __init__(self, url: str):
        self.url = url

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=10, **arguments)

    def post(self, path: str, body: Any, **arguments: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=10, **arguments)

    def register(self, batch_size: int = 2) -> None:
        assert self.post("/register", asdict(make_registration(batch_size=batch_size))).status_code == 200

    def post_group(self, serial: int, **fields: Any) -> requests.Response:
        return self.post("/scored_data", numbered(serial, **fields))

    def take(self, **query: Any) -> list[int] | None:
        """Serials of the groups of the next batch; None if there is none."""
        batch = self.get("/batch", params=query).json()["batch"]
        return None if batch is None else [group["tokens"][0][0] for group in batch]

    def queue_size(self) -> int:
        return self.get("/status").json()["queue_size"]


def numbered(serial: int, num_rollouts: int = 2, **fields: Any) -> dict[str, Any]:
    return make_group(num_rollouts, tokens=[[serial, 6, 7]] * num_rollouts, **fields)


@pytest.fixture
def options(tmp_path: Path) -> ApiOptions:
    return ApiOptions(db=tmp_path / "api.db", hold_s=0.2)


@pytest.fixture
def api(options: ApiOptions) -> Iterator[tuple[Client, TrajectoryApp]]:
    with served(options) as (url, app):
        client = Client(url)
        client.register()
        yield client, app


@pytest.fixture
def client(api: tuple[Client, TrajectoryApp]) -> Client:
    return api[0]


def test_batches_come_oldest_first_and_one_at_a_time(client):
    for serial in range(4):
        assert client.post_group(serial).json() == {"status": "received"}
    assert client.get("/status").json() == {"current_step": 0, "queue_size": 4}
    assert [client.take() for _ in range(5)] == [[0], [1], [2], [3], None]
    assert client.get("/status").json() == {"current_step": 4, "queue_size": 0}


def test_everything_survives_a_restart_and_nobody_registers_again(options):
    with served(options) as (url, _):
        client = Client(url)
        client.register(4)
        assert client.take() is None
        environment = {"max_token_length": 32, "desired_name": "env", "weight": 1.0, "group_size": 4}
        assert client.post("/register-env", environment).json()["wandb_name"] == "env_0"
        client.post_group(1, num_rollouts=4, env_id=0)
        client.post_group(2, num_rollouts=2, env_id=0)
        client.post_group(3, num_rollouts=4)
        assert client.take() == [1]
        before = [client.get(path).json() for path in ("/info", "/status", "/wandb_info", "/latest_example")]
        of_environment = client.get("/status-env", json={"env_id": 0}).json()
    with served(options) as (url, _):
        client = Client(url)
        assert [client.get(path).json() for path in ("/info", "/status", "/wandb_info", "/latest_example")] == before
        assert client.get("/status-env", json={"env_id": 0}).json() == of_environment
        assert client.post("/register-env", environment).json()["wandb_name"] == "env_1"
        # The other half of what waits in the buffer.
        assert client.post_group(4, num_rollouts=2, env_id=0).json() == {"status": "buffered", "buffer_size": 0}
        assert [client.take() for _ in range(3)] == [[3], [2, 4], None]


def test_a_registration_with_other_sizes_counts(client):
    client.post_group(1)
    client.post_group(2)
    client.register(4)
    assert client.get("/info").json() == {"batch_size": 4, "max_token_len": 33}
    assert client.take() == [1, 2]


def test_a_batch_of_size_0_cannot_be_registered(client):
    answer = client.post("/register", asdict(make_registration(batch_size=0)))
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "batch_size"]


# Answers in the forms that clients accept


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("query", [{}, {"trainer": "t", "number": 0}])
def test_a_batch_arrives_whole_in_any_encoding(client, encoding, query):
    client.register(4)
    long, short = numbered(1, images="x" * 5000), numbered(2)
    client.post("/scored_data", long)
    client.post("/scored_data", short)

    answer = client.get("/batch", params=query, headers={"Accept-Encoding": encoding})

    assert answer.headers.get("Content-Encoding") == ("gzip" if encoding == "gzip" else None)
    for group, posted in zip(answer.json()["batch"], (long, short), strict=True):
        assert {name: group[name] for name in posted} == posted
        if not query or encoding == "identity":
            # As atroposlib: trainers of others may read any of these.
            assert set(group) == {
                *("tokens", "masks", "scores", "advantages", "ref_logprobs", "messages", "generation_params"),
                *("inference_logprobs", "overrides", "group_overrides", "images", "env_id"),
                *("distill_token_ids", "distill_logprobs"),
            }


def test_long_answers_are_compressed_and_short_ones_are_not(client):
    assert "Content-Encoding" not in client.get("/info").headers
    client.post_group(1, images="x" * 2000)
    assert client.get("/latest_example").headers["Content-Encoding"] == "gzip"
    assert client.get("/latest_example").json()["images"] == "x" * 2000


# Receipts


def test_a_batch_without_a_receipt_comes_again_to_its_trainer_only(client):
    for serial in range(4):
        client.post_group(serial)
    assert client.take(trainer="a", number=0) == [0]
    assert client.take(trainer="b", number=0) == [1]
    assert client.take(trainer="a", number=0) == [0]
    assert client.take() == [2]
    # To ask for the next one is a receipt, too.
    assert client.take(trainer="a", number=1) == [3]
    assert client.post("/acknowledge", {"trainer": "b", "number": 0}).json() == {"status": "success"}
    assert client.take(trainer="b", number=1) is None
    assert client.get("/status").json() == {"current_step": 4, "queue_size": 0}


def test_a_batch_without_a_receipt_comes_again_after_a_restart(options):
    with served(options) as (url, _):
        client = Client(url)
        client.register(4)
        client.post_group(1)
        client.post_group(2)
        assert client.take(trainer="a", number=5) == [1, 2]
    with served(options) as (url, _):
        client = Client(url)
        assert client.take(trainer="b", number=0) is None
        assert client.take(trainer="a", number=5) == [1, 2]
        assert client.take(trainer="a", number=6) is None
    with served(options) as (url, _):
        assert Client(url).take(trainer="a", number=5) is None


def test_a_receipt_may_come_twice(client):
    client.post_group(1)
    assert client.take(trainer="a", number=0) == [1]
    for _ in range(2):
        assert client.post("/acknowledge", {"trainer": "a", "number": 0}).status_code == 200
    assert client.take(trainer="a", number=0) is None


def test_a_batch_of_another_size_returns_to_the_head_of_the_queue(client):
    for serial in range(3):
        client.post_group(serial)
    assert client.take(trainer="a", number=0) == [0]
    client.register(4)
    assert client.take(trainer="a", number=0) == [0, 1]


def test_a_trainer_that_is_silent_for_long_loses_its_batch_and_is_told_so(options):
    with served(replace(options, lease_timeout_s=0.0)) as (url, _):
        client = Client(url)
        client.register()
        client.post_group(1)
        assert client.take(trainer="a", number=0) == [1]
        assert client.take(trainer="b", number=0) == [1]
        for answer in (
            client.post("/acknowledge", {"trainer": "a", "number": 0}),
            client.get("/batch", params={"trainer": "a", "number": 1}),
        ):
            assert answer.status_code == 409
            assert "Batch 0 of trainer a was given to others" in answer.json()["detail"]
    with served(options) as (url, _):
        client = Client(url)
        assert client.get("/batch", params={"trainer": "a", "number": 1}).status_code == 409
        # Who asks for it again has not trained it.
        assert client.take(trainer="a", number=0) is None
        assert client.take(trainer="a", number=1) is None


def test_a_trainer_names_itself_and_its_batch_or_neither(client):
    for query in ({"trainer": "a"}, {"number": 1}, {"trainer": "a", "number": "x"}, {"trainer": "", "number": 0}):
        assert client.get("/batch", params=query).status_code == 422


def test_a_batch_whose_trainer_broke_the_connection_is_put_back(options):
    with served(options) as (url, app):
        client = Client(url)
        client.register()
        # More than the buffers of the connection take.
        noise = [[float(number) for number in range(100_000)] for _ in range(20)]
        client.post_group(1, images=noise)
        client.post_group(2)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /batch HTTP/1.1\r\nHost: test\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        deadline = time.monotonic() + 10
        assert app.service is not None
        while not app.service.counts.num_batches_put_back:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert client.get("/status").json() == {"current_step": 0, "queue_size": 2}
        assert client.take() == [1]
        assert client.take() == [2]


# Posts that come again


def test_a_post_whose_answer_was_lost_is_stored_once_when_it_comes_again(api):
    client, app = api
    assert app.service is not None
    body = json.dumps(numbered(1)).encode()
    entered, go_on = threading.Event(), threading.Event()

    def hold(_connection: Any) -> None:
        entered.set()
        assert go_on.wait(10)

    app._store.submit(hold)
    assert entered.wait(10)
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /scored_data HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        deadline = time.monotonic() + 10
        while not app.service._posts._posts:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    go_on.set()
    deadline = time.monotonic() + 10
    while not any(post.client_is_gone for posts in app.service._posts._posts.values() for post in posts):
        assert time.monotonic() < deadline
        time.sleep(0.005)

    assert client.post_group(1).json() == {"status": "received"}

    assert client.queue_size() == 1
    assert app.service.counts.num_posts_repeated == 1
    # Its answer arrived: from here on the same group is another one.
    client.post_group(1)
    assert client.queue_size() == 2


def test_the_last_posts_before_a_restart_are_recognised_once(options):
    with served(options) as (url, _):
        client = Client(url)
        client.register()
        client.post_group(1)
        client.post("/scored_data_list", [numbered(2), numbered(3)])
        assert client.take() == [1]
    with served(options) as (url, _):
        client = Client(url)
        # Also what was handed out since.
        assert client.post_group(1).json() == {"status": "received"}
        assert client.post("/scored_data_list", [numbered(2), numbered(3)]).json()["status"] == "received"
        assert client.queue_size() == 2
        client.post_group(1)
        assert client.queue_size() == 3


def test_the_same_group_twice_is_two_groups(client):
    client.post_group(1)
    client.post_group(1)
    assert client.queue_size() == 2


# Limits


def test_a_full_queue_holds_a_post_and_turns_it_away_in_the_end(options):
    size = len(json.dumps(numbered(1)))
    with served(replace(options, max_queue_bytes=3 * size + 10, hold_s=0.3)) as (url, _):
        client = Client(url)
        client.register()
        for serial in range(3):
            assert client.post_group(serial).status_code == 200
        start = time.monotonic()
        answer = client.post_group(3)
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "10"
        assert time.monotonic() - start >= 0.3
        assert "The queue holds 3 groups" in answer.json()["detail"]
        assert "--max_queue_bytes" in answer.json()["detail"]
        assert client.post_group(4, images="x" * 4 * size).status_code == 413
        # A receipt makes room, and who waits gets it.
        assert client.take(trainer="a", number=0) == [0]
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(client.post_group(3).status_code))
        thread.start()
        assert client.post("/acknowledge", {"trainer": "a", "number": 0}).status_code == 200
        thread.join(timeout=10)
        assert answers == [200]
        assert client.queue_size() == 3


def test_an_environment_has_its_own_share(options):
    size = len(json.dumps(numbered(1, env_id=0)))
    with served(replace(options, max_env_queue_bytes=2 * size + 10)) as (url, _):
        client = Client(url)
        client.register()
        assert [client.post_group(1, env_id=0).status_code for _ in range(3)] == [200, 200, 503]
        assert client.post_group(1, env_id=1).status_code == 200
        assert client.post_group(1).status_code == 200


def test_a_number_of_groups_is_a_limit_too(options):
    with served(replace(options, max_queue_groups=2)) as (url, _):
        client = Client(url)
        client.register()
        assert [client.post_group(serial).status_code for serial in range(3)] == [200, 200, 503]


def test_large_bodies_and_bombs_are_refused(options):
    with served(replace(options, max_body_bytes=2000, max_unpacked_bytes=5000)) as (url, _):
        client = Client(url)
        client.register()
        assert client.post_group(1, images="x" * 3000).status_code == 413
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        bomb = gzip.compress(json.dumps(numbered(1, images="x" * 100_000)).encode())
        assert len(bomb) < 2000
        answer = client.get("/")
        for body, status in ((bomb, 413), (b"no gzip", 400)):
            answer = requests.post(f"{url}/scored_data", data=body, headers=headers, timeout=10)
            assert answer.status_code == status
        # Without a Content-Length.
        answer = requests.post(f"{url}/scored_data", data=iter([b"x" * 1500] * 4), timeout=10)
        assert answer.status_code == 413
        assert client.post("/register", {"wandb_group": "x" * 100_000}).status_code == 413
        assert client.queue_size() == 0


def test_a_refused_post_says_why_and_is_counted(client):
    answer = client.post_group(1, scores=[1.0])
    assert answer.status_code == 422
    (detail,) = answer.json()["detail"]
    assert detail["loc"] == ["body", "scores"]
    assert detail["msg"].startswith("`scores` has 1 entries, `tokens` has 2 rollouts.")
    assert f"{PREFIX}posts_refused_total 1\n" in client.get("/metrics").text


# What others see, and who may


def test_metrics_have_a_line_and_a_help_each(client):
    client.post_group(1)
    client.take(trainer="a", number=0)
    client.post_group(2)
    text = client.get("/metrics").text
    names = [line.split()[0].removeprefix(PREFIX) for line in text.splitlines() if not line.startswith("#")]
    assert names == list(METRICS)
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert values[f"{PREFIX}queue_groups"] == "1"
    assert values[f"{PREFIX}unacknowledged_batches"] == "1"
    assert values[f"{PREFIX}groups_received_total"] == "2"
    assert float(values[f"{PREFIX}resident_memory_bytes"]) > 2**20


def test_health_follows_the_disk(api):
    client, app = api
    assert client.get("/healthz").json()["status"] == "ok"
    app._store.submit(lambda connection: connection.execute("PRAGMA max_page_count = 10").fetchall()).result()
    answer = client.post_group(1, images=[[number * 7919 % 1009 for number in range(300_000)]])
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "10"
    assert "disk is full" in answer.json()["detail"]
    assert client.get("/healthz").status_code == 503
    assert client.take() is None
    assert client.post_group(2).status_code == 200
    assert client.get("/healthz").status_code == 200
    assert client.take() == [2]


def test_a_key_is_asked_of_every_route(options):
    with served(replace(options, api_key="secret")) as (url, _):
        assert {
            path: requests.get(url + path, timeout=10).status_code
            for path in ("/", "/info", "/batch", "/healthz", "/metrics", "/nothing")
        } == dict.fromkeys(("/", "/info", "/batch", "/healthz", "/metrics", "/nothing"), 401)
        for headers, status in (
            ({"Authorization": "Bearer secret"}, 200),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Basic ?"}, 401),
        ):
            assert requests.get(f"{url}/info", headers=headers, timeout=10).status_code == status
        # As an environment gives it that knows of no keys: in the URL.
        with_key = url.replace("http://", "http://env:secret@")
        assert requests.post(f"{with_key}/scored_data", json=numbered(1), timeout=10).status_code == 200


def test_pages_of_the_web_are_not_answered(client):
    client.post_group(1)
    for headers in ({"Origin": "https://example.org"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.get("/reset_data", headers=headers).status_code == 403
    assert client.queue_size() == 1


def test_an_open_database_is_not_served_twice(api, options):
    with pytest.raises(ApiDatabaseError, match="has the database"):
        TrajectoryApp(options)


def test_a_reset_forgets_everything_and_posts_go_on(client):
    client.post_group(1)
    assert client.get("/reset_data").text == "Reset successful"
    assert client.get("/status").json() == {"current_step": 0, "queue_size": 0}
    client.post_group(2)
    client.register()
    assert client.take() == [2]


def test_a_buffer_that_cannot_be_emptied_takes_no_more(client, monkeypatch):
    monkeypatch.setattr("trl_atropos.api.service.MAX_BUFFERED_GROUPS", 2)
    client.take()
    client.post("/register-env", {"max_token_length": 32, "desired_name": "env", "weight": 1.0, "group_size": 4})
    answers = [client.post_group(serial, num_rollouts=3, env_id=0) for serial in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 422]
    assert "group_size 4" in answers[-1].json()["detail"][0]["msg"]
    assert client.post_group(5, num_rollouts=4, env_id=0).json() == {"status": "received"}
