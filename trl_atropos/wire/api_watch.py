"""What a run knows of the trajectory API that it fetches from: which one it is, what it holds, what befell it."""

from __future__ import annotations

import logging

from ..errors import AtroposConnectionError, AtroposProtocolError
from .client import AtroposClient


logger = logging.getLogger(__name__)


class ApiWatch:
    """Looks at the API now and then; use it on the thread that uses the client.

    `metrics` are by their names, in groups, bytes, batches and counts since the first look. They are replaced as a whole, so that
    another thread may read them. Of `run-api` it is known that it is this one, and no more.
    """

    def __init__(self, client: AtroposClient):
        self.metrics: dict[str, float] = {}
        self._client = client
        self._before: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._has_warned = False

    def look(self) -> None:
        """Ask the API. One that does not answer is no error here: the metrics stay, and the log says so once."""
        if not self._client.keeps_batches:
            self.metrics = {"trajectory_api/keeps_batches": 0.0}
            return
        try:
            shown = self._client.metrics()
        except (AtroposConnectionError, AtroposProtocolError) as exc:
            if not self._has_warned:
                logger.warning(f"{exc} What the API holds is not logged until it answers /metrics.")
            self._has_warned = True
            return
        for name, now in shown.items():
            before = self._before.get(name, now)
            # Most begin anew with the process of the API: what a count shows that fell came since.
            self._counts[name] = self._counts.get(name, 0.0) + (now - before if now >= before else now)
        self._before = shown
        counts = self._counts
        self.metrics = {
            "trajectory_api/keeps_batches": 1.0,
            "trajectory_api/num_queued_groups": shown["queue_groups"],
            "trajectory_api/stored_bytes": shown["stored_bytes"],
            "trajectory_api/num_unacknowledged_batches": shown["unacknowledged_batches"],
            "trajectory_api/num_restarts": counts["server_starts_total"],
            "trajectory_api/num_posts_refused": counts["posts_refused_total"],
            "trajectory_api/num_posts_repeated": counts["posts_repeated_total"],
            "trajectory_api/num_posts_turned_away": counts["posts_turned_away_total"],
            "trajectory_api/num_batches_repeated": counts["batches_repeated_total"],
            "trajectory_api/num_batches_put_back": counts["batches_put_back_total"],
        }
