"""Append-only record of what `/batch` gave away, and of what became of it.

The API keeps no copy of a batch that it served, so the trainer writes one before it uses the batch. A journal is a
directory:

    rollouts-00000000.jsonl   one `ScoredData` group per line as the wire had it, with one more, last key:
                              "journal": {"batch": 3, "group": 0, "crc32": "89abcdef"}
    rollouts-00000041.jsonl   the next segment; the number is that of its first batch
    trainer_id                a name that no other journal has, by which the trajectory API knows the trainer
    marks.jsonl               what became of the batches:
                              {"event": "versions", "batch": 3, "first_group": 0, "fetched_version": 2,
                               "policy_versions": [[2, 2], null]}    a row per group, null for a refused one
                              {"event": "dropped", "batch": 3, "groups": [0], "reason": "stale"}
                              {"event": "trained", "batch": 3, "step": 4, "first_group": 0, "num_groups": 2}

The segments are offline data files (`recorded.py`). The checksum covers the bytes of the line's object without that key.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import JournalError


logger = logging.getLogger(__name__)

MARKS_NAME = "marks.jsonl"
TRAINER_ID_NAME = "trainer_id"
SEGMENT = re.compile(r"rollouts-(\d{8,})\.jsonl(\.gz)?")
DEFAULT_SEGMENT_BYTES = 256 * 2**20

_KEY = b'"journal":'
_ENTRY = re.compile(rb',?"journal":(\{"batch":\d+,"group":\d+,"crc32":"[0-9a-f]{8}"\})\}$')
_BLOCK_BYTES = 1 << 20
_DISK_FIX = "Free or mend the disk, or choose another --output_dir."


@dataclass(frozen=True)
class JournalBatch:
    """One batch of a journal: its number, counted in the run from 0, and its groups as JSON gave them."""

    number: int
    raw_groups: list[dict[str, Any]]


class Journal:
    """A journal that is open for appending. The directory is created if it does not exist.

    If an earlier run was killed in the middle of a write, the unfinished last line is cut off: that group was not
    used.

    A segment of `segment_bytes` bytes or more is followed by another one. When all segments together have more than
    `max_bytes` bytes, the oldest ones that no resume needs are deleted; None: they are kept. `next_batch` is the
    number of the batch that is appended next, and `num_groups_of_last` counts the groups of the one before it that are in the
    journal: fewer than it had if the machine or an earlier run ended while it was written.

    Raises:
        JournalError: the journal cannot be written, or its last line is damaged.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        max_bytes: int | None = None,
    ):
        self.directory = Path(directory)
        self.segment_bytes = segment_bytes
        self.max_bytes = max_bytes
        self.next_batch = 0
        self.num_groups_of_last = 0
        self._num_released = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in (*segments(self.directory)[-1:], self.directory / MARKS_NAME):
                with open(path, "a+b") as file:
                    _cut_unfinished_line(file, path)
            sync_directory(self.directory.parent)
        except OSError as exc:
            raise JournalError(
                f"The journal {self.directory} cannot be opened for writing: {exc}.",
                "A batch that is not written down before use is gone if the trainer dies.",
                _DISK_FIX,
            ) from exc
        for batch in self.batches(first_batch_of(segments(self.directory)[-1:])):
            self.next_batch, self.num_groups_of_last = batch.number + 1, len(batch.raw_groups)

    def trainer_id(self) -> str:
        """The name of this journal, 32 characters. It is made when it is asked for first.

        Raises:
            JournalError: the disk is full or fails.
        """
        path = self.directory / TRAINER_ID_NAME
        try:
            if not path.exists():
                # Under its name only when it is whole: half a name would be another trainer's.
                unfinished = path.with_suffix(".tmp")
                with open(unfinished, "w", encoding="ascii") as file:
                    file.write(uuid.uuid4().hex)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.rename(path)
                sync_directory(self.directory)
            return path.read_text(encoding="ascii")
        except OSError as exc:
            raise JournalError(
                f"The name of the journal {path} cannot be written or read: {exc}.",
                "By it the trajectory API knows which batches this trainer has.",
                _DISK_FIX,
            ) from exc

    def append(self, raw_groups: Sequence[dict[str, Any]]) -> int:
        """Write the groups of one batch, as JSON gave them, and return its number when they are on the disk.

        NaN and infinity are kept.

        Raises:
            JournalError: the disk is full or fails.
        """
        number = self.next_batch
        data = b"".join(_make_line(group, number, index) for index, group in enumerate(raw_groups))
        path = self._open_segment(number)
        is_new = not path.exists()
        try:
            with open(path, "ab", buffering=0) as file:
                size = file.tell()
                rest = memoryview(data)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    # Half a batch would be taken for a whole one after the next start.
                    file.truncate(size)
                    raise
            if is_new:
                sync_directory(self.directory)
        except OSError as exc:
            raise JournalError(
                f"Writing {len(raw_groups)} groups to the journal {path} failed: {exc}.",
                "The batch was taken from the API and is held by this process alone, which ends without using it.",
                _DISK_FIX,
            ) from exc
        self.next_batch, self.num_groups_of_last = number + 1, len(raw_groups)
        return number

    def drop_last(self) -> None:
        """Take the last batch out again: it is not whole, or was given to others. Nobody may have used it.

        Raises:
            JournalError: the disk fails.
        """
        number = self.next_batch - 1
        path = segments(self.directory)[-1]
        try:
            if first_batch_of([path]) == number:
                path.unlink()
                sync_directory(self.directory)
            else:
                with open(path, "r+b") as file:
                    file.truncate(_size_before_batch(path, number))
                    os.fsync(file.fileno())
        except OSError as exc:
            raise JournalError(
                f"Batch {number} cannot be taken out of the journal {path}: {exc}.",
                "It would be trained, and the API hands it out once more.",
                _DISK_FIX,
            ) from exc
        self.next_batch, self.num_groups_of_last = number, 0

    def mark(self, event: str, batch: int, **values: Any) -> None:
        """Note what became of the batch with the number `batch`.

        The event is `"versions"`, `"trained"` or `"dropped"`; `values` are what more there is to say, as JSON takes
        it.

        Raises:
            JournalError: the disk is full or fails.
        """
        line = json.dumps({"event": event, "batch": batch, **values}, separators=(",", ":")) + "\n"
        path = self.directory / MARKS_NAME
        try:
            # Not synced: the batches are what must not be lost, and these lines survive the end of the process.
            with open(path, "ab") as file:
                file.write(line.encode())
        except OSError as exc:
            raise JournalError(
                f"Writing to {path} failed: {exc}.", "Without marks nobody knows what became of a batch.", _DISK_FIX
            ) from exc

    def marks(self, event: str) -> Iterator[dict[str, Any]]:
        """The marks of one kind, in the order in which they were made."""
        with open(self.directory / MARKS_NAME, "rb") as file:
            for line in file:
                mark = parse_json(line)
                if isinstance(mark, dict) and mark.get("event") == event:
                    yield mark

    def batches(self, first: int = 0) -> Iterator[JournalBatch]:
        """Read back the batches from number `first` on, in the order in which they came.

        Raises:
            JournalError: a line is damaged, or the batch `first` was deleted.
        """
        paths = segments(self.directory)
        if paths and first < first_batch_of(paths):
            raise JournalError(
                f"The journal {self.directory} begins with batch {first_batch_of(paths)}, batch {first} is asked for.",
                "Older segments were deleted, by hand or because of --journal_max_bytes.",
                "Resume from a newer checkpoint, or start without --resume_from_checkpoint.",
            )
        while len(paths) > 1 and first_batch_of(paths[1:]) <= first:
            paths.pop(0)
        number, groups = first, list[dict[str, Any]]()
        for path in paths:
            for group, batch in read_lines(path, may_be_cut=path == paths[-1]):
                if batch is None:
                    raise JournalError(
                        f"{path} has a line without the journal's own key.",
                        "It was not written by a trainer, so that nobody knows which batch it belongs to.",
                        "Give files that were made by hand with --data_path.",
                    )
                if batch != number and groups:
                    yield JournalBatch(number, groups)
                    groups = []
                if batch >= first:
                    number = batch
                    groups.append(group)
        if groups:
            yield JournalBatch(number, groups)

    def release(self, before: int) -> None:
        """Say that no resume needs the batches before the number `before` any more."""
        self._num_released = before

    def make_room(self) -> None:
        """Delete what was released, if the journal is larger than it may be.

        Raises:
            JournalError: that is not enough.
        """
        if self.max_bytes is None:
            return
        paths = segments(self.directory)
        sizes = [path.stat().st_size for path in paths]
        while sum(sizes) > self.max_bytes:
            if len(paths) < 2 or first_batch_of(paths[1:]) > self._num_released:
                raise JournalError(
                    f"The journal {self.directory} has {sum(sizes)} bytes, journal_max_bytes is {self.max_bytes}.",
                    f"A resume needs the batches from {self._num_released} on, and segments are deleted whole.",
                    "Save checkpoints more often (--save_steps), lower --journal_segment_bytes, or raise "
                    "--journal_max_bytes.",
                )
            logger.info("Deleting %s: the newest checkpoint does not need it", paths[0])
            paths.pop(0).unlink()
            sizes.pop(0)

    def _open_segment(self, number: int) -> Path:
        paths = segments(self.directory)
        if paths and paths[-1].stat().st_size < self.segment_bytes:
            return paths[-1]
        return self.directory / f"rollouts-{number:08d}.jsonl"


def segments(directory: Path) -> list[Path]:
    """The segments of a journal, oldest first; none if the directory does not exist."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := SEGMENT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def first_batch_of(paths: Sequence[Path]) -> int:
    """Number of the first batch of these segments; 0 if there are none."""
    if not paths:
        return 0
    match = SEGMENT.fullmatch(paths[0].name)
    assert match is not None
    return int(match[1])


def read_lines(
    path: Path, *, may_be_cut: bool, lines: Iterator[bytes] | None = None
) -> Iterator[tuple[dict[str, Any], int | None]]:
    """Read the groups of a segment or of any file of groups.

    Yields each group without the journal's key, and the number of its batch, None if it does not have that key. With
    `may_be_cut`, an unfinished last line is left out with a warning: a trainer was killed while it wrote. `lines` are
    those of the file if it is not a plain one; `path` is named in errors.

    Raises:
        JournalError: the file cannot be read, or a line is damaged; the message has its number and the checksums.
    """
    number = 0
    try:
        for number, line in enumerate(lines if lines is not None else _lines(path), start=1):
            text = line.rstrip(b"\r\n")
            entry = _ENTRY.search(text, max(text.rfind(_KEY) - 1, 0))
            if entry is None:
                group = parse_json(text)
                if isinstance(group, dict):
                    yield group, None
                elif may_be_cut and not line.endswith(b"\n"):
                    logger.warning("Line %d of %s is unfinished and left out", number, path)
                elif text:
                    raise JournalError(
                        f"Line {number} of {path} is not a JSON object.",
                        "Such a file holds one `ScoredData` object per line, and only its last line may be unfinished.",
                        f"Look at it with `sed -n {number}p`, and mend or delete it.",
                    )
                continue
            body = text[: entry.start()] + b"}"
            values = json.loads(entry[1])
            found = f"{zlib.crc32(body):08x}"
            if found != values["crc32"]:
                raise JournalError(
                    f"Line {number} of {path} has the checksum {found}, it says {values['crc32']}.",
                    "The line was changed after it was written, or the disk returns something else than it was given.",
                    "Restore the file; or, to train the rest without this group, delete the line.",
                )
            yield json.loads(body), values["batch"]
    except OSError as exc:
        if isinstance(exc, JournalError):
            raise
        raise JournalError(
            f"The file {path} cannot be read beyond line {number}: {exc}.",
            "It does not exist, may not be read, or its disk fails.",
            "Check the path and its permissions.",
        ) from exc


def parse_json(line: bytes) -> Any:
    """The value of a line, or None if it is not JSON or not UTF-8."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def sync_directory(directory: Path) -> None:
    """Make the name of a new file survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file


def _make_line(group: dict[str, Any], batch: int, index: int) -> bytes:
    body = json.dumps(group, separators=(",", ":")).encode()
    comma = b"," if group else b""
    return b'%b%b"journal":{"batch":%d,"group":%d,"crc32":"%08x"}}\n' % (
        body[:-1],
        comma,
        batch,
        index,
        zlib.crc32(body),
    )


def _size_before_batch(path: Path, number: int) -> int:
    """Number of bytes of a segment up to the first line of a batch."""
    size = 0
    for line in _lines(path):
        entry = _ENTRY.search(line.rstrip(b"\r\n"))
        if entry is not None and json.loads(entry[1])["batch"] == number:
            break
        size += len(line)
    return size


def _cut_unfinished_line(file: BinaryIO, path: Path) -> None:
    size = file.seek(0, os.SEEK_END)
    end = _end_of_last_line(file, size)
    if end == size:
        return
    file.seek(end)
    if parse_json(file.read()) is not None:
        file.write(b"\n")  # whole but for the line end
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
