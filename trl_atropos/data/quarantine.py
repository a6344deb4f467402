"""Where refused groups go, and how many of them a run puts up with."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AtroposProtocolError, JournalError, TrlAtroposError
from ..types import Position, RejectedGroup
from ..wire.journal import parse_json


logger = logging.getLogger(__name__)

WINDOW = 20
"""Batches over which `max_dropped_fraction` is taken."""


class Quarantine:
    """Keeps refused groups with the reason, counts them per environment and reason, and ends the run at too many.

    The file `path` has JSON lines with the keys `batch`, `group`, `env_id`, `reason`, `error` and `raw`; of recorded data,
    `batch` is the pass, and `group` the number in the data. It is created at the first refused group; a group that is
    there already, because a resume replays it, is not written again.

    The run ends when the mean share of refused groups over the last 20 batches, `fractions`, exceeds
    `max_dropped_fraction`. Batches before the first count as good, so that one bad group at the start ends nothing
    that it would not end later. `num_groups` is the number of groups refused since the start of the run.
    """

    def __init__(self, path: str | os.PathLike[str], max_dropped_fraction: float):
        self.path = Path(path)
        self.max_dropped_fraction = max_dropped_fraction
        self.num_groups = 0
        self.fractions: deque[float] = deque(maxlen=WINDOW)
        self._counts: Counter[tuple[int | None, str]] = Counter()
        self._known = {Position(entry["batch"], entry["group"]) for entry in self._entries()}

    def add(self, first: Position, raw_groups: Sequence[dict[str, Any]], rejected: Sequence[RejectedGroup]) -> None:
        """Take the refused groups of a batch; `raw_groups` are all groups of it, `first` is the place of the first.

        Raises:
            AtroposProtocolError: too many groups of the last batches were refused.
            JournalError: the file cannot be written.
        """
        lines = []
        for group in rejected:
            self.num_groups += 1
            self._counts[group.env_id, group.reason] += 1
            logger.warning(
                f"Quarantined a group of environment {group.env_id} ({self._counts[group.env_id, group.reason]} with the "
                f"reason `{group.reason}` so far): {group.error}"
            )
            place = Position(first.batch, group.index)
            if place not in self._known:
                self._known.add(place)
                entry = {
                    "batch": first.batch,
                    "group": group.index,
                    "env_id": group.env_id,
                    "reason": group.reason,
                    "error": str(group.error),
                    "raw": raw_groups[group.index - first.group],
                }
                lines.append(json.dumps(entry, separators=(",", ":")) + "\n")
        if lines:
            self._write("".join(lines))
        self._count_batch(len(rejected) / len(raw_groups), rejected[0].error if rejected else None)

    def add_lost_batch(self, error: TrlAtroposError) -> None:
        """Count a batch that the API could not hand out.

        Raises:
            AtroposProtocolError: too many groups of the last batches were refused.
        """
        logger.error(f"A batch is lost: {error}")
        self._count_batch(1.0, error)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold of the quarantine."""
        return {"num_quarantined": self.num_groups, "rejected_fractions": list(self.fractions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; what is missing there is as at the start of a run."""
        self.num_groups = state.get("num_quarantined", 0)
        self.fractions.clear()
        self.fractions.extend(state.get("rejected_fractions", []))

    def _count_batch(self, fraction: float, error: TrlAtroposError | None) -> None:
        self.fractions.append(fraction)
        if error is None or sum(self.fractions) <= WINDOW * self.max_dropped_fraction:
            return
        counts = ", ".join(
            f"environment {env_id}: {count} x {reason}" for (env_id, reason), count in self._counts.most_common(5)
        )
        raise AtroposProtocolError(
            f"Refused groups make {sum(self.fractions) / WINDOW:.1%} of the last {WINDOW} batches"
            f"{f' ({counts})' if counts else ''}; the last one: {error.what}",
            f"{error.why} All refused groups are in {self.path}.",
            f"{error.fix} Or put up with more: raise --max_dropped_fraction ({self.max_dropped_fraction}).",
        ) from error

    def _entries(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            entries = [parse_json(line) for line in file]
        return [entry for entry in entries if isinstance(entry, dict) and {"batch", "group"} <= entry.keys()]

    def _write(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(text.encode())
        except OSError as exc:
            raise JournalError(
                f"Writing to {self.path} failed: {exc}.",
                "What is refused is kept with its reason, so that its environment can be mended.",
                "Free or mend the disk, or choose another --output_dir.",
            ) from exc
