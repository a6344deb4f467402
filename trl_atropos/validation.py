"""One answer of `/batch` -> typed, checked rollouts. The only file that knows the wire format (Atropos' `ScoredData`).

Shape letters: G rollouts of one group, T tokens of one rollout.

How this wire is read:

- `null`, missing and `[]` mean the same for every optional field, and so does a list of G empty entries: atroposlib's
  default collector sends `[]` and `{}` for what an environment does not provide.
- `masks` carry token ids, not 0 and 1: -100 where a token is not trained, the token's own id where it is. -100 may
  come back in the middle (tool and user turns).
- 1.0 in a list of logprobs means "no logprob here" (`types.MISSING_LOGPROB`).
- Token 0 has no prediction: whatever its mask says, it never counts as trained.
- `messages` and the `distill_*` fields are not read.
"""

from __future__ import annotations

import json
import math
import sys
from array import array
from dataclasses import dataclass
from typing import Any

import torch

from .errors import AtroposProtocolError
from .types import IGNORE_INDEX, MISSING_LOGPROB, RejectedGroup, Rollout, RolloutBatch, RolloutGroup


MAX_POSITIVE_LOGPROB = 1e-3
"""Largest value above 0 that passes as a rounding error of a logprob; it is clamped to 0."""

_LIST_FIELDS = ("tokens", "masks", "scores", "advantages", "inference_logprobs", "ref_logprobs")

_SCORED_DATA_FIX = "In the env, look at how the `ScoredDataGroup` is filled in `collect_trajectories`."
_MASK_WHY = "Atropos' masks carry token ids: -100 where a token is not trained, the token's own id where it is."
_MASK_FIX = "In the env, send ManagedServer's `masked_tokens`, or `[t if trained else -100 for t in tokens]`."
_LOGPROB_FIX = "In the env, build rollouts with ManagedServer, or leave `{name}` out of the group."

# name of a field -> why its shape and its values matter, how to mend them
_HELP = {
    "tokens": ("`tokens` holds one list of token ids per rollout, prompt and completion, unpadded.", _SCORED_DATA_FIX),
    "masks": (_MASK_WHY, _MASK_FIX),
    "scores": ("Every rollout needs one finite score: one bad number spoils its whole group.", _SCORED_DATA_FIX),
    "advantages": (
        "Token-level advantages need one number per token, for every rollout of the group or for none.",
        "In the env, send a list as long as `tokens` for each rollout, or leave `advantages` out of the group.",
    ),
    "inference_logprobs": (
        "The importance ratio needs one logprob per token, at most 0.",
        _LOGPROB_FIX.format(name="inference_logprobs"),
    ),
    "ref_logprobs": ("The KL term needs one logprob per token, at most 0.", _LOGPROB_FIX.format(name="ref_logprobs")),
}


@dataclass(frozen=True)
class WireLimits:
    """What the model can take: bounds that the wire itself does not know.

    Args:
        vocab_size (`int`):
            Rows of the model's embedding. Token ids are in `[0, vocab_size)`.
        max_length (`int`):
            Longest rollout in tokens, prompt included.
    """

    vocab_size: int
    max_length: int


def parse_batch(raw_groups: object, limits: WireLimits) -> RolloutBatch:
    """Checks every group of one answer of `/batch` and keeps the good ones.

    Args:
        raw_groups (`list[dict]`):
            The value of `"batch"`, as JSON gave it.
        limits ([`WireLimits`]):
            Bounds of the model.

    Returns:
        [`RolloutBatch`]: the good groups, in the order of the wire; the bad ones in `rejected`, each with its error.

    Raises:
        AtroposProtocolError: `raw_groups` is not a list, is empty, or holds something that is not an object. A bad
            group does not raise.
    """
    if not isinstance(raw_groups, list) or not raw_groups:
        raise _not_a_batch(f"The batch is {_show(raw_groups)}, not a list of groups.")
    for index, raw in enumerate(raw_groups):
        if not isinstance(raw, dict):
            raise _not_a_batch(f"Group {index} of the batch is {_show(raw)}, not an object.")

    groups, rejected = [], []
    for index, raw in enumerate(raw_groups):
        try:
            groups.append(parse_group(raw, limits, index=index))
        except AtroposProtocolError as error:
            env_id, tokens = raw.get("env_id"), raw.get("tokens")
            rejected.append(
                RejectedGroup(
                    index=index,
                    env_id=env_id if type(env_id) is int else None,
                    num_rollouts=len(tokens) if isinstance(tokens, list) else 0,
                    error=error,
                )
            )
    return RolloutBatch(groups=tuple(groups), rejected=tuple(rejected))


def parse_group(raw: object, limits: WireLimits, *, index: int = 0) -> RolloutGroup:
    """Checks one group of the wire and makes tensors of it.

    Args:
        raw (`dict`):
            One `ScoredData` object, as JSON gave it.
        limits ([`WireLimits`]):
            Bounds of the model.
        index (`int`, *optional*, defaults to 0):
            Position in the batch, from 0; named in the error.

    Returns:
        [`RolloutGroup`]: G rollouts whose tensors have shape `(T,)`.

    Raises:
        AtroposProtocolError: anything in the group that cannot be trained; the message names group, rollout, field,
            position and value.
    """
    where = f"Group {index}"
    if not isinstance(raw, dict):
        raise _not_a_batch(f"{where} is {_show(raw)}, not an object.")
    _refuse_images(raw.get("images"), where)
    env_id = None if _is_absent(raw.get("env_id")) else raw["env_id"]
    if env_id is not None and type(env_id) is not int:
        raise _wrong(f"{where}: `env_id` is {_show(env_id)}.", "It is the API's number of the environment.")

    tokens = raw.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _bad("tokens", f"{where}: `tokens` is {_show(tokens)}; a group has at least one rollout.")
    columns = {name: _column(raw, name, len(tokens), where) for name in _LIST_FIELDS}
    scores = _numbers(columns["scores"], "scores", where)
    # In float32, because that is what the advantages are computed in.
    infinite = ~scores.float().isfinite()
    if bool(infinite.any()):
        position = int(infinite.nonzero()[0])
        raise _bad("scores", f"{where}, rollout {position}: the score is {_show(columns['scores'][position])}.")

    options = _overrides(raw.get("overrides"), len(tokens), where)
    overridden = _temperature(raw.get("group_overrides"), f"{where}: `group_overrides`")
    generated = _temperature(raw.get("generation_params"), f"{where}: `generation_params`")
    group_temperature = overridden if generated is None else generated
    rollouts = tuple(
        _parse_rollout(
            {name: column[i] for name, column in columns.items() if name != "scores"},
            float(scores[i]),
            options[i],
            group_temperature,
            limits,
            f"{where}, rollout {i}",
        )
        for i in range(len(tokens))
    )
    return RolloutGroup(rollouts=rollouts, env_id=env_id)


def _parse_rollout(
    row: dict[str, Any],
    reward: float,
    options: dict[str, Any],
    group_temperature: float | None,
    limits: WireLimits,
    where: str,
) -> Rollout:
    """Checks one rollout. `row` maps a field to its list for this rollout, None where an optional field is absent."""
    input_ids = _token_ids(row["tokens"], limits, where)
    for name, values in row.items():
        if isinstance(values, list) and len(values) != input_ids.numel():
            raise _bad(name, f"{where}: `{name}` has {len(values)} entries, `tokens` has {input_ids.numel()}.")
    labels = _labels(row["masks"], input_ids, where)
    trained = labels != IGNORE_INDEX
    trained[0] = False
    if not bool(trained.any()):
        raise _bad("masks", f"{where}: none of its {input_ids.numel()} tokens is trained (token 0 never counts).")

    set_advantage_to_zero = options.get("set_advantage_to_zero")
    if set_advantage_to_zero is not None and type(set_advantage_to_zero) is not bool:
        raise _wrong(
            f"{where}: `set_advantage_to_zero` in `overrides` is {_show(set_advantage_to_zero)}.",
            "It is true or false.",
        )
    temperature = _temperature(options, f"{where}: `overrides`")
    return Rollout(
        input_ids=input_ids,
        labels=labels,
        reward=reward,
        advantages=_advantages(row["advantages"], trained, where),
        inference_logprobs=_logprobs(row["inference_logprobs"], "inference_logprobs", trained, where),
        ref_logprobs=_logprobs(row["ref_logprobs"], "ref_logprobs", trained, where),
        set_advantage_to_zero=bool(set_advantage_to_zero),
        temperature=group_temperature if temperature is None else temperature,
    )


def _token_ids(values: object, limits: WireLimits, where: str) -> torch.Tensor:
    if not isinstance(values, list) or not values:
        raise _bad("tokens", f"{where}: `tokens` is {_show(values)}; a rollout has at least one token.")
    if len(values) > limits.max_length:
        raise _wrong(
            f"{where}: it has {len(values)} tokens, `max_length` is {limits.max_length}.",
            "A rollout is trained whole or not at all: a cut one would earn its reward for tokens it does not hold.",
            "Raise `--max_length`, or lower the env's `max_tokens` per completion.",
        )
    input_ids = _integers(values, "tokens", where)
    outside = (input_ids < 0) | (input_ids >= limits.vocab_size)
    if bool(outside.any()):
        position = int(outside.nonzero()[0])
        raise _wrong(
            f"{where}: `tokens` has {values[position]} at position {position}, the vocabulary has "
            f"{limits.vocab_size} entries.",
            "The env tokenises with another tokenizer than the trainer's model has.",
            "Give the env the model's own tokenizer (`--env.tokenizer_name` and `--openai.tokenizer_name`).",
        )
    return input_ids


def _labels(values: object, input_ids: torch.Tensor, where: str) -> torch.Tensor:
    labels = _integers(values, "masks", where)
    wrong = (labels != IGNORE_INDEX) & (labels != input_ids)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        zero_one = " All entries are 0 or 1." if bool(((labels == 0) | (labels == 1)).all()) else ""
        raise _bad(
            "masks",
            f"{where}: `masks` has {int(labels[position])} at position {position}, `tokens` has "
            f"{int(input_ids[position])}.{zero_one}",
        )
    return labels


def _advantages(values: object, trained: torch.Tensor, where: str) -> torch.Tensor | None:
    if values is None:
        return None
    advantages = _numbers(values, "advantages", where).float()
    _refuse(trained & ~advantages.isfinite(), values, "advantages", where)
    return torch.where(trained, advantages, torch.zeros(()))


def _logprobs(values: object, name: str, trained: torch.Tensor, where: str) -> torch.Tensor | None:
    """NaN where the wire has no logprob; None if it has none for any trained token."""
    if values is None:
        return None
    logprobs = _numbers(values, name, where).float()
    missing = logprobs == MISSING_LOGPROB
    usable = logprobs.isfinite() & (logprobs <= MAX_POSITIVE_LOGPROB)
    _refuse(trained & ~missing & ~usable, values, name, where)
    if bool((trained & missing).any()):
        return None
    return torch.where(usable, logprobs.clamp(max=0.0), torch.full((), math.nan))


def _refuse(bad: torch.Tensor, values: Any, name: str, where: str) -> None:
    if bool(bad.any()):
        position = int(bad.nonzero()[0])
        raise _bad(name, f"{where}: `{name}` has {_show(values[position])} at the trained position {position}.")


def _column(raw: dict[str, Any], name: str, num_rollouts: int, where: str) -> list[Any]:
    """One entry per rollout; an absent optional field becomes G times None."""
    column, required = raw.get(name), name in ("tokens", "masks", "scores")
    if not required and _is_absent(column):
        return [None] * num_rollouts
    if not isinstance(column, list):
        raise _bad(name, f"{where}: `{name}` is {_show(column)}, not a list with one entry per rollout.")
    if len(column) != num_rollouts:
        raise _bad(name, f"{where}: `{name}` has {len(column)} entries, the group has {num_rollouts} rollouts.")
    if required:
        return column
    if name == "advantages" and any(entry in (None, []) for entry in column):
        position = next(i for i, entry in enumerate(column) if entry in (None, []))
        raise _bad(name, f"{where}, rollout {position}: it has no `advantages`, others of its group have them.")
    return [None if entry in (None, []) else entry for entry in column]


def _overrides(value: object, num_rollouts: int, where: str) -> list[dict[str, Any]]:
    """One object per rollout: the wire may send fewer, or empty entries."""
    if value is None:
        value = []
    if not isinstance(value, list) or len(value) > num_rollouts:
        raise _wrong(
            f"{where}: `overrides` is {_show(value)}, the group has {num_rollouts} rollouts.",
            "It is a list with at most one object per rollout.",
        )
    options: list[dict[str, Any]] = [{} for _ in range(num_rollouts)]
    for i, entry in enumerate(value):
        if isinstance(entry, dict):
            options[i] = entry
        elif entry not in (None, []):
            raise _wrong(f"{where}, rollout {i}: its entry of `overrides` is {_show(entry)}.", "It is an object.")
    return options


def _temperature(source: object, where: str) -> float | None:
    if source is None or source == []:
        return None
    if not isinstance(source, dict):
        raise _wrong(f"{where} is {_show(source)}.", "It is an object.")
    value = source.get("temperature")
    if value is None:
        return None
    # Python compares integers of any size with floats, and every comparison with NaN is false.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise _wrong(
            f"{where} has the temperature {_show(value)}.",
            "Logits are divided by the sampling temperature: it is a finite number above 0.",
        )
    return float(value)


def _refuse_images(value: object, where: str) -> None:
    if not _is_absent(value):
        raise _wrong(
            f"{where}: it has `images`.",
            "Only text is trained: without its images the rollout has other probabilities than when it was sampled.",
            "Use an environment without images.",
        )


def _is_absent(value: object) -> bool:
    return value in (None, [], {}) or (isinstance(value, list) and all(entry in (None, [], {}) for entry in value))


def _integers(values: object, name: str, where: str) -> torch.Tensor:
    return _tensor(values, {int}, "q", torch.int64, "an integer", name, where)


def _numbers(values: object, name: str, where: str) -> torch.Tensor:
    return _tensor(values, {int, float}, "d", torch.float64, "a number", name, where)


def _tensor(
    values: object, types: set[type], typecode: str, dtype: torch.dtype, expected: str, name: str, where: str
) -> torch.Tensor:
    """One list, not empty -> one tensor. `typecode`: of `array.array`, three times as fast as `torch.tensor`."""
    if not isinstance(values, list):
        raise _bad(name, f"{where}: `{name}` is {_show(values)}, not a list.")
    # Exact types, because both constructors take True for 1 in silence.
    if not set(map(type, values)) <= types:
        position = next(i for i, value in enumerate(values) if type(value) not in types)
        raise _bad(name, f"{where}: `{name}` has {_show(values[position])} at position {position}, not {expected}.")
    try:
        return torch.frombuffer(array(typecode, values), dtype=dtype)
    except OverflowError as exc:
        position = max(range(len(values)), key=lambda i: abs(values[i]) if type(values[i]) is int else 0)
        raise _bad(name, f"{where}: `{name}` has {_show(values[position])} at position {position}.") from exc


def _show(value: object) -> str:
    """A value as the wire wrote it, short enough for a message."""
    if isinstance(value, list):
        return f"a list of {len(value)} entries"
    if isinstance(value, dict):
        return f"an object with {len(value)} keys"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, int, float)):
        text = json.dumps(value)
        return text if len(text) <= 60 else f"{text[:60]}..."
    return f"a {type(value).__name__}"


def _bad(name: str, what: str) -> AtroposProtocolError:
    return AtroposProtocolError(what, *_HELP[name])


def _wrong(what: str, why: str, fix: str = _SCORED_DATA_FIX) -> AtroposProtocolError:
    return AtroposProtocolError(what, why, fix)


def _not_a_batch(what: str) -> AtroposProtocolError:
    return AtroposProtocolError(
        what,
        'Atropos answers /batch with `{"batch": [ScoredData, ...]}`.',
        "Check that the URL is that of `run-api`, or that the data file holds one ScoredData object per line.",
    )
