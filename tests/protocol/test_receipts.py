"""The trainer's side of `trl-atropos api`: what it fetched and did not write down comes again, and nothing else does."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from atropos_api import AtroposApi, make_registration
from trajectory_api import ROOT, ApiProcess, served

from trl_atropos.api.options import ApiOptions
from trl_atropos.checks.api import API_CHECKS, inspect_api
from trl_atropos.checks.finding import diagnose
from trl_atropos.data.options import DataOptions
from trl_atropos.data.sources import ApiBatches
from trl_atropos.errors import AtroposBatchGivenAway, AtroposConnectionError, AtroposProtocolError
from trl_atropos.report.metric_help import METRICS
from trl_atropos.types import Position
from trl_atropos.wire.api_watch import ApiWatch
from trl_atropos.wire.client import AtroposClient
from trl_atropos.wire.journal import Journal


OPTIONS = DataOptions(batch_timeout_s=10.0, refresh_interval=0.1, api_timeout_s=5.0)


@pytest.fixture
def options(tmp_path: Path) -> ApiOptions:
    return ApiOptions(db=tmp_path / "api.db")


@pytest.fixture
def api(options: ApiOptions) -> Iterator[AtroposApi]:
    with served(options) as (url, _):
        yield AtroposApi(url, [])


@pytest.fixture
def client(api: AtroposApi) -> Iterator[AtroposClient]:
    with AtroposClient(api.base_url, read_timeout_s=10.0) as client:
        client.register(make_registration(batch_size=2))
        yield client


def post(api: AtroposApi, *serials: int) -> None:
    for serial in serials:
        assert api.post_group(2, tokens=[[serial, 6, 7]] * 2).status_code == 200


def source(client: AtroposClient, directory: Path) -> ApiBatches:
    return ApiBatches(client, Journal(directory), OPTIONS, lambda: client.register(make_registration(batch_size=2)))


def serials(groups: list[dict[str, Any]]) -> list[int]:
    return [group["tokens"][0][0] for group in groups]


def journaled(directory: Path) -> list[int]:
    return [serial for batch in Journal(directory).batches() for serial in serials(batch.raw_groups)]


def leases(api: AtroposApi) -> str:
    (line,) = [
        line
        for line in api.get("/metrics").text.splitlines()
        if line.startswith("trl_atropos_api_unacknowledged_batches ")
    ]
    return line.split()[1]


def test_the_client_finds_out_which_api_it_talks_to(client, served_app):
    assert client.keeps_batches
    with AtroposClient(served_app[0]) as other:
        other.info()
        assert not other.keeps_batches


def test_a_batch_is_acknowledged_once_it_is_in_the_journal(api, client, tmp_path):
    post(api, 1, 2)
    batches = iter(source(client, tmp_path / "journal"))
    assert serials(next(batches).raw_groups) == [1]
    assert leases(api) == "0"
    assert serials(next(batches).raw_groups) == [2]
    assert journaled(tmp_path / "journal") == [1, 2]


def test_what_was_fetched_and_not_written_comes_again_to_the_same_journal(api, client, tmp_path):
    post(api, 1, 2)
    journal = Journal(tmp_path / "journal")
    assert serials(client.fetch_batch(journal.trainer_id(), journal.next_batch) or []) == [1]
    # Killed here; another trainer comes before it is back.
    other = iter(source(client, tmp_path / "other"))
    assert serials(next(other).raw_groups) == [2]

    batches = source(client, tmp_path / "journal")
    batches.confirm_journal()
    fetched = next(iter(batches))

    assert (serials(fetched.raw_groups), fetched.position) == ([1], Position(0, 0))
    assert leases(api) == "0"


def test_what_was_written_and_not_acknowledged_is_not_fetched_again(api, client, tmp_path):
    post(api, 1, 2)
    journal = Journal(tmp_path / "journal")
    journal.append(client.fetch_batch(journal.trainer_id(), 0) or [])
    assert leases(api) == "1"
    # Killed here.
    batches = source(client, tmp_path / "journal")
    batches.confirm_journal()
    assert leases(api) == "0"
    assert serials(next(iter(batches)).raw_groups) == [2]
    assert journaled(tmp_path / "journal") == [1, 2]


@pytest.mark.parametrize("num_before", [0, 1])
def test_half_a_batch_in_the_journal_is_taken_out_and_fetched_whole(api, client, tmp_path, caplog, num_before):
    directory = tmp_path / "journal"
    client.register(make_registration(batch_size=6))
    post(api, *range(3 * num_before + 3))
    batches = source(client, directory)
    for _ in range(num_before):
        next(iter(batches))
    journal = Journal(directory)
    groups = client.fetch_batch(journal.trainer_id(), journal.next_batch) or []
    # Killed while it wrote the third of three groups.
    journal.append(groups[:2])
    (path,) = directory.glob("rollouts-*.jsonl")
    with path.open("ab") as file:
        file.write(b'{"tokens":[[1')

    batches = source(client, directory)
    batches.confirm_journal()

    assert "was not written whole (2 groups)" in caplog.text
    assert journaled(directory) == list(range(3 * num_before))
    fetched = next(iter(batches))
    assert fetched.position == Position(num_before, 0)
    assert serials(fetched.raw_groups) == serials(groups)
    assert journaled(directory) == list(range(3 * num_before + 3))


def test_a_batch_that_went_to_others_is_taken_out_of_the_journal(options, tmp_path, caplog):
    with served(replace(options, lease_timeout_s=0.0)) as (url, _), AtroposClient(url) as client:
        api = AtroposApi(url, [])
        client.register(make_registration(batch_size=2))
        post(api, 1)
        journal = Journal(tmp_path / "journal")
        journal.append(client.fetch_batch(journal.trainer_id(), 0) or [])
        # It is silent, and another trainer asks.
        assert serials(client.fetch_batch("other", 0) or []) == [1]
        with pytest.raises(AtroposBatchGivenAway):
            client.acknowledge(journal.trainer_id(), 0, 1)

        batches = source(client, tmp_path / "journal")
        batches.confirm_journal()

        assert "It is taken out of the journal and not trained here." in caplog.text
        assert client.acknowledge("other", 0, 1)
        post(api, 2)
        fetched = next(iter(batches))
        assert (serials(fetched.raw_groups), fetched.position) == ([2], Position(0, 0))
        assert journaled(tmp_path / "journal") == [2]


def test_an_api_that_is_killed_costs_nothing_and_needs_no_registration(tmp_path, caplog):
    process = ApiProcess(tmp_path)
    try:
        with AtroposClient(process.url, read_timeout_s=10.0) as client:
            api = AtroposApi(process.url, [])
            client.register(make_registration(batch_size=2))
            registered: list[int] = []
            batches = ApiBatches(client, Journal(tmp_path / "journal"), OPTIONS, lambda: registered.append(1))
            post(api, 1, 2)
            iterator = iter(batches)
            assert serials(next(iterator).raw_groups) == [1]
            pid = api.get("/healthz").json()["pid"]
            process.process.kill()
            os.kill(pid, signal.SIGKILL)
            process.process.wait()
            timer = threading.Timer(0.3, process.restart)
            timer.start()
            assert serials(next(iterator).raw_groups) == [2]
            timer.join()
        assert registered == []
        assert (batches.num_restarts, batches.num_batches_maybe_lost) == (0, 0)
        assert "Registration, queue and environments are as before." in caplog.text
    finally:
        process.end()


def test_a_run_knows_what_befell_its_api(tmp_path):
    process = ApiProcess(tmp_path)
    try:
        with AtroposClient(process.url, read_timeout_s=10.0) as client:
            api = AtroposApi(process.url, [])
            # Before the run: not counted.
            assert api.post_group(2, scores=[1.0]).status_code == 422
            batches = source(client, tmp_path / "journal")
            batches.begin()
            assert batches.watch.metrics["trajectory_api/num_posts_refused"] == 0
            post(api, 1, 2, 3)
            assert api.post_group(2, scores=[1.0]).status_code == 422
            iterator = iter(batches)
            next(iterator)
            watched = batches.watch.metrics
            assert watched.pop("trajectory_api/stored_bytes") > 0
            assert watched == {
                "trajectory_api/keeps_batches": 1,
                "trajectory_api/num_queued_groups": 2,
                "trajectory_api/num_unacknowledged_batches": 0,
                "trajectory_api/num_restarts": 0,
                "trajectory_api/num_posts_refused": 1,
                "trajectory_api/num_posts_repeated": 0,
                "trajectory_api/num_posts_turned_away": 0,
                "trajectory_api/num_batches_repeated": 0,
                "trajectory_api/num_batches_put_back": 0,
            }
            assert watched.keys() <= METRICS.keys()

            pid = api.get("/healthz").json()["pid"]
            os.kill(pid, signal.SIGKILL)
            # Counts of the API begin anew with its process; those of the run go on.
            assert api.post_group(2, scores=[1.0]).status_code == 422
            next(iterator)
            assert batches.watch.metrics["trajectory_api/num_restarts"] == 1
            assert batches.watch.metrics["trajectory_api/num_posts_refused"] == 2
    finally:
        process.end()


def test_a_reset_is_no_start(api, client):
    before = client.metrics()["server_starts_total"]
    client.reset_data()
    assert client.metrics()["server_starts_total"] == before == 1


def test_of_run_api_a_run_knows_that_it_is_this_one(served_app, tmp_path):
    with AtroposClient(served_app[0]) as client:
        watch = ApiWatch(client)
        client.info()
        watch.look()
        assert watch.metrics == {"trajectory_api/keeps_batches": 0}


def test_an_api_that_does_not_show_its_metrics_ends_no_run_and_is_named_once(api, client, caplog, monkeypatch):
    client.info()
    watch = ApiWatch(client)
    watch.look()
    before = watch.metrics
    # As a proxy in front of the API answers that lets other routes through alone.
    monkeypatch.setattr(client, "base_url", f"{client.base_url}/nothing")
    watch.look()
    watch.look()
    assert watch.metrics == before
    assert caplog.text.count("is not logged until it answers /metrics") == 1


def test_an_api_that_does_not_come_back_ends_the_run(tmp_path):
    process = ApiProcess(tmp_path)
    with AtroposClient(process.url) as client:
        client.register(make_registration(batch_size=2))
        batches = ApiBatches(
            client,
            Journal(tmp_path / "journal"),
            DataOptions(batch_timeout_s=10.0, refresh_interval=0.1, api_timeout_s=0.3),
            lambda: None,
        )
        process.end()
        with pytest.raises(AtroposConnectionError, match=r"did not answer within 0\.3 s"):
            next(iter(batches))


KILLED_TRAINER = """
import os, signal, sys
from pathlib import Path
from trl_atropos.data.options import DataOptions
from trl_atropos.data.sources import ApiBatches
from trl_atropos.wire.api_watch import ApiWatch
from trl_atropos.wire.client import AtroposClient
from trl_atropos.wire.journal import Journal

url, directory, moment = sys.argv[1:]
client, journal = AtroposClient(url), Journal(directory)
client.info()

def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "before_journal":
    journal.append = die
elif moment == "before_receipt":
    client.acknowledge = die
elif moment == "after_receipt":
    acknowledge = client.acknowledge
    client.acknowledge = lambda *arguments: (acknowledge(*arguments), die())
batches = ApiBatches(client, journal, DataOptions(batch_timeout_s=5.0, refresh_interval=0.1), lambda: None)
batches.confirm_journal()
next(iter(batches))
"""


def test_a_trainer_that_is_killed_at_any_moment_of_a_fetch_loses_nothing_and_gets_nothing_twice(api, client, tmp_path):
    post(api, *range(8))
    for moment in ("before_journal", "before_receipt", "after_receipt", "before_receipt", "before_journal", "never"):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_TRAINER, api.base_url, str(tmp_path / "journal"), moment],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=60,
        )
        assert killed.returncode == (0 if moment == "never" else -signal.SIGKILL)
    batches = source(client, tmp_path / "journal")
    batches.confirm_journal()
    iterator = iter(batches)
    while client.status().queue_size:
        next(iterator)
    assert journaled(tmp_path / "journal") == list(range(8))
    assert leases(api) == "0"


def test_a_registration_with_other_sizes_is_said_and_taken(client, caplog):
    client.register(make_registration(batch_size=8))
    assert client.info() == (8, 33)
    assert "was registered with batch_size 2" in caplog.text


def test_the_key_is_in_the_url_and_in_no_message(options):
    with served(replace(options, api_key="se/cret")) as (url, _):
        with AtroposClient(url) as client, pytest.raises(AtroposProtocolError, match="The API asks for a key"):
            client.info()
        with AtroposClient(url.replace("http://", "http://trainer:se%2Fcret@")) as client:
            assert client.info() == (-1, -1)
            assert client.base_url == url


def test_a_database_that_cannot_be_written_for_a_while_is_waited_for(tmp_path, options, monkeypatch, caplog):
    monkeypatch.setattr("trl_atropos.api.store.BUSY_TIMEOUT_S", 0.05)
    with served(options) as (url, _), AtroposClient(url) as client:
        client.register(make_registration(batch_size=2))
        client.fetch_batch()
        post(AtroposApi(url, []), 1)
        # Another program holds it.
        other = sqlite3.connect(options.db, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.5, other.execute, ["ROLLBACK"])
        timer.start()
        assert serials(next(iter(source(client, tmp_path / "journal"))).raw_groups) == [1]
        timer.join()
        other.close()
    assert "database is locked" in caplog.text


def test_the_doctor_knows_that_it_has_no_traps_of_order(api, client):
    requests.get(f"{api.base_url}/reset_data", timeout=10)
    post(api, *range(8))
    facts = inspect_api(client)
    assert facts.keeps_batches and facts.environments == ()
    assert [finding.name for finding in diagnose(facts, API_CHECKS)] == ["unregistered"]
    client.register(make_registration(batch_size=2))
    client.fetch_batch()
    environment = {"max_token_length": 32, "desired_name": "env", "weight": 1.0, "group_size": 2}
    assert api.post("/register-env", environment).json()["status"] == "success"
    facts = inspect_api(client, expected_batch_size=4)
    assert len(facts.environments) == 1
    names = {finding.name for finding in diagnose(facts, API_CHECKS)}
    assert not names & {"lifo_ageing", "other_registration", "data_before_register"}
