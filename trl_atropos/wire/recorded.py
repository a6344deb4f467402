"""Recorded or hand-made groups as a source of batches: training without a server.

What is read: a journal, a file of groups (`.jsonl`, plain or `.gz`, one `ScoredData` object per line: a segment of a
journal, or what atroposlib's `--env.data_path_to_save_groups` writes), or a dataset with one group per row.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import JournalError, PreflightError
from ..progress import Reminder
from ..types import IGNORE_INDEX, START, Position
from .journal import read_lines, segments


logger = logging.getLogger(__name__)

T = TypeVar("T")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class DataSummary:
    """What one pass over the data found: the number of rollouts of each group, and how many a batch holds at most."""

    group_sizes: Sequence[int]
    batch_size: int

    @property
    def num_batches(self) -> int:
        """Optimizer steps of a pass."""
        return self._num_packed(0, None)

    def end(self, num_passes: float) -> Position:
        """Where that many passes end; a part of a pass is rounded down to whole batches."""
        whole, rest = divmod(int(self.num_batches * num_passes), self.num_batches)
        packed = itertools.islice(pack(self.group_sizes, self.batch_size, int), rest)
        return Position(whole, sum(len(batch) for batch in packed))

    def count_batches(self, first: Position, end: Position) -> int:
        """Optimizer steps between two places."""
        if first.batch == end.batch:
            return self._num_packed(first.group, end.group)
        num_whole = max(end.batch - first.batch - 1, 0)
        return self._num_packed(first.group, None) + num_whole * self.num_batches + self._num_packed(0, end.group)

    def _num_packed(self, first: int, end: int | None) -> int:
        return sum(1 for _ in pack(self.group_sizes[first:end], self.batch_size, int))


class OfflineData:
    """Groups in the order of the data, dealt to batches of at most `batch_size` rollouts; groups are never split.

    `data_path` is a journal directory, a `.jsonl` or `.jsonl.gz` file, a directory written by `Dataset.save_to_disk`,
    or a dataset's id on the Hub, whose `train` split is read.

    Raises:
        PreflightError: there is no such data.
    """

    def __init__(self, data_path: str, batch_size: int):
        self.data_path = data_path
        self.batch_size = batch_size
        path = Path(data_path)
        self._files = segments(path) if path.is_dir() else [path] if path.exists() else []
        if path.exists():
            is_dataset = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
            if not self._files and not is_dataset:
                raise PreflightError(
                    f"The directory {data_path} holds neither a journal nor a dataset.",
                    "--data_path takes a journal (rollouts-*.jsonl), a file of groups, a directory written by "
                    "Dataset.save_to_disk, or a dataset's id.",
                    "Give the directory `journal` of a run, or the file itself.",
                )
        elif path.suffix in (".jsonl", ".json", ".gz") or not _HUB_ID.fullmatch(data_path):
            raise PreflightError(
                f"--data_path {data_path} does not exist.",
                "Neither a file nor a directory has this name, and it is not a dataset's id.",
                "Check the path.",
            )

    def summarize(self) -> DataSummary:
        """Read everything once and count.

        Raises:
            JournalError: a line cannot be read.
            PreflightError: there is nothing to train, or a group is larger than a batch.
        """
        sizes: list[int] = []
        has_trained_token = False
        reminder = Reminder()
        for index, group in enumerate(self._groups()):
            sizes.append(num_rollouts(group))
            if sizes[-1] > self.batch_size:
                raise PreflightError(
                    f"Group {index} of {self.data_path} has {sizes[-1]} rollouts, a batch has {self.batch_size}.",
                    "Groups are not split.",
                    "Raise --per_device_train_batch_size or --gradient_accumulation_steps.",
                )
            has_trained_token = has_trained_token or _has_trained_token(group)
            if reminder.is_due():
                logger.info("Reading %s: %d groups so far", self.data_path, len(sizes))
        if not has_trained_token:
            found = f"{len(sizes)} groups, none of which has a trained token" if sizes else "no group"
            raise PreflightError(
                f"--data_path {self.data_path} holds {found}.",
                "A group has `tokens`, `scores`, and `masks` that are the token's id where it is trained and -100 elsewhere.",
                "Give another file, or record one: a run writes its rollouts to output_dir/journal.",
            )
        return DataSummary(sizes, self.batch_size)

    def batches(self, end: Position, first: Position = START) -> Iterator[tuple[Position, list[dict[str, Any]]]]:
        """The batches from `first` up to `end`, each with its place, one pass after the other.

        What lies before `first` was trained before a resume, perhaps in batches of another size.
        """
        for number in range(first.batch, end.batch + 1):
            index = first.group if number == first.batch else 0
            last = end.group if number == end.batch else None
            for batch in pack(itertools.islice(self._groups(), index, last), self.batch_size, num_rollouts):
                yield Position(number, index), batch
                index += len(batch)

    def _groups(self) -> Iterator[dict[str, Any]]:
        if not self._files:
            yield from _dataset_rows(self.data_path)
        for path in self._files:
            lines = _gzip_lines(path) if path.suffix == ".gz" else None
            for group, _ in read_lines(path, may_be_cut=path == self._files[-1], lines=lines):
                yield group


def pack(items: Iterable[T], batch_size: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Deal items, in order, to batches of at most `batch_size`, by the `size` of each; a larger one is a batch."""
    batch: list[T] = []
    total = 0
    for item in items:
        if batch and total + size(item) > batch_size:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


def num_rollouts(group: dict[str, Any]) -> int:
    """Number of rollouts of a group as JSON gave it; 1 if that cannot be told: validation says why."""
    tokens = group.get("tokens")
    return len(tokens) if isinstance(tokens, list) else 1


def _has_trained_token(group: dict[str, Any]) -> bool:
    masks = group.get("masks")
    rows = masks if isinstance(masks, list) else []
    return any(isinstance(row, list) and any(value != IGNORE_INDEX for value in row[1:]) for row in rows)


def _gzip_lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise JournalError(
            f"The compressed file {path} is damaged: {exc}.",
            "It was cut off, or is not compressed with gzip.",
            "Save what can be read with `zcat FILE > NEW_FILE.jsonl`, and give that.",
        ) from exc


def _dataset_rows(data_path: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        if os.path.isdir(data_path):
            dataset = datasets.load_from_disk(data_path)
            dataset = dataset["train"] if isinstance(dataset, datasets.DatasetDict) else dataset
        else:
            dataset = datasets.load_dataset(data_path, split="train")
    except (OSError, ValueError, KeyError) as exc:
        raise PreflightError(
            f"--data_path {data_path} cannot be loaded as a dataset: {exc}.",
            "It is neither a file, nor a directory of `Dataset.save_to_disk`, nor a dataset with a `train` split that the "
            "Hub has.",
            "Check the name; without a network, download the dataset first and give its directory.",
        ) from exc
    yield from dataset
