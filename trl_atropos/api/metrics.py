"""`/metrics` of the trajectory API, in the text format of Prometheus."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from .service import TrajectoryService


PREFIX = "trl_atropos_api_"

METRICS = {
    "queue_groups": ("gauge", "Groups that wait to be handed out."),
    "queue_rollouts": ("gauge", "Rollouts of these groups."),
    "stored_bytes": (
        "gauge",
        "Bytes of all groups that are stored: queued, buffered and handed out without a receipt.",
    ),
    "buffered_groups": ("gauge", "Groups of an unusual size that wait for others of their environment."),
    "unacknowledged_batches": ("gauge", "Batches that trainers fetched and have not acknowledged."),
    "connected_environments": ("gauge", "Environments that are registered and not disconnected."),
    "current_step": ("gauge", "What `/status` shows: `starting_step` and the batches handed out since."),
    "groups_received_total": ("counter", "Groups that were stored."),
    "posts_refused_total": ("counter", "Posts that were refused because of what they hold."),
    "posts_repeated_total": (
        "counter",
        "Posts that came again because their answer was lost, and were not stored twice.",
    ),
    "posts_turned_away_total": ("counter", "Posts that found the queue full for too long."),
    "batches_handed_out_total": ("counter", "Batches that were handed out for the first time."),
    "batches_repeated_total": (
        "counter",
        "Times that a batch was handed out again to the trainer that had asked for it.",
    ),
    "batches_acknowledged_total": ("counter", "Batches that a trainer acknowledged."),
    "batches_put_back_total": ("counter", "Batches that returned to the queue."),
    "requests_failed_total": ("counter", "Requests that failed because the database did."),
    "server_starts_total": (
        "counter",
        "Times that a server was started on this database. It does not begin anew, unless the database does.",
    ),
    "commits_total": ("counter", "Transactions, each synced to the disk."),
    "commit_seconds_total": ("counter", "Seconds that they took."),
    "resident_memory_bytes": ("gauge", "Memory of the process."),
}
"""Name without prefix -> kind and meaning. Counters begin anew with the process, but for `server_starts_total`."""


def render_metrics(service: TrajectoryService) -> str:
    """Return all metrics as text."""
    num_commits, commit_s = service.commits
    values = {
        "queue_groups": len(service.queue),
        "queue_rollouts": service.queue.num_rollouts,
        "stored_bytes": service.num_bytes,
        "buffered_groups": sum(map(len, service.buffers.values())),
        "unacknowledged_batches": sum(not lease.given_back for lease in service.leases.values()),
        "connected_environments": sum(environment["connected"] for environment in service.environments),
        "current_step": service.step,
        **{f"{name.removeprefix('num_')}_total": count for name, count in asdict(service.counts).items()},
        "server_starts_total": service.num_starts,
        "commits_total": num_commits,
        "commit_seconds_total": commit_s,
        "resident_memory_bytes": resident_bytes(),
    }
    lines = []
    for name, (kind, text) in METRICS.items():
        lines += [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}", f"{PREFIX}{name} {values[name]}"]
    return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
