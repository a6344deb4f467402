"""The name under which the serving side remembers which policy sampled a sequence.

The Atropos wire carries no policy version. The server knows it for every sequence that it finishes, and the trainer
later holds the same token ids: a digest of the ids joins the two without the environment's help.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b


def rollout_key(token_ids: Iterable[int]) -> str:
    """Return the key of a sequence.

    Args:
        token_ids (`Iterable[int]`):
            Prompt and completion ids, in order, without padding.

    Returns:
        `str`: 32 hexadecimal digits; equal for equal sequences on machines of the same byte order.
    """
    return blake2b(array("q", token_ids).tobytes(), digest_size=16).hexdigest()
