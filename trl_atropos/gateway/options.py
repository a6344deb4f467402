"""The options of a gateway."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import PreflightError
from ..options import PositiveFloat, PositiveInt, check_declared


logger = logging.getLogger(__name__)

TEMPERATURE_VARIABLE = "TRL_ATROPOS_TEMPERATURE"
"""Tells an environment the sampling temperature of the trainer that its launch starts."""

SCALE_REWARDS_VARIABLE = "TRL_ATROPOS_SCALE_REWARDS"
"""Tells an environment the `--scale_rewards` of the trainer that its launch starts."""

GROUP, NONE = "group", "none"
"""Values of `--scale_rewards` that can be followed where the rewards of one task are known, and not those of a whole batch."""

MASK, LIFT, REFUSE = "mask", "lift", "refuse"
TEMPLATE, KEEP = "template", "keep"


@dataclass(frozen=True)
class GatewayOptions:
    """What agents may do, and how what they sample is recorded. The commands and docs/agents.md show `help`.

    Raises:
        ValueError: An option is not what its field declares.
    """

    temperature: PositiveFloat = field(
        default=1.0, metadata={"help": "temperature of all sampling, whatever agents ask for; the trainer's"}
    )
    grammar: str = field(
        default=MASK,
        metadata={
            "help": "what becomes of a turn that is to be sampled under a grammar (forced tool calls, JSON schemas): sampled and "
            "not trained, sampled without the grammar, or refused",
            "choices": (MASK, LIFT, REFUSE),
        },
    )
    thinking: str = field(
        default=TEMPLATE,
        metadata={
            "help": "where the chat template leaves out thoughts of earlier turns: follow it, which branches, or keep them",
            "choices": (TEMPLATE, KEEP),
        },
    )
    max_turns: PositiveInt = field(default=256, metadata={"help": "answers of one session"})
    max_session_tokens: PositiveInt = field(
        default=1_000_000, metadata={"help": "tokens of one session, each counted once: prompts and what was sampled"}
    )
    max_rollout_tokens: PositiveInt = field(
        default=1_000_000,
        metadata={
            "help": "tokens of one conversation, prompt and answers, if the servers take as many; the trainer's"
        },
    )
    max_body_bytes: PositiveInt = field(default=16 * 2**20, metadata={"help": "bytes of one request"})
    max_sessions: PositiveInt = field(default=4096, metadata={"help": "sessions that are open at once"})
    max_in_flight: PositiveInt = field(default=256, metadata={"help": "requests of agents that are answered at once"})
    idle_s: PositiveFloat = field(
        default=3600.0, metadata={"help": "seconds without a request after which a session is given up"}
    )
    server_wait_s: PositiveFloat = field(
        default=600.0, metadata={"help": "seconds for which a request waits for a server that is there"}
    )
    keep_alive_s: PositiveFloat = field(
        default=5.0, metadata={"help": "seconds between signs of life on a stream that waits for its answer"}
    )

    def __post_init__(self) -> None:
        check_declared(self, GatewayOptions)


def describe(name: str) -> dict[str, Any]:
    """What the declaration of an option says of it: `help`, and `choices` where it has them."""
    return dict(GatewayOptions.__dataclass_fields__[name].metadata)


def with_temperature_of_trainer(options: GatewayOptions, variables: Mapping[str, str]) -> GatewayOptions:
    """The options of an environment, at the temperature that its launch tells it in `variables`, if any. One of their own that is
    not the default stays: each group names the temperature at which it was sampled, and the trainer scores it at that one.

    Raises:
        PreflightError: It is told something else than a number above 0.
    """
    told = variables.get(TEMPERATURE_VARIABLE)
    if told is None:
        return options
    try:
        of_trainer = replace(options, temperature=float(told))
    except ValueError as exc:
        raise PreflightError(
            f"{TEMPERATURE_VARIABLE} is {told!r}.",
            "A launch names the `--temperature` of its trainer there: agents are sampled at it.",
            "Set `--temperature` of the trainer to a number above 0.",
        ) from exc
    if options.temperature in (GatewayOptions().temperature, of_trainer.temperature):
        return of_trainer
    logger.warning(
        "event=temperature_differs gateway_options=%g trainer=%g: agents are sampled and trained at that of `gateway_options`; leave it "
        "out there for the trainer's --temperature",
        *(options.temperature, of_trainer.temperature),
    )
    return options


def divides_by_deviation(own: str | None, variables: Mapping[str, str]) -> bool:
    """Whether advantages that an environment computes itself are divided by the standard deviation of the rewards: by its `own`
    `scale_rewards`, or else by that of the trainer, if a launch tells it in `variables`, or else yes.

    Raises:
        PreflightError: The trainer divides by the deviation of a whole batch, and the environment has nothing of its own.
    """
    told = variables.get(SCALE_REWARDS_VARIABLE)
    if own is None and told not in (None, GROUP, NONE):
        raise PreflightError(
            f"The trainer has --scale_rewards {told}, and {SCALE_REWARDS_VARIABLE} tells it to an environment of agents.",
            "Where an agent rewrote its history, or turns have rewards, advantages are computed per task, before there is a batch.",
            f"Set `--env.scale_rewards {GROUP}` or `{NONE}` for those, or give the trainer one of the two.",
        )
    if own is not None and told in (GROUP, NONE) and own != told:
        logger.warning(
            "event=scale_rewards_differs environment=%s trainer=%s: rollouts whose advantages the environment computes are scaled by its "
            "own; leave --env.scale_rewards out for the trainer's",
            *(own, told),
        )
    return (own or told or GROUP) == GROUP
