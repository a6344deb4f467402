"""The name under which the serving side remembers which policy sampled a sequence.

The Atropos wire carries no policy version. The server knows it for every sequence that it finishes, and the trainer
later holds the same token ids: a digest of the ids joins the two without the environment's help.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b


DIGEST_BYTES = 16


def rollout_key(token_ids: Iterable[int]) -> str:
    """Return the key of a sequence.

    Args:
        token_ids (`Iterable[int]`):
            Prompt and completion ids, in order, without padding.

    Returns:
        `str`: 32 hexadecimal digits; equal for equal sequences on machines of the same byte order.
    """
    return blake2b(array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES).hexdigest()


def prefix_keys(token_ids: Sequence[int], lengths: Iterable[int]) -> list[str]:
    """Return the keys of prefixes of a sequence, in one pass over it.

    Args:
        token_ids (`Sequence[int]`):
            The sequence.
        lengths (`Iterable[int]`):
            Numbers of tokens, ascending.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    keys, start = [], 0
    for length in lengths:
        digest.update(array("q", token_ids[start:length]).tobytes())
        keys.append(digest.hexdigest())
        start = length
    return keys
