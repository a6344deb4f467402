"""The name under which the serving side remembers which policy sampled a completion, and what it remembers.

The Atropos wire carries no policy version. The server knows it for every sequence that it finishes, and the trainer
later holds the same token ids: a digest of the ids, and of where the completion begins, joins the two without the
environment's help. Completions that are equal after equal prompts share a key; the one sampled last counts.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Generic, TypeVar


DIGEST_BYTES = 16

MAX_REMEMBERED_CALLS = 65536
"""Bound of the table of calls: about 10 MB, and far more rollouts than any queue between server and trainer holds."""

Call = TypeVar("Call")


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


class RememberedCalls(Generic[Call]):
    """What is known of the calls that were answered last, each under its key."""

    def __init__(self) -> None:
        self._calls: OrderedDict[str, Call] = OrderedDict()

    def note(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], call: Call) -> None:
        """Remember a call, and forget the one that was noted longest ago if there are too many."""
        key = rollout_key([*prompt_ids, *completion_ids], len(prompt_ids))
        self._calls[key] = call
        self._calls.move_to_end(key)
        if len(self._calls) > MAX_REMEMBERED_CALLS:
            self._calls.popitem(last=False)

    def find(self, key: str) -> Call | None:
        """Return what is known of the call with this key; None if it was forgotten or never answered."""
        return self._calls.get(key)


def oldest_version(spans: Iterable[Mapping[str, Any]] | None) -> int | None:
    """The oldest policy that sampled any token of a completion, out of the `weight_versions` that vLLM and SGLang answer.

    None where they do not say: a server that was never published to labels its weights "default", which is no version of
    a trainer.
    """
    versions = [span["version"] for span in spans or []]
    if not versions or not all(version.isdecimal() for version in versions):
        return None
    return min(map(int, versions))


def oldest_of_calls(versions: Iterable[int | None]) -> int | None:
    """The oldest policy that sampled any token of a rollout, out of those of its calls.

    None where that of any call is not known, or there is no call: never a guess.
    """
    versions = list(versions)
    known = [version for version in versions if version is not None]
    return min(known) if known and len(known) == len(versions) else None
