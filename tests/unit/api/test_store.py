"""The database of the API: what survives, who may open it, and what happens when it fails."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest

from trl_atropos.api import store as jobs
from trl_atropos.api.packing import QueuedGroup
from trl_atropos.api.refusals import ApiDatabaseError
from trl_atropos.api.scored_data import ReceivedGroup
from trl_atropos.api.store import MIGRATIONS, Lease, Store, read_state, set_aside


GROUP = ReceivedGroup(num_rollouts=2, env_id=0, body=b"{}", is_gzipped=False, missing=5)


def insert(store: Store, first_id: int, *groups: ReceivedGroup, digest: bytes = b"d") -> None:
    store.submit(jobs.insert_groups(first_id, groups, [False] * len(groups), digest)).result(timeout=10)


def reopen(store: Store) -> Store:
    store.close()
    return Store(store.path)


def queued(group_id: int) -> QueuedGroup:
    return QueuedGroup(group_id, 2, 0, 2, 5)


def test_everything_is_there_after_a_restart_in_its_order(tmp_path):
    store = Store(tmp_path / "a.db")
    insert(store, 1, GROUP, GROUP, GROUP)
    store.submit(jobs.insert_groups(4, [GROUP], [True], b"e")).result()
    store.submit(jobs.set_value("step", 7)).result()
    store.submit(jobs.put_environment(0, {"name": "env"})).result()
    lease = Lease(1, "trainer", 3, 12.5, [queued(3), queued(1)])
    store.submit(jobs.hand_out(lease, 8, None)).result()

    store = reopen(store)

    state = store.state
    assert state.queue == [queued(2)]
    assert state.buffered == [queued(4)]
    assert [(lease.trainer, lease.number, lease.groups) for lease in state.leases] == [
        ("trainer", 3, [queued(3), queued(1)])
    ]
    assert (state.values, state.environments) == ({"step": 8}, [{"name": "env"}])
    assert (state.next_group_id, state.next_lease_id) == (5, 2)
    assert sorted(state.posts) == [b"d", b"e"]
    body = store.read_body(2)
    assert body is not None and (body.body, body.is_gzipped) == (b"{}", False)
    assert store.read_body(9) is None
    store.close()


def test_what_was_on_its_way_to_a_trainer_without_receipts_is_gone_after_a_restart(tmp_path):
    store = Store(tmp_path / "a.db")
    insert(store, 1, GROUP, GROUP)
    store.submit(jobs.hand_out(Lease(1, None, None, 0.0, [queued(1)]), 1, None)).result()
    store = reopen(store)
    assert (store.state.queue, store.state.leases) == ([queued(2)], [])
    assert store.read_body(1) is None
    store.close()


def test_a_lease_that_ends_or_is_put_back(tmp_path):
    store = Store(tmp_path / "a.db")
    insert(store, 1, GROUP, GROUP)
    first, second = Lease(1, "a", 0, 0.0, [queued(1)]), Lease(2, "b", 0, 0.0, [queued(2)])
    store.submit(jobs.hand_out(first, 1, None)).result()
    store.submit(jobs.hand_out(second, 2, first)).result()
    assert store.read_body(1) is None
    store.submit(jobs.put_back(second, 1, True)).result()
    store = reopen(store)
    assert store.state.queue == [queued(2)]
    assert [(lease.trainer, lease.given_back, lease.groups) for lease in store.state.leases] == [("b", True, [])]
    store.submit(jobs.reset).result()
    store = reopen(store)
    assert (store.state.queue, store.state.leases, store.state.values, store.state.posts) == ([], [], {}, [])
    store.close()


def test_many_changes_at_once_share_a_sync(tmp_path):
    store = Store(tmp_path / "a.db")
    entered, go_on = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        entered.set()
        assert go_on.wait(10)

    futures = [store.submit(hold)]
    assert entered.wait(10)
    futures += [store.submit(jobs.insert_groups(number, [GROUP], [False], b"%d" % number)) for number in range(1, 51)]
    go_on.set()
    wait(futures, timeout=10)
    assert [future.exception() for future in futures] == [None] * 51
    assert store.num_commits == 2
    store.close()


def test_two_processes_on_one_database_are_refused(tmp_path):
    store = Store(tmp_path / "a.db")
    with pytest.raises(ApiDatabaseError, match=f"process {os.getpid()}, has the database"):
        Store(tmp_path / "a.db")
    store.close()
    Store(tmp_path / "a.db").close()


def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(tmp_path):
    store = Store(tmp_path / "a.db")
    insert(store, 1, GROUP)
    # SQLite's own error for a disk that is full.
    store.submit(lambda connection: connection.execute("PRAGMA max_page_count = 20").fetchall()).result()
    large = ReceivedGroup(2, 0, os.urandom(2**20), False, 0)
    future = store.submit(jobs.insert_groups(2, [large], [False], b"x"))
    with pytest.raises(ApiDatabaseError, match="database or disk is full"):
        future.result(timeout=10)
    assert store.last_error is not None
    insert(store, 3, GROUP)
    assert store.last_error is None
    store = reopen(store)
    assert [group.id for group in store.state.queue] == [1, 3]
    store.close()


def test_a_database_that_another_program_holds_fails_requests_and_heals(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "BUSY_TIMEOUT_S", 0.05)
    store = Store(tmp_path / "a.db")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ApiDatabaseError, match="database is locked"):
        store.submit(jobs.set_value("step", 1)).result(timeout=10)
    other.execute("ROLLBACK")
    other.close()
    store.submit(jobs.set_value("step", 1)).result(timeout=10)
    store.close()


def test_a_fault_of_a_job_is_told_and_ends_nothing(tmp_path):
    store = Store(tmp_path / "a.db")
    with pytest.raises(ApiDatabaseError, match="too large"):
        store.submit(jobs.put_environment(2**70, {})).result(timeout=10)
    insert(store, 1, GROUP)
    assert reopen(store).state.queue == [queued(1)]


@pytest.mark.parametrize("place", [0, 20_000])
def test_a_damaged_database_is_refused_unchanged_and_can_be_set_aside(tmp_path, place):
    path = tmp_path / "a.db"
    store = Store(path)
    insert(store, 1, *[GROUP] * 100)
    store.close()
    data = bytearray(path.read_bytes())
    data[place : place + 60_000] = b"\xff" * len(data[place : place + 60_000])
    path.write_bytes(data)
    with pytest.raises(ApiDatabaseError, match="cannot be used") as caught:
        Store(path)
    assert "--if_damaged set_aside" in caught.value.fix
    assert path.read_bytes() == data

    kept = set_aside(path, "a.db.damaged-{}")

    assert kept.name == "a.db.damaged-1" and kept.read_bytes() == data
    Store(path).close()
    assert set_aside(path, "a.db.damaged-{}").name == "a.db.damaged-2"


def test_databases_of_others_and_of_newer_versions_are_refused(tmp_path):
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t (x)")
    other.commit()
    other.close()
    with pytest.raises(ApiDatabaseError, match="is a database of another program"):
        Store(tmp_path / "other.db")

    Store(tmp_path / "new.db").close()
    newer = sqlite3.connect(tmp_path / "new.db")
    newer.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    newer.close()
    with pytest.raises(ApiDatabaseError, match=f"schema version {len(MIGRATIONS) + 1}"):
        Store(tmp_path / "new.db")


def test_an_older_database_is_brought_to_this_version(tmp_path, monkeypatch):
    store = Store(tmp_path / "a.db")
    insert(store, 1, GROUP)
    store.close()
    monkeypatch.setattr(jobs, "MIGRATIONS", (*MIGRATIONS, "ALTER TABLE groups ADD COLUMN colour TEXT DEFAULT 'red'"))

    store = Store(tmp_path / "a.db")

    assert store.state.queue == [queued(1)]
    assert store.submit(lambda connection: connection.execute("SELECT colour FROM groups").fetchall()).result() == [
        ("red",)
    ]
    assert store.submit(lambda connection: connection.execute("PRAGMA user_version").fetchone()).result() == (
        len(MIGRATIONS) + 1,
    )
    store.close()


def test_a_directory_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ApiDatabaseError, match="cannot be opened"):
        Store(tmp_path / "nowhere" / "a.db")


def test_the_state_can_be_read_while_an_api_uses_it(tmp_path):
    store = Store(tmp_path / "a.db")
    insert(store, 1, GROUP)
    assert read_state(store.path).queue == [queued(1)]
    store.close()
    assert read_state(store.path).queue == [queued(1)]


def test_a_clock_that_was_set_back_keeps_the_posts_that_may_come_again(tmp_path, monkeypatch):
    store = Store(tmp_path / "a.db")
    now = time.time()
    for seconds, digest in ((0, b"old"), (1000, b"new")):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
        insert(store, 1 if digest == b"old" else 2, GROUP, digest=digest)
    monkeypatch.setattr(time, "time", lambda: now - 10_000)
    store = reopen(store)
    assert store.state.posts == [b"new"]
    store.close()


def test_a_clock_that_is_set_while_posts_come_makes_none_of_the_last_ones_old(tmp_path, monkeypatch):
    store = Store(tmp_path / "a.db")
    now = time.time()
    # Set back by three hours after the first post, then forward by two days while nobody posts.
    for number, (seconds, digest) in enumerate(((0, b"before"), (-10_800, b"after")), start=1):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
        insert(store, number, GROUP, digest=digest)
    monkeypatch.setattr(time, "time", lambda: now + 172_800)
    store.submit(jobs.forget_posts()).result()
    store = reopen(store)
    assert sorted(store.state.posts) == [b"after", b"before"]

    # What is old by the clock of the posts is forgotten all the same.
    insert(store, 3, GROUP, digest=b"later")
    store.submit(jobs.forget_posts()).result()
    kept = store.submit(lambda connection: connection.execute("SELECT digest FROM posts").fetchall()).result()
    assert kept == [(b"later",)]
    store.close()


def test_ten_thousand_groups_are_indexed_in_a_second(tmp_path):
    store = Store(tmp_path / "a.db")
    insert(store, 1, *[GROUP] * 10_000)
    store.close()
    start = time.perf_counter()
    store = Store(tmp_path / "a.db")
    assert time.perf_counter() - start < 1.0
    assert len(store.state.queue) == 10_000
    store.close()


def test_inspect_needs_a_database(tmp_path: Path):
    with pytest.raises(ApiDatabaseError, match="cannot be used"):
        read_state(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()
