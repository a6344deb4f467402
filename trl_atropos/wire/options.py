"""What a group of the wire says besides its tokens: how it was sampled, how it is to be trained, what to show of it.

Shape letters: G rollouts of one group.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from .fields import bad_group, show


OPTIONS = {
    "overrides": frozenset({"set_advantage_to_zero", "temperature"}),
    # The environment itself uses the size of the group and the two of its teacher.
    "group_overrides": frozenset(
        {"temperature", "policy_version", "group_size", "skip_teacher_top_k", "teacher_top_k"}
    ),
    "generation_params": frozenset({"temperature"}),
}
"""Fields that hold objects -> their keys that somebody reads."""

_OTHER_FIELDS = frozenset(
    {
        "tokens",
        "masks",
        "scores",
        "advantages",
        "inference_logprobs",
        "ref_logprobs",
        "distill_token_ids",
        "distill_logprobs",
        "messages",
        "images",
        "env_id",
        "journal",  # not `ScoredData`: the journal's own key
    }
)
_OPTIONS_WHY = "It is an object."
_MAX_POLICY_VERSION = 2**63 - 1


@dataclass(frozen=True)
class RolloutOptions:
    """What the wire says about one rollout; the attributes are those of [`~types.Rollout`]."""

    set_advantage_to_zero: bool
    temperature: float | None
    policy_version: int | None
    messages: tuple[dict[str, Any], ...] | None


def is_absent(value: object) -> bool:
    """Whether the value of an optional field means that there is none."""
    return value in (None, [], {}) or (isinstance(value, list) and all(entry in (None, [], {}) for entry in value))


def parse_options(
    raw: dict[str, Any], num_rollouts: int, where: str
) -> tuple[tuple[RolloutOptions, ...], tuple[str, ...]]:
    """Reads `overrides`, `group_overrides`, `generation_params` and `messages` of one `ScoredData`; refuses `images`.

    `where` is how messages name the group. Returns the options of each of the `num_rollouts` rollouts, and what came
    with the group and is not read, each name once: fields that `ScoredData` does not have, malformed `messages`, and,
    as `overrides.top_p`, keys of the objects in which an environment may put anything.

    Raises:
        AtroposProtocolError: an option of the wrong type or outside of its range, or images.
    """
    if not is_absent(raw.get("images")):
        raise bad_group(
            "images",
            f"{where}: it has `images`.",
            "Only text is trained: without its images the rollout has other probabilities than when it was sampled.",
            "Use an environment without images.",
        )
    of_rollouts = _overrides(raw.get("overrides"), num_rollouts, where)
    of_group = _object(raw, "group_overrides", where)
    of_generation = _object(raw, "generation_params", where)
    overridden = _temperature(of_group, f"{where}: `group_overrides`")
    generated = _temperature(of_generation, f"{where}: `generation_params`")
    policy_versions = _policy_versions(of_group.get("policy_version"), num_rollouts, where)
    messages = _messages(raw.get("messages"), num_rollouts)
    options = []
    for i, of_rollout in enumerate(of_rollouts):
        temperature = _temperature(of_rollout, f"{where}, rollout {i}: `overrides`")
        if temperature is None:
            temperature = overridden if generated is None else generated
        options.append(
            RolloutOptions(
                set_advantage_to_zero=_set_advantage_to_zero(of_rollout, f"{where}, rollout {i}"),
                temperature=temperature,
                policy_version=policy_versions[i],
                messages=None if messages is None else messages[i],
            )
        )
    objects = {"overrides": of_rollouts, "group_overrides": [of_group], "generation_params": [of_generation]}
    unknown = [name for name in raw if name not in OPTIONS and name not in _OTHER_FIELDS]
    unknown += ["messages"] if messages is None else []
    unknown += [
        f"{name}.{key}" for name, group in objects.items() for o in group for key in o if key not in OPTIONS[name]
    ]
    return tuple(options), tuple(dict.fromkeys(unknown))


def _object(raw: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    value = raw.get(name)
    if value is None or value == []:
        return {}
    if not isinstance(value, dict):
        raise bad_group(name, f"{where}: `{name}` is {show(value)}.", _OPTIONS_WHY)
    return value


def _overrides(value: object, num_rollouts: int, where: str) -> list[dict[str, Any]]:
    """One object per rollout: the wire may send fewer, or empty entries."""
    if value in (None, {}):
        value = []
    if not isinstance(value, list) or len(value) > num_rollouts:
        raise bad_group(
            "overrides",
            f"{where}: `overrides` is {show(value)}, the group has {num_rollouts} rollouts.",
            "It is a list with at most one object per rollout.",
        )
    options: list[dict[str, Any]] = [{} for _ in range(num_rollouts)]
    for i, entry in enumerate(value):
        if isinstance(entry, dict):
            options[i] = entry
        elif entry not in (None, []):
            raise bad_group(
                "overrides", f"{where}, rollout {i}: its entry of `overrides` is {show(entry)}.", _OPTIONS_WHY
            )
    return options


def _set_advantage_to_zero(options: dict[str, Any], where: str) -> bool:
    value = options.get("set_advantage_to_zero")
    if value is not None and type(value) is not bool:
        raise bad_group(
            "overrides",
            f"{where}: `set_advantage_to_zero` in `overrides` is {show(value)}.",
            "It is true or false.",
        )
    return bool(value)


def _temperature(options: dict[str, Any], where: str) -> float | None:
    value = options.get("temperature")
    if value is None:
        return None
    # Python compares integers of any size with floats, and every comparison with NaN is false.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise bad_group(
            "temperature",
            f"{where} has the temperature {show(value)}.",
            "Logits are divided by the sampling temperature: it is a finite number above 0.",
        )
    return float(value)


def _policy_versions(value: object, num_rollouts: int, where: str) -> list[int | None]:
    """One version for the group, or a list with one or `null` per rollout."""
    versions: list[Any]
    if not isinstance(value, list):
        versions = [value] * num_rollouts
    elif not value:
        versions = [None] * num_rollouts
    else:
        versions = value
    wrong = [v for v in versions if v is not None and (type(v) is not int or not 0 <= v <= _MAX_POLICY_VERSION)]
    if wrong or len(versions) != num_rollouts:
        found = f"has {show(wrong[0])}" if wrong else f"is {show(value)}, the group has {num_rollouts} rollouts"
        raise bad_group(
            "policy_version",
            f"{where}: `policy_version` in `group_overrides` {found}.",
            "It is a count of published policies from 0 on, for the group, or a list with one or null per rollout.",
            "In the env, send the `weight_version` that the server answered with, or leave `policy_version` out.",
        )
    return versions


def _messages(value: object, num_rollouts: int) -> list[tuple[dict[str, Any], ...] | None] | None:
    """The turns of each rollout, None where it has none; None if they are malformed.

    They are for people, so that malformed ones do not cost the group: they are not shown, and counted as unknown.
    """
    if is_absent(value):
        return [None] * num_rollouts
    if not isinstance(value, list) or len(value) != num_rollouts:
        return None
    conversations = [None if turns in (None, [], {}) else turns for turns in value]
    if not all(turns is None or (isinstance(turns, list) and all(map(_is_turn, turns))) for turns in conversations):
        return None
    return [None if turns is None else tuple(turns) for turns in conversations]


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()
