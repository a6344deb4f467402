"""The options of `trl-atropos api`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ApiOptions:
    """What a trajectory API may take, keep and wait for.

    `db` is the database file. Sizes are in bytes: `max_queue_bytes` of all groups that are stored, as they came, and
    `max_env_queue_bytes` of those of one environment (None: the same); `max_body_bytes` of one request as it came,
    `max_unpacked_bytes` of what it unpacks to. `max_queue_groups` bounds what the index of the queue takes of the memory,
    some 200 bytes a group. A post that finds the queue full is held for `hold_s` seconds before it is refused.
    A batch that a trainer fetched and did not acknowledge goes to others when that trainer has been silent for
    `lease_timeout_s` seconds. A post whose answer was lost is recognised when it comes again within `retry_window_s`.
    `api_key`, if it is not None, is asked of every request.
    """

    db: Path
    host: str = "127.0.0.1"
    port: int = 8000
    max_queue_bytes: int = 8 * 2**30
    max_env_queue_bytes: int | None = None
    max_queue_groups: int = 250_000
    max_body_bytes: int = 64 * 2**20
    max_unpacked_bytes: int = 256 * 2**20
    hold_s: float = 60.0
    lease_timeout_s: float = 3600.0
    retry_window_s: float = 600.0
    api_key: str | None = None
