"""The layout of the shared-memory segment, known to the trainer (`shm.py`) and to the worker (`shm_engine.py`).

[ tensor 0 | pad | tensor 1 | pad | ... ][ report of worker 0 | report of worker 1 | ... ]
 <------------- data_bytes ------------>  <- REPORT_BYTES ->
"""

from __future__ import annotations

import os
import re


REPORT_BYTES = 4096
"""Size of one worker's report: a JSON object padded with NUL bytes."""

SEGMENT_DIR = "/dev/shm"
ENLARGE = f"Enlarge {SEGMENT_DIR} (mount -o remount,size=..., or --shm-size / --ipc=host for a container)."
"""What mends a file system that is too small for a segment."""

SEGMENT_PATTERN = re.compile(r"trl_atropos-[0-9a-f]{32}")


def segment_path(name: str) -> str:
    """Return the path of a segment, and refuse a name that could point anywhere else.

    A name is `trl_atropos-` and 32 hexadecimal digits.

    Raises:
        `ValueError`: if the name has another form. It arrives over HTTP, so it must not name other files.
    """
    if not SEGMENT_PATTERN.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a weight segment.")
    return os.path.join(SEGMENT_DIR, name)
