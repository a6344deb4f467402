"""`trl-atropos api` as processes that are killed while environments post and a trainer fetches."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest
import requests
from atropos_api import make_group, make_registration
from trajectory_api import ROOT, ApiProcess


NUM_KILLS = 20
NUM_POSTERS = 4
NUM_ATTEMPTS = 3
"""Of BaseEnv, which waits up to 1 s and then up to 2 s between them."""

BROKEN = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)
"""Before the head of an answer, and after it."""


@pytest.fixture
def process(tmp_path):
    process = ApiProcess(tmp_path)
    yield process
    process.end()


def server_pid(url: str) -> int:
    return requests.get(f"{url}/healthz", timeout=10).json()["pid"]


class Poster(threading.Thread):
    """An environment: posts one group after the other, as BaseEnv does, and remembers which were taken."""

    def __init__(self, url: str, number: int, stop: threading.Event):
        super().__init__(daemon=True)
        self.url = url
        self.number = number
        self.stop = stop
        self.acknowledged: list[int] = []
        self.given_up: dict[int, tuple[float, float]] = {}
        """Serial -> when it was posted first, and last."""

    def run(self) -> None:
        rng = random.Random(self.number)
        serial = self.number * 1_000_000
        while not self.stop.is_set():
            serial += 1
            start = time.monotonic()
            if self.post(serial, rng):
                self.acknowledged.append(serial)
            else:
                self.given_up[serial] = (start, time.monotonic())

    def post(self, serial: int, rng: random.Random) -> bool:
        for attempt in range(NUM_ATTEMPTS):
            if attempt:
                time.sleep(rng.uniform(0, 2 ** (attempt - 1)))
            try:
                group = make_group(2, tokens=[[serial, 6, 7]] * 2)
                if requests.post(f"{self.url}/scored_data", json=group, timeout=30).status_code == 200:
                    return True
            except BROKEN:
                continue
        return False


class Trainer(threading.Thread):
    """A trainer that journals what it fetched, and now and then forgets it before that: it was killed and started again."""

    def __init__(self, url: str, stop: threading.Event):
        super().__init__(daemon=True)
        self.url = url
        self.stop = stop
        self.journal: list[list[int]] = []
        self.num_forgotten = 0

    def run(self) -> None:
        rng = random.Random(99)
        while True:
            query: dict[str, Any] = {"trainer": "journal", "number": len(self.journal)}
            try:
                batch = requests.get(f"{self.url}/batch", params=query, timeout=30).json()["batch"]
            except BROKEN:
                continue
            if batch is None:
                if self.stop.is_set():
                    return
                time.sleep(0.01)
            elif rng.random() < 0.1:
                self.num_forgotten += 1
            else:
                self.journal.append([group["tokens"][0][0] for group in batch])


def test_every_acknowledged_group_is_trained_once_whenever_the_api_is_killed(process, tmp_path):
    url = process.url
    assert requests.post(f"{url}/register", json=asdict(make_registration(batch_size=8)), timeout=10).ok
    stop_posting, stop_training = threading.Event(), threading.Event()
    posters = [Poster(url, number + 1, stop_posting) for number in range(NUM_POSTERS)]
    trainer = Trainer(url, stop_training)
    for thread in (*posters, trainer):
        thread.start()
    rng = random.Random(0)
    recovery_s = []
    nobody_listens: list[tuple[float, float]] = []
    for kill in range(NUM_KILLS):
        pid = server_pid(url)
        time.sleep(rng.uniform(0.02, 0.3))
        start = time.monotonic()
        if kill % 10 == 9:
            # The process that listens, too: nobody takes connections until the command is started again.
            process.process.kill()
            process.process.wait()
            _wait_until_gone(pid)
            process.restart()
        else:
            os.kill(pid, signal.SIGKILL)
        while True:
            try:
                if server_pid(url) != pid:
                    break
            except requests.ConnectionError:
                assert time.monotonic() - start < 30, process.log.read_text()[-2000:]
                time.sleep(0.01)
        if kill % 10 == 9:
            nobody_listens.append((start, time.monotonic()))
        else:
            recovery_s.append(time.monotonic() - start)
    stop_posting.set()
    for poster in posters:
        poster.join(timeout=60)
    # What does not fill a batch at the end stays in the queue.
    stop_training.set()
    trainer.join(timeout=60)
    assert not trainer.is_alive()
    left = requests.get(f"{url}/status", timeout=10).json()["queue_size"]

    trained = Counter(serial for batch in trainer.journal for serial in batch)
    acknowledged = {serial for poster in posters for serial in poster.acknowledged}
    assert len(acknowledged) > 10 * NUM_KILLS
    assert max(trained.values()) == 1
    assert left < 4
    assert len(acknowledged - trained.keys()) <= left
    given_up = {serial: times for poster in posters for serial, times in poster.given_up.items()}
    assert trained.keys() <= acknowledged | given_up.keys()
    # Who lost the server only, and not the listening process, does not run out of attempts; three kills may hit one post.
    overlaps = [
        any(first < end and start < last for start, end in nobody_listens) for first, last in given_up.values()
    ]
    assert overlaps.count(False) <= 2
    assert trainer.num_forgotten > 0
    assert max(recovery_s) < 5.0, recovery_s


def _wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 15
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_environment_does_not_notice_that_the_server_was_killed(process):
    url = process.url
    assert requests.post(f"{url}/register", json=asdict(make_registration()), timeout=10).ok
    requests.get(f"{url}/batch", timeout=10)
    body = {"max_token_length": 32, "desired_name": "env", "weight": 1.0, "group_size": 2}
    assert requests.post(f"{url}/register-env", json=body, timeout=10).json()["env_id"] == 0
    os.kill(server_pid(url), signal.SIGKILL)
    # No retry: the connection waits until somebody answers.
    status = requests.get(f"{url}/status-env", json={"env_id": 0}, timeout=10)
    assert status.json()["env_weight"] == 1.0


def test_the_command_ends_with_its_server_and_gives_the_database_free(process, tmp_path):
    pid = server_pid(process.url)
    assert process.end() == 0
    assert not os.path.exists(f"/proc/{pid}")
    process.restart()
    assert server_pid(process.url) != pid


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trl_atropos.cli.main", "api", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_second_command_on_the_same_database_or_port_is_refused(process, tmp_path):
    refused = run_command("--db", str(tmp_path / "api.db"), "--port", "0")
    assert refused.returncode == 1 and "Another trajectory API, process" in refused.stderr
    refused = run_command("--db", str(tmp_path / "other.db"), "--port", str(process.port))
    assert refused.returncode == 1 and "cannot listen on 127.0.0.1" in refused.stderr


def test_a_damaged_database_ends_the_command_and_can_be_set_aside(tmp_path):
    database = tmp_path / "api.db"
    database.write_bytes(b"\x07" * 100_000)
    refused = run_command("--db", str(database), "--port", "0")
    assert refused.returncode == 1 and "It was not changed." in refused.stderr
    process = ApiProcess(tmp_path, "--if_damaged", "set_aside")
    try:
        assert (tmp_path / "api.db.damaged-1").read_bytes() == b"\x07" * 100_000
        assert "It is kept as" in process.log.read_text()
    finally:
        process.end()


def test_inspect_shows_what_a_database_holds_while_it_is_served(process, tmp_path):
    url = process.url
    assert requests.post(f"{url}/register", json=asdict(make_registration(batch_size=2)), timeout=10).ok
    for _ in range(3):
        assert requests.post(f"{url}/scored_data", json=make_group(2), timeout=10).ok
    requests.get(f"{url}/batch", params={"trainer": "a", "number": 4}, timeout=10)

    shown = run_command("inspect", str(tmp_path / "api.db"))

    assert shown.returncode == 0, shown.stderr
    state = json.loads(shown.stdout)
    assert state["queue"]["num_groups"] == 2 and state["queue"]["num_rollouts"] == 4
    assert (state["registration"]["batch_size"], state["current_step"]) == (2, 1)
    (lease,) = state["leases"]
    assert (lease["trainer"], lease["number"], lease["num_groups"]) == ("a", 4, 1)
    assert state["oldest_group_age_s"] >= 0
    assert state["environments"] == []
    assert run_command("inspect", str(tmp_path / "none.db")).returncode == 1


def test_a_key_file_must_hold_a_key(tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text("\n")
    refused = run_command("--db", str(tmp_path / "api.db"), "--api_key_file", str(key_file))
    assert refused.returncode == 1 and "is empty" in refused.stderr
