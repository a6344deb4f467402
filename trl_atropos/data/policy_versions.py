"""Which policy sampled a rollout, of one call or of many.

The server remembers, for every call that it finished, the oldest policy that sampled any of its completion, under a
digest of prompt and completion and of the border between them (`rollout_key.py`). In a rollout of several turns each run
of trained tokens is one completion, and what lies before it is the prompt of that call. The end of sequence that a chat
template writes after the sampled one is masked, so a run ends where the call ended.

It also remembers the names of the parameters with which a call sampled another distribution than the policy's own.

The version is unknown where runs are not completions: two calls without a masked token between them look like one of
another prompt; an environment may cut a completion, mask a part of it, or train tokens of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..types import IGNORE_INDEX, Rollout, RolloutGroup, ServedCall
from ..wire.rollout_key import oldest_of_calls, span_keys


CallLookup = Callable[[Sequence[str]], Sequence["ServedCall | None"]]
"""Keys of calls -> what the server that answered each remembers of it; None where nobody knows."""


def with_policy_versions(groups: Sequence[RolloutGroup], lookup: CallLookup) -> list[RolloutGroup]:
    """Look up which policy sampled every rollout of a batch, and how, in one request.

    A rollout gets the version of the oldest policy that sampled any of its trained tokens; None where that of any run
    of trained tokens is unknown: never a guess. A version that the environment sent stays. It also gets the names of
    the parameters with which any of its calls sampled another distribution.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    keys = [
        span_keys(rollout.input_ids.tolist(), trained_spans(rollout)) if rollout.policy_version is None else []
        for rollout in rollouts
    ]
    answers = iter(lookup([key for of_rollout in keys for key in of_rollout]))
    found = iter(
        [
            _with_calls(rollout, [next(answers) for _ in of_rollout])
            for rollout, of_rollout in zip(rollouts, keys, strict=True)
        ]
    )
    return [replace(group, rollouts=tuple(next(found) for _ in group.rollouts)) for group in groups]


def set_policy_versions(
    groups: Sequence[RolloutGroup], versions: Sequence[Sequence[int | None]]
) -> list[RolloutGroup]:
    """Give every rollout of every group its version: `versions` has one row per group with one entry per rollout."""
    return [
        replace(
            group,
            rollouts=tuple(
                replace(rollout, policy_version=version) for rollout, version in zip(group.rollouts, row, strict=True)
            ),
        )
        for group, row in zip(groups, versions, strict=True)
    ]


def trained_spans(rollout: Rollout) -> list[tuple[int, int]]:
    """Runs of trained tokens: the first token of each and the one after its last, ascending."""
    is_trained = rollout.labels != IGNORE_INDEX
    changes = torch.diff(torch.nn.functional.pad(is_trained.int(), (1, 1)))
    starts, ends = (changes == 1).nonzero()[:, 0], (changes == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _with_calls(rollout: Rollout, calls: Sequence[ServedCall | None]) -> Rollout:
    """Give a rollout what is known of its calls, which are none if the environment sent the version."""
    known = [call for call in calls if call is not None]
    names = tuple(sorted({name for call in known for name in call.sampling_parameters}))
    version = oldest_of_calls(None if call is None else call.policy_version for call in calls)
    return replace(
        rollout,
        policy_version=rollout.policy_version if version is None else version,
        sampling_parameters=names,
    )
