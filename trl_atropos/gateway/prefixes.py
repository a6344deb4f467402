"""Which server has computed the beginning of a prompt, and has it in its prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b
from typing import Generic, TypeVar


Place = TypeVar("Place")

CHUNK_BYTES = 256
"""Beginnings are compared in steps of so many bytes: some 50 token ids in JSON, or 60 tokens of text."""

MAX_BEGINNINGS = 65_536
"""Bound of what is remembered, some 10 MB."""


class Prefixes(Generic[Place]):
    """Remembers where beginnings of prompts went.

    A prompt has one beginning for each `CHUNK_BYTES` bytes, and its whole. The ones used last are kept.
    """

    def __init__(self, max_beginnings: int = MAX_BEGINNINGS):
        self._max_beginnings = max_beginnings
        self._places: OrderedDict[bytes, Place] = OrderedDict()

    def find(self, prompt: bytes) -> tuple[Place | None, float]:
        """Return where the longest known beginning of a prompt went, and its share of the prompt, 0 to 1.

        None, 0 where no beginning is known.
        """
        place, num_bytes = None, 0
        for end, digest in _beginnings(prompt):
            if digest not in self._places:
                break
            self._places.move_to_end(digest)
            place, num_bytes = self._places[digest], end
        return place, num_bytes / max(len(prompt), 1)

    def note(self, prompt: bytes, place: Place) -> None:
        """Remember that a prompt went there."""
        for _, digest in _beginnings(prompt):
            self._places[digest] = place
            self._places.move_to_end(digest)
        while len(self._places) > self._max_beginnings:
            self._places.popitem(last=False)


def _beginnings(prompt: bytes) -> Iterator[tuple[int, bytes]]:
    """Length in bytes and digest of each beginning, the shortest first."""
    state = blake2b(digest_size=16)
    for start in range(0, len(prompt), CHUNK_BYTES):
        chunk = prompt[start : start + CHUNK_BYTES]
        state.update(chunk)
        yield start + len(chunk), state.digest()
