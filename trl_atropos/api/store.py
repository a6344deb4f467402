"""What the API keeps on the disk: one SQLite database, written by one thread.

A change is a job. The thread takes all jobs that wait, makes one transaction of them, and answers them when that is on the
disk (WAL, synchronous FULL): the more clients post at once, the more groups share one sync. The memory of the process holds
an index of the queue and no bodies.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from .packing import QueuedGroup
from .refusals import ApiDatabaseError
from .scored_data import ReceivedGroup


T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]

APPLICATION_ID = 0x41545250
"""In the head of the file, so that no other program's database is taken for one of these."""

MIGRATIONS = (
    """
    CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE environments (env_id INTEGER PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE leases (
        id INTEGER PRIMARY KEY, trainer TEXT, number INTEGER, handed_out_at REAL NOT NULL, given_back INTEGER NOT NULL
    );
    CREATE TABLE groups (
        id INTEGER PRIMARY KEY,
        num_rollouts INTEGER NOT NULL,
        env_id INTEGER,
        num_bytes INTEGER NOT NULL,
        missing INTEGER NOT NULL,
        received_at REAL NOT NULL,
        is_buffered INTEGER NOT NULL,
        lease_id INTEGER,
        position INTEGER
    );
    CREATE INDEX groups_of_a_lease ON groups (lease_id) WHERE lease_id IS NOT NULL;
    CREATE TABLE bodies (id INTEGER PRIMARY KEY, is_gzipped INTEGER NOT NULL, body BLOB NOT NULL);
    CREATE TABLE posts (digest BLOB PRIMARY KEY, received_at REAL NOT NULL) WITHOUT ROWID;
    """,
    "CREATE INDEX posts_by_time ON posts (received_at)",
)
"""Entry i turns a database of version i, `PRAGMA user_version`, into one of version i + 1."""

BUSY_TIMEOUT_S = 5.0
"""How long another program may hold the database, such as the `sqlite3` shell, before a request fails."""

REMEMBERED_POSTS_S = 120.0
"""Posts of this many seconds before the end of the last process may have lost their answers with it."""

_PAGE_BYTES = 16384
_CHECKPOINT_PAGES = 2048
"""Pages in the log (32 MiB) at which they are moved into the database."""

_FIX = "Free or mend the disk; what was answered with success is in the database."


@dataclass
class Lease:
    """A batch on its way to a trainer that names the batches that it asks for.

    `trainer` and `number` are how the trainer names it, None for a trainer that does not: then it is handed out once.
    `groups` are in the order of the batch. `given_back` says that they went to others because the trainer was silent;
    `heard_at` is when it was heard last, on the monotonic clock: a restart of the API counts as one.
    """

    id: int
    trainer: str | None
    number: int | None
    handed_out_at: float
    groups: list[QueuedGroup]
    given_back: bool = False
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def num_rollouts(self) -> int:
        """Rollouts of the batch."""
        return sum(group.num_rollouts for group in self.groups)


@dataclass
class StoredState:
    """What a database holds, without the bodies; groups are in the order in which they came.

    `oldest_group_at` is when the first of them came, in seconds since the epoch.
    """

    values: dict[str, Any] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)
    queue: list[QueuedGroup] = field(default_factory=list)
    buffered: list[QueuedGroup] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    posts: list[bytes] = field(default_factory=list)
    oldest_group_at: float | None = None
    next_group_id: int = 1
    next_lease_id: int = 1


@dataclass(frozen=True)
class StoredBody:
    """The JSON of a group as it came, compressed if `is_gzipped`."""

    body: bytes
    is_gzipped: bool


class Store:
    """An open database, for one process at a time.

    Jobs are run by a thread of the store, in the order in which they are submitted; `read_body` may be called by one other
    thread. `num_commits` and `commit_s` count the transactions and the seconds that they took, `last_error` is what the
    last one failed with, None if it did not. `num_starts` are the servers that were ever started on this database.

    Raises:
        ApiDatabaseError: Another process has the database, it is damaged, or it is none of this program or version.
    """

    def __init__(self, path: Path):
        self.path = path
        self.num_commits = 0
        self.commit_s = 0.0
        self.last_error: str | None = None
        self._lock = _lock(path)
        try:
            self._connection = _open(path)
            self._reader = _connect(path)
            self.state = _load(self._connection)
        except sqlite3.DatabaseError as exc:
            self._lock.close()
            raise _cannot_open(path, exc) from exc
        except ApiDatabaseError:
            self._lock.close()
            raise
        self.num_starts: int = self.state.values.get("num_starts", 0)
        self._jobs: queue.SimpleQueue[tuple[Job[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish the jobs that were submitted, and give the database free."""
        self._jobs.put(None)
        self._thread.join()
        self._reader.close()
        self._connection.close()
        self._lock.close()

    def submit(self, job: Job[T]) -> Future[T]:
        """Let the store's thread make this change; the future is done when it is on the disk.

        It ends with an [`~api.refusals.ApiDatabaseError`] if the database cannot be written; then nothing of the
        change was made.
        """
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def count_start(self) -> Future[None]:
        """Keep that a server was started on this database; the future is that of `submit`."""
        self.num_starts += 1
        return self.submit(set_value("num_starts", self.num_starts))

    def read_body(self, group_id: int) -> StoredBody | None:
        """Read the body of a group; None if it is not there any more.

        Raises:
            ApiDatabaseError: The database cannot be read.
        """
        try:
            row = self._reader.execute("SELECT body, is_gzipped FROM bodies WHERE id = ?", (group_id,)).fetchone()
        except sqlite3.Error as exc:
            raise ApiDatabaseError(
                f"Group {group_id} cannot be read from {self.path}: {exc}.",
                "The disk fails, or the database was changed by another program.",
                "Stop the API, copy the database, and look at it with `trl-atropos api inspect`.",
            ) from exc
        return None if row is None else StoredBody(row[0], bool(row[1]))

    def _write(self) -> None:
        while True:
            entry = self._jobs.get()
            entries = []
            is_last = entry is None
            while entry is not None:
                entries.append(entry)
                try:
                    entry = self._jobs.get_nowait()
                except queue.Empty:
                    break
                is_last = entry is None
            if entries:
                self._commit(entries)
            if is_last:
                return

    def _commit(self, entries: Sequence[tuple[Job[Any], Future[Any]]]) -> None:
        start = time.perf_counter()
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            results = [job(self._connection) for job, _ in entries]
            self._connection.execute("COMMIT")
        except (sqlite3.Error, ValueError, TypeError, OverflowError) as exc:
            # Also what SQLite cannot take: whoever waits must hear of it, and the thread go on for the others.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            self.last_error = str(exc)
            error = ApiDatabaseError(
                f"{self.path} cannot be written: {exc}.", "Nothing of this request was kept.", _FIX
            )
            for _, future in entries:
                future.set_exception(error)
            return
        self.num_commits += 1
        self.commit_s += time.perf_counter() - start
        self.last_error = None
        for (_, future), result in zip(entries, results, strict=True):
            future.set_result(result)


def set_value(name: str, value: Any) -> Job[None]:
    """Keep a value under a name; None forgets it."""

    def job(connection: sqlite3.Connection) -> None:
        if value is None:
            connection.execute("DELETE FROM state WHERE name = ?", (name,))
        else:
            connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, json.dumps(value)))

    return job


def put_environment(env_id: int, environment: dict[str, Any]) -> Job[None]:
    """Keep what is known of an environment."""

    def job(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT OR REPLACE INTO environments VALUES (?, ?)", (env_id, json.dumps(environment)))

    return job


def insert_groups(
    first_id: int, groups: Sequence[ReceivedGroup], are_buffered: Sequence[bool], digest: bytes
) -> Job[None]:
    """Keep the groups of one post under the ids from `first_id` on, and the digest of the post."""
    now = time.time()

    def job(connection: sqlite3.Connection) -> None:
        for number, (group, is_buffered) in enumerate(zip(groups, are_buffered, strict=True), start=first_id):
            connection.execute(
                "INSERT INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL)",
                (number, group.num_rollouts, group.env_id, len(group.body), group.missing, now, is_buffered),
            )
            connection.execute("INSERT INTO bodies VALUES (?, ?, ?)", (number, group.is_gzipped, group.body))
        (newest,) = connection.execute("SELECT max(received_at) FROM posts").fetchone()
        # Never before an earlier one: after a clock was set back, the newest posts would look like old ones.
        received_at = now if newest is None else max(now, newest)
        connection.execute("INSERT OR REPLACE INTO posts VALUES (?, ?)", (digest, received_at))

    return job


def forget_posts() -> Job[None]:
    """Forget the digests of posts that no answer can be missing of any more."""

    def job(connection: sqlite3.Connection) -> None:
        # Counted back from the newest, as when they are read: a clock that was set forward must not make all of them old.
        connection.execute(
            "DELETE FROM posts WHERE received_at < (SELECT max(received_at) FROM posts) - ?", (2 * REMEMBERED_POSTS_S,)
        )

    return job


def queue_buffered(group_ids: Sequence[int]) -> Job[None]:
    """Let groups leave the buffer of their environment for the queue."""

    def job(connection: sqlite3.Connection) -> None:
        connection.executemany("UPDATE groups SET is_buffered = 0 WHERE id = ?", [(number,) for number in group_ids])

    return job


def hand_out(lease: Lease, step: int, ended: Lease | None) -> Job[None]:
    """Keep that a batch was handed out, and the step counter; `ended` is a lease that the trainer has acknowledged by this."""

    def job(connection: sqlite3.Connection) -> None:
        if ended is not None:
            _delete_lease(connection, ended)
        connection.execute(
            "INSERT INTO leases VALUES (?, ?, ?, ?, 0)", (lease.id, lease.trainer, lease.number, lease.handed_out_at)
        )
        connection.executemany(
            "UPDATE groups SET lease_id = ?, position = ? WHERE id = ?",
            [(lease.id, position, group.id) for position, group in enumerate(lease.groups)],
        )
        set_value("step", step)(connection)

    return job


def end_lease(lease: Lease) -> Job[None]:
    """Delete a batch that arrived, or the memory of one that was given back."""

    def job(connection: sqlite3.Connection) -> None:
        _delete_lease(connection, lease)

    return job


def put_back(lease: Lease, step: int, keeps_memory: bool) -> Job[None]:
    """Let the groups of a lease return to the queue; with `keeps_memory` its name stays, to refuse a late receipt."""

    def job(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE groups SET lease_id = NULL, position = NULL WHERE lease_id = ?", (lease.id,))
        if keeps_memory:
            connection.execute("UPDATE leases SET given_back = 1 WHERE id = ?", (lease.id,))
        else:
            connection.execute("DELETE FROM leases WHERE id = ?", (lease.id,))
        set_value("step", step)(connection)

    return job


def reset(connection: sqlite3.Connection) -> None:
    """Delete everything but the number of starts, which is about the server."""
    connection.execute("DELETE FROM state WHERE name <> 'num_starts'")
    for table in ("environments", "leases", "groups", "bodies", "posts"):
        connection.execute(f"DELETE FROM {table}")


def _delete_lease(connection: sqlite3.Connection, lease: Lease) -> None:
    connection.executemany("DELETE FROM bodies WHERE id = ?", [(group.id,) for group in lease.groups])
    connection.execute("DELETE FROM groups WHERE lease_id = ?", (lease.id,))
    connection.execute("DELETE FROM leases WHERE id = ?", (lease.id,))


def set_aside(path: Path, name: str) -> Path:
    """Rename a database that nobody has open, with its log; return its new path.

    `name` has `{}` in the place of a number: the first from 1 on that makes a name that is free.
    """
    target = next(free for n in itertools.count(1) if not (free := path.with_name(name.format(n))).exists())
    for suffix in ("-wal", "-shm", ""):
        source = Path(f"{path}{suffix}")
        if source.exists():
            source.rename(f"{target}{suffix}")
    return target


def read_state(path: Path) -> StoredState:
    """Read what a database holds without changing it, also while an API uses it.

    Raises:
        ApiDatabaseError: It cannot be read, or it is none of this program or version.
    """
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
        try:
            _check_identity(connection, path)
            return _load(connection)
        finally:
            connection.close()
    except sqlite3.DatabaseError as exc:
        raise _cannot_open(path, exc) from exc


def _lock(path: Path) -> IO[str]:
    """Hold the database for this process. The kernel lets go of it when the process ends, however it does."""
    try:
        lock = open(f"{path}.lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until the store is closed
    except OSError as exc:
        raise ApiDatabaseError(
            f"{path}.lock cannot be opened: {exc}.",
            "The API keeps everything in this directory.",
            "Name a directory that exists and may be written, with `--db`.",
        ) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise ApiDatabaseError(
            f"Another trajectory API, process {owner or 'unknown'}, has the database {path}.",
            "Two of them would hand out the same groups.",
            "Use that one, or end it, or name another file with `--db`.",
        ) from exc
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    # Transactions are begun by hand, and a connection is used by one thread at a time.
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _open(path: Path) -> sqlite3.Connection:
    connection = _connect(path)
    if path.stat().st_size == 0:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    _check_identity(connection, path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {4 * _CHECKPOINT_PAGES * _PAGE_BYTES}")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT")
    # A batch that was on its way to a trainer that names none: it was handed out.
    connection.executescript(
        """
        BEGIN IMMEDIATE;
        DELETE FROM bodies WHERE id IN (
            SELECT groups.id FROM groups JOIN leases ON groups.lease_id = leases.id WHERE leases.trainer IS NULL);
        DELETE FROM groups WHERE lease_id IN (SELECT id FROM leases WHERE trainer IS NULL);
        DELETE FROM leases WHERE trainer IS NULL;
        COMMIT
        """
    )
    return connection


def _check_identity(connection: sqlite3.Connection, path: Path) -> None:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application_id != APPLICATION_ID or (version == 0 and num_tables > 0):
        raise ApiDatabaseError(
            f"{path} is a database of another program (application_id {application_id:#x}).",
            "It would be overwritten.",
            "Name another file with `--db`; one that does not exist is made.",
        )
    if version > len(MIGRATIONS):
        raise ApiDatabaseError(
            f"{path} has the schema version {version}, this trl-atropos knows versions up to {len(MIGRATIONS)}.",
            "A newer release wrote it.",
            "Update trl-atropos, or name another file with `--db`.",
        )


def _load(connection: sqlite3.Connection) -> StoredState:
    state = StoredState()
    state.values = {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM state")}
    state.environments = [
        json.loads(value) for (value,) in connection.execute("SELECT value FROM environments ORDER BY env_id")
    ]
    (state.oldest_group_at,) = connection.execute("SELECT min(received_at) FROM groups").fetchone()
    leases: dict[int, Lease] = {}
    for number, trainer, of_trainer, handed_out_at, given_back in connection.execute(
        "SELECT id, trainer, number, handed_out_at, given_back FROM leases ORDER BY id"
    ):
        leases[number] = Lease(number, trainer, of_trainer, handed_out_at, [], bool(given_back))
    positions: dict[int, int] = {}
    for *values, is_buffered, lease_id, position in connection.execute(
        "SELECT id, num_rollouts, env_id, num_bytes, missing, is_buffered, lease_id, position FROM groups ORDER BY id"
    ):
        group = QueuedGroup(*values)
        if lease_id is not None:
            leases[lease_id].groups.append(group)
            positions[group.id] = position
        else:
            (state.buffered if is_buffered else state.queue).append(group)
        state.next_group_id = group.id + 1
    for lease in leases.values():
        lease.groups.sort(key=lambda group: positions[group.id])
    state.leases = list(leases.values())
    state.next_lease_id = max(leases, default=0) + 1
    # Counted back from the newest: the clock may have been set since.
    state.posts = [
        digest
        for (digest,) in connection.execute(
            "SELECT digest FROM posts WHERE received_at >= (SELECT max(received_at) FROM posts) - ?",
            (REMEMBERED_POSTS_S,),
        )
    ]
    return state


def _cannot_open(path: Path, exc: sqlite3.DatabaseError) -> ApiDatabaseError:
    return ApiDatabaseError(
        f"The database {path} cannot be used: {exc}.",
        "It is damaged, locked by another program, or no database at all. It was not changed.",
        "Restore it from a copy, or start with `--if_damaged set_aside`: the file is renamed and a new one begun, so that "
        "what it held is not trained.",
    )
