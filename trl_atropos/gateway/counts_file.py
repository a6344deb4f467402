"""What a gateway in the process of an environment has counted, in a file for whoever started that process."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from pathlib import Path

from .counts import GatewayCounts


logger = logging.getLogger(__name__)

COUNTS_VARIABLE = "TRL_ATROPOS_GATEWAY_COUNTS"
"""Names the directory of the files to an environment. Without it nothing is written."""

WRITE_INTERVAL_S = 1.0
"""Counts in a file are at most so old. A signal may end the process at any time, without another word."""


class CountsFile:
    """The file of one process: an environment that is started again goes on with another one.

    Args:
        counts ([`GatewayCounts`]):
            What is written.
        directory (`Path`):
            Where; it is made if need be.
    """

    def __init__(self, counts: GatewayCounts, directory: Path):
        self.counts = counts
        # Not the process id: in containers that share the directory all may have the same.
        self.path = directory / f"{uuid.uuid4().hex}.json"
        self._written = ""
        self._has_complained = False

    def write(self) -> None:
        """Write the counts, if they have changed. Training goes on without the file where that fails, and the log says so once."""
        text = json.dumps(self.counts.values())
        if text == self._written:
            return
        # The one name or the other has the whole of it, however this process ends.
        scratch = self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, self.path)
        except OSError as exc:
            if not self._has_complained:
                logger.warning("event=counts_not_written path=%s error=%r", self.path, str(exc))
            self._has_complained = True
            return
        self._written = text

    async def keep(self) -> None:
        """Write the counts as they change, until it is cancelled."""
        while True:
            self.write()
            await asyncio.sleep(WRITE_INTERVAL_S)


def read_counts(directory: Path) -> list[GatewayCounts]:
    """The counts of every process that wrote a file into a directory; none where there is no such directory."""
    return [
        GatewayCounts.of_values(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(directory.glob("*.json"))
    ]
