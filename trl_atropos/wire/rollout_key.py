"""The name under which the serving side remembers which policy sampled a completion.

The Atropos wire carries no policy version. The server knows it for every sequence that it finishes, and the trainer
later holds the same token ids: a digest of the ids, and of where the completion begins, joins the two without the
environment's help. Completions that are equal after equal prompts share a key; the one sampled last counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b


DIGEST_BYTES = 16


def rollout_key(token_ids: Sequence[int], num_prompt_tokens: int) -> str:
    """The key of what one call sampled, as 32 hexadecimal digits.

    `token_ids` are prompt and completion without padding; the first `num_prompt_tokens` of them were given to the
    call. The same ids with another border are another call's. Equal arguments give equal keys on machines of the same
    byte order.
    """
    return span_keys(token_ids, [(num_prompt_tokens, len(token_ids))])[0]


def span_keys(token_ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> list[str]:
    """The keys of the calls that sampled parts of a sequence, in one pass over it.

    `spans` are start and end of what each call sampled, ascending: the prompt of a call is everything before its
    start.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    keys, num_digested = [], 0
    for start, end in spans:
        digest.update(array("q", token_ids[num_digested:end]).tobytes())
        num_digested = end
        of_span = digest.copy()
        of_span.update(array("q", [start]).tobytes())
        keys.append(of_span.hexdigest())
    return keys
