"""One answer of `/batch` -> typed, checked rollouts.

No other file than this one, `teacher.py`, `options.py` and `fields.py` knows the wire format (Atropos'
`ScoredData`).

Shape letters: G rollouts of one group, T tokens of one rollout, K tokens that a teacher names for a position.

How this wire is read:

- `null`, missing and `[]` mean the same for every optional field, and so does a list of G empty entries: atroposlib's
  default collector sends `[]` and `{}` for what an environment does not provide.
- `masks` carry token ids, not 0 and 1: -100 where a token is not trained, the token's own id where it is. -100 may
  come back in the middle (tool and user turns).
- 1.0 in a list of logprobs means "no logprob here" (`types.MISSING_LOGPROB`).
- Token 0 has no prediction: whatever its mask says, it never counts as trained.
- `distill_token_ids` and `distill_logprobs` hold one list per token: the teacher's likeliest tokens in its place, `[]`
  where it named none. They are the largest fields of the wire, so they are read only if the run distils.
- `group_overrides.policy_version` is this package's own addition: the version of the policy that sampled the group, or
  a list with one, or `null`, per rollout.
- `messages` are for people. Malformed ones do not cost the group: they are left out and counted as unknown.
- What nobody reads is not an error: its name is in `RolloutGroup.unknown_fields`.

Everything that does not run along the tokens is read in `options.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AtroposProtocolError
from ..types import (
    IGNORE_INDEX,
    MISSING_LOGPROB,
    RejectedGroup,
    Rollout,
    RolloutBatch,
    RolloutGroup,
    RolloutOrigin,
)
from .fields import GroupRefused, are_logprobs, bad_field, bad_group, integers, numbers, refuse_trained, show
from .options import RolloutOptions, is_absent, parse_options
from .teacher import TEACHER_FIELDS, parse_teacher


_LIST_FIELDS = ("tokens", "masks", "scores", "advantages", "inference_logprobs", "ref_logprobs")


@dataclass(frozen=True)
class WireLimits:
    """What the model can take: bounds that the wire itself does not know.

    Token ids are in [0, `vocab_size`), the rows of the model's embedding. `max_length` is the longest rollout in
    tokens, prompt included. `reads_teacher` says whether the run distils; if not, `distill_token_ids` and
    `distill_logprobs` are not looked at, because they are the largest fields of the wire.
    """

    vocab_size: int
    max_length: int
    reads_teacher: bool = False


def parse_batch(raw_groups: object, limits: WireLimits, *, first_index: int = 0) -> RolloutBatch:
    """Checks every group of the value of `"batch"` in an answer of `/batch`, as JSON gave it, and keeps the good ones.

    The good groups come in the order of the wire; the bad ones are in `rejected`, each with its error, and do not
    raise. `first_index` is the number of the first one, if they are the later part of a batch.

    Raises:
        AtroposProtocolError: `raw_groups` is not a list, is empty, or holds something that is not an object.
    """
    if not isinstance(raw_groups, list) or not raw_groups:
        raise _not_a_batch(f"The batch is {show(raw_groups)}, not a list of groups.")
    for index, raw in enumerate(raw_groups, start=first_index):
        if not isinstance(raw, dict):
            raise _not_a_batch(f"Group {index} of the batch is {show(raw)}, not an object.")

    groups, rejected = [], []
    for index, raw in enumerate(raw_groups, start=first_index):
        try:
            groups.append(parse_group(raw, limits, index=index))
        except GroupRefused as error:
            env_id, tokens = raw.get("env_id"), raw.get("tokens")
            rejected.append(
                RejectedGroup(
                    index=index,
                    env_id=env_id if type(env_id) is int else None,
                    num_rollouts=len(tokens) if isinstance(tokens, list) else 0,
                    error=error,
                    reason=error.reason,
                )
            )
    return RolloutBatch(groups=tuple(groups), rejected=tuple(rejected))


def parse_group(raw: object, limits: WireLimits, *, index: int = 0) -> RolloutGroup:
    """Checks one `ScoredData` object, as JSON gave it, and makes tensors of it: (T,) each, those of a teacher (T, K).

    `index` is the position of the group in the batch, from 0.

    Raises:
        AtroposProtocolError: anything in the group that cannot be trained; the message names group, rollout, field,
            position and value.
    """
    where = f"Group {index}"
    if not isinstance(raw, dict):
        raise _not_a_batch(f"{where} is {show(raw)}, not an object.")
    env_id = None if is_absent(raw.get("env_id")) else raw["env_id"]
    if env_id is not None and type(env_id) is not int:
        raise bad_group(
            "env_id", f"{where}: `env_id` is {show(env_id)}.", "It is the API's number of the environment."
        )

    tokens = raw.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise bad_field("tokens", f"{where}: `tokens` is {show(tokens)}; a group has at least one rollout.")
    fields = _LIST_FIELDS + (TEACHER_FIELDS if limits.reads_teacher else ())
    columns = {name: _column(raw, name, len(tokens), where) for name in fields}
    scores = numbers(columns["scores"], "scores", where)
    # In float32, because that is what the advantages are computed in.
    infinite = ~scores.float().isfinite()
    if bool(infinite.any()):
        position = int(infinite.nonzero()[0])
        raise bad_field("scores", f"{where}, rollout {position}: the score is {show(columns['scores'][position])}.")

    options, unknown_fields = parse_options(raw, len(tokens), where)
    rollouts = tuple(
        _parse_rollout(
            {name: column[i] for name, column in columns.items() if name != "scores"},
            float(scores[i]),
            options[i],
            limits,
            RolloutOrigin(env_id=env_id, group=index, rollout=i),
        )
        for i in range(len(tokens))
    )
    return RolloutGroup(rollouts=rollouts, env_id=env_id, unknown_fields=unknown_fields)


def _parse_rollout(
    row: dict[str, Any],
    reward: float,
    options: RolloutOptions,
    limits: WireLimits,
    origin: RolloutOrigin,
) -> Rollout:
    """Checks one rollout. `row` maps a field to its list for this rollout, None where an optional field is absent."""
    where = f"Group {origin.group}, rollout {origin.rollout}"
    input_ids = _token_ids(row["tokens"], limits, where)
    for name, values in row.items():
        if isinstance(values, list) and len(values) != input_ids.numel():
            raise bad_field(name, f"{where}: `{name}` has {len(values)} entries, `tokens` has {input_ids.numel()}.")
    labels = _labels(row["masks"], input_ids, where)
    trained = labels != IGNORE_INDEX
    trained[0] = False
    if not bool(trained.any()):
        raise bad_field("masks", f"{where}: none of its {input_ids.numel()} tokens is trained (token 0 never counts).")

    teacher_token_ids, teacher_logprobs = parse_teacher(
        row.get("distill_token_ids"), row.get("distill_logprobs"), trained, limits.vocab_size, where
    )
    return Rollout(
        input_ids=input_ids,
        labels=labels,
        reward=reward,
        advantages=_advantages(row["advantages"], trained, where),
        inference_logprobs=_logprobs(row["inference_logprobs"], "inference_logprobs", trained, where),
        ref_logprobs=_logprobs(row["ref_logprobs"], "ref_logprobs", trained, where),
        set_advantage_to_zero=options.set_advantage_to_zero,
        temperature=options.temperature,
        policy_version=options.policy_version,
        teacher_token_ids=teacher_token_ids,
        teacher_logprobs=teacher_logprobs,
        origin=origin,
        messages=options.messages,
    )


def _token_ids(values: object, limits: WireLimits, where: str) -> torch.Tensor:
    if not isinstance(values, list) or not values:
        raise bad_field("tokens", f"{where}: `tokens` is {show(values)}; a rollout has at least one token.")
    if len(values) > limits.max_length:
        raise bad_group(
            "too_long",
            f"{where}: it has {len(values)} tokens, `max_length` is {limits.max_length}.",
            "A rollout is trained whole or not at all: a cut one would earn its reward for tokens it does not hold.",
            "Raise `--max_length`, or lower the env's `max_tokens` per completion.",
        )
    input_ids = integers(values, "tokens", where)
    outside = (input_ids < 0) | (input_ids >= limits.vocab_size)
    if bool(outside.any()):
        position = int(outside.nonzero()[0])
        raise bad_group(
            "vocabulary",
            f"{where}: `tokens` has {values[position]} at position {position}, the vocabulary has "
            f"{limits.vocab_size} entries.",
            "The env tokenises with another tokenizer than the trainer's model has.",
            "Give the env the model's own tokenizer (`--env.tokenizer_name` and `--openai.tokenizer_name`).",
        )
    return input_ids


def _labels(values: object, input_ids: torch.Tensor, where: str) -> torch.Tensor:
    labels = integers(values, "masks", where)
    wrong = (labels != IGNORE_INDEX) & (labels != input_ids)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        zero_one = " All entries are 0 or 1." if bool(((labels == 0) | (labels == 1)).all()) else ""
        raise bad_field(
            "masks",
            f"{where}: `masks` has {int(labels[position])} at position {position}, `tokens` has "
            f"{int(input_ids[position])}.{zero_one}",
        )
    return labels


def _advantages(values: object, trained: torch.Tensor, where: str) -> torch.Tensor | None:
    if values is None:
        return None
    advantages = numbers(values, "advantages", where).float()
    refuse_trained(trained & ~advantages.isfinite(), values, "advantages", where)
    return torch.where(trained, advantages, torch.zeros(()))


def _logprobs(values: object, name: str, trained: torch.Tensor, where: str) -> torch.Tensor | None:
    """NaN where the wire has no logprob; None if it has none for any trained token."""
    if values is None:
        return None
    logprobs = numbers(values, name, where).float()
    missing = logprobs == MISSING_LOGPROB
    usable = are_logprobs(logprobs)
    refuse_trained(trained & ~missing & ~usable, values, name, where)
    if bool((trained & missing).any()):
        return None
    return torch.where(usable, logprobs.clamp(max=0.0), torch.full((), math.nan))


def _column(raw: dict[str, Any], name: str, num_rollouts: int, where: str) -> list[Any]:
    """One entry per rollout; an absent optional field becomes G times None."""
    column, required = raw.get(name), name in ("tokens", "masks", "scores")
    if not required and is_absent(column):
        return [None] * num_rollouts
    if not isinstance(column, list):
        raise bad_field(name, f"{where}: `{name}` is {show(column)}, not a list with one entry per rollout.")
    if len(column) != num_rollouts:
        raise bad_field(name, f"{where}: `{name}` has {len(column)} entries, the group has {num_rollouts} rollouts.")
    if required:
        return column
    if name == "advantages" and any(entry in (None, []) for entry in column):
        position = next(i for i, entry in enumerate(column) if entry in (None, []))
        raise bad_field(name, f"{where}, rollout {position}: it has no `advantages`, others of its group have them.")
    return [None if entry in (None, []) else entry for entry in column]


def _not_a_batch(what: str) -> AtroposProtocolError:
    return AtroposProtocolError(
        what,
        'Atropos answers /batch with `{"batch": [ScoredData, ...]}`.',
        "Check that the URL is that of `run-api`, or that the data file holds one ScoredData object per line.",
    )
