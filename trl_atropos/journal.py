"""Append-only record of what `/batch` gave away: one group per line, as the wire had it.

The API keeps no copy of a batch that it served, so the trainer writes one before it uses the batch. The file has the
format of an offline data file, and of what atroposlib's own `--env.data_path_to_save_groups` writes.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import JournalError


logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_DISK_FIX = "Free or mend the disk, or choose another place for the journal."


class Journal:
    """A journal that is open for appending. It is created with its parent directories if it does not exist.

    If an earlier run was killed in the middle of a write, the unfinished last line is cut off: its batch was not used.

    Args:
        path (`str` or `os.PathLike`):
            The file, uncompressed.

    Raises:
        JournalError: the file cannot be written, or `path` ends in `.gz`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if self.path.suffix == ".gz":
            raise JournalError(
                f"The journal {self.path} cannot be written compressed.",
                "A compressed file that is cut off by a crash does not open again.",
                "Choose a name without `.gz`, and compress the file when the run is over.",
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                _cut_unfinished_line(file, self.path)
            _sync_directory(self.path.parent)
        except OSError as exc:
            raise JournalError(
                f"The journal {self.path} cannot be opened for writing: {exc}.",
                "A batch that is not written down before use is gone if the trainer dies.",
                _DISK_FIX,
            ) from exc

    def append(self, raw_groups: list[Any]) -> None:
        """Writes the groups of one batch and returns when they are on the disk.

        Args:
            raw_groups (`list[dict]`):
                The value of `"batch"`, as JSON gave it. NaN and infinity are kept.

        Raises:
            JournalError: the disk is full or fails.
        """
        lines = "".join(json.dumps(group, separators=(",", ":")) + "\n" for group in raw_groups)
        try:
            with open(self.path, "ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise JournalError(
                f"Writing {len(raw_groups)} groups to the journal {self.path} failed: {exc}.",
                "The batch was taken from the API and is now held by this process alone.",
                _DISK_FIX,
            ) from exc


def read_journal(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Reads the groups of a journal or of an offline data file, in the order of the file.

    Args:
        path (`str` or `os.PathLike`):
            One JSON object per line; compressed if the name ends in `.gz`.

    Yields:
        `dict`: one group, as the wire had it. An unfinished last line (a trainer was killed while it wrote) is left
        out with a warning.

    Raises:
        JournalError: the file cannot be read, or one of its lines is not a JSON object; the message has its number.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if Path(path).suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                group = _parse_line(line)
                if group is not None:
                    yield group
                elif line.endswith(b"\n"):
                    raise _broken(path, number)
                else:
                    logger.warning("Line %d of %s is unfinished and left out", number, os.fspath(path))
    except JournalError:
        raise
    except (OSError, EOFError, zlib.error) as exc:
        raise JournalError(
            f"The file {os.fspath(path)} cannot be read beyond line {number}: {exc}.",
            "It does not exist, may not be read, or its compressed part was cut off.",
            "Check the path; a damaged `.gz` file can be saved in part with `zcat FILE > NEW_FILE`.",
        ) from exc


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        group = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return group if isinstance(group, dict) else None


def _broken(path: str | os.PathLike[str], number: int) -> JournalError:
    return JournalError(
        f"Line {number} of {os.fspath(path)} is not a JSON object.",
        "A journal holds one `ScoredData` object per line, and only its last line may be unfinished.",
        f"Look at it with `sed -n {number}p`, and mend or delete it.",
    )


def _cut_unfinished_line(file: BinaryIO, path: Path) -> None:
    size = file.seek(0, os.SEEK_END)
    end = _end_of_last_line(file, size)
    if end == size:
        return
    file.seek(end)
    if _parse_line(file.read()) is not None:
        file.write(b"\n")  # whole but for the line end, as a text editor leaves it
    else:
        logger.warning("Cut %d bytes of an unfinished line off the end of %s", size - end, path)
        file.truncate(end)
    file.flush()
    os.fsync(file.fileno())


def _end_of_last_line(file: BinaryIO, size: int) -> int:
    """Number of bytes up to and including the last line end."""
    end = size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def _sync_directory(directory: Path) -> None:
    """Makes the name of a new file survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
