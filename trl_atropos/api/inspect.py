"""What `trl-atropos api inspect` shows of a database."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from .store import read_state


def describe_database(path: Path) -> dict[str, Any]:
    """Return what a database holds, as JSON takes it; it is not changed, and an API may use it meanwhile.

    `oldest_group_age_s` is in seconds by the clock of this machine, None without a group.

    Raises:
        ApiDatabaseError: It cannot be read.
    """
    state = read_state(path)
    oldest = state.oldest_group_at
    stored = [*state.queue, *state.buffered, *(group for lease in state.leases for group in lease.groups)]
    return {
        "database": str(path),
        "file_bytes": path.stat().st_size,
        "registration": state.values.get("registration"),
        "current_step": state.values.get("step", 0),
        "queue": {
            "num_groups": len(state.queue),
            "num_rollouts": sum(group.num_rollouts for group in state.queue),
            "num_bytes": sum(group.num_bytes for group in state.queue),
        },
        "num_buffered_groups": len(state.buffered),
        "num_stored_bytes": sum(group.num_bytes for group in stored),
        "oldest_group_age_s": None if oldest is None else round(time.time() - oldest, 1),
        "leases": [
            {
                "trainer": lease.trainer,
                "number": lease.number,
                "num_groups": len(lease.groups),
                "num_rollouts": lease.num_rollouts,
                "age_s": round(time.time() - lease.handed_out_at, 1),
                "given_back": lease.given_back,
            }
            for lease in state.leases
        ],
        "environments": [
            {
                "env_id": environment["registered_id"],
                "name": environment["real_name"],
                "connected": environment["connected"],
                "group_size": environment["group_size"],
                "num_queued_groups": sum(group.env_id == environment["registered_id"] for group in state.queue),
            }
            for environment in state.environments
        ],
    }
