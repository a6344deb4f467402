"""What happened since the process began."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Counts for `/metrics`, where `num_x` is `x_total`."""

    num_groups_received: int = 0
    num_posts_refused: int = 0
    num_posts_repeated: int = 0
    num_posts_turned_away: int = 0
    num_batches_handed_out: int = 0
    num_batches_repeated: int = 0
    num_batches_acknowledged: int = 0
    num_batches_put_back: int = 0
    num_requests_failed: int = 0
