"""Why the data that comes teaches nothing: the traps that only the trainer sees."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks.api import AGEING_FIX, AGEING_WHY
from ..checks.finding import Check, Finding, diagnose
from ..types import RejectedGroup, RolloutGroup


TOO_LONG = "too_long"
"""The reason under which validation refuses a group with a rollout beyond `max_length`."""

MIN_GROUPS = 8
"""Fewer groups may be alike by chance."""

WINDOW = 20
"""Batches that a trainer looks back over."""

AGEING = 3.0
"""Mean staleness, in publishes, above which a run without `max_staleness` is told: what three batches in the API make,
the default of `--env.max_batches_offpolicy`."""


@dataclass(frozen=True)
class TrainerFacts:
    """What a trainer received over its last batches.

    `num_groups` counts refused groups, too, and `num_too_long_groups` those of them with a rollout longer than
    `max_length`. A tied group has at least two rollouts, all with the same reward and without token-level advantages; a
    single group has one rollout, whose advantage is 0, because nobody in its group is better or worse.
    `mean_staleness`, in publishes, is the mean of the batches' means over rollouts of known policy version.
    `max_staleness` is the option; None: no limit. `samplings` has a pair of environment and names of parameters for each way in
    which another distribution than the policy's was sampled.
    """

    num_groups: int = 0
    num_refused_groups: int = 0
    num_too_long_groups: int = 0
    num_tied_groups: int = 0
    num_single_groups: int = 0
    mean_staleness: float | None = None
    max_staleness: int | None = None
    samplings: frozenset[tuple[int | None, tuple[str, ...]]] = frozenset()


def _all_groups_too_long(facts: TrainerFacts) -> str | None:
    if facts.num_groups < MIN_GROUPS or facts.num_too_long_groups < facts.num_groups:
        return None
    return f"All of the last {facts.num_groups} groups have a rollout that is longer than `max_length`."


def _all_groups_tie(facts: TrainerFacts) -> str | None:
    num_accepted = facts.num_groups - facts.num_refused_groups
    if num_accepted < MIN_GROUPS or facts.num_tied_groups < num_accepted:
        return None
    return f"In all of the last {num_accepted} groups every rollout has the same reward."


def _groups_of_one(facts: TrainerFacts) -> str | None:
    if facts.num_single_groups == 0:
        return None
    num_accepted = facts.num_groups - facts.num_refused_groups
    return f"{facts.num_single_groups} of the last {num_accepted} groups have one rollout, which has no group to be compared with."


def _changed_distribution(facts: TrainerFacts) -> str | None:
    if not facts.samplings:
        return None
    ordered = sorted(facts.samplings, key=lambda pair: (pair[0] is not None, pair[0] or 0, pair[1]))
    of_environments = [f"environment {env_id} with {', '.join(names)}" for env_id, names in ordered]
    return f"Completions are sampled from another distribution than the policy's: {'; '.join(of_environments)}."


def _stale_batches(facts: TrainerFacts) -> str | None:
    limit = AGEING if facts.max_staleness is None else float(facts.max_staleness)
    if facts.mean_staleness is None or facts.mean_staleness <= limit:
        return None
    return f"The last rollouts are {facts.mean_staleness:.1f} publishes old on average, more than {limit:g}."


TRAINER_CHECKS: tuple[Check[TrainerFacts], ...] = (
    Check(
        "all_groups_too_long",
        "error",
        _all_groups_too_long,
        "Every group is refused whole, and nothing is trained.",
        "Raise `--max_length`, or lower `max_tokens` of the environment's completions.",
    ),
    Check(
        "all_groups_tie",
        "warning",
        _all_groups_tie,
        "Their advantages are 0 and the gradient is 0: the task is solved, hopeless, or its score function is broken.",
        "Look at completions and rewards with `--log_completions`; mix in tasks of another difficulty.",
    ),
    Check(
        "groups_of_one",
        "warning",
        _groups_of_one,
        "Their advantages are 0, and they train nothing.",
        "Let the environment sample several rollouts per task (`--env.group_size`), or set `--advantage_baseline batch` and "
        "`--scale_rewards batch` (REINFORCE++).",
    ),
    Check(
        "changed_distribution",
        "warning",
        _changed_distribution,
        "The trainer's logprobs are those of the policy, so the ratio is off from the first step on, and clipping hides a part of it.",
        "Leave these parameters out in the environment; or set `--vllm_importance_sampling_correction true`, whose weight is the "
        "policy over what was sampled from.",
    ),
    Check("stale_batches", "warning", _stale_batches, AGEING_WHY, AGEING_FIX),
)


class TrainerHistory:
    """Counts what came over the last `WINDOW` batches, and tells once what is found in it.

    `max_staleness` is the option, in publishes; None: no limit. `advantage_baseline` is that of
    [`~loss.options.StepOptions`].
    """

    def __init__(self, max_staleness: int | None = None, advantage_baseline: str = "group"):
        self.max_staleness = max_staleness
        self.advantage_baseline = advantage_baseline
        self._batches: deque[TrainerFacts] = deque(maxlen=WINDOW)
        self._known: set[str] = set()
        self._known_samplings: frozenset[tuple[int | None, tuple[str, ...]]] = frozenset()

    def add(
        self, groups: Sequence[RolloutGroup], rejected: Sequence[RejectedGroup], policy_version: int
    ) -> list[Finding]:
        """Count a batch of the trainer's `policy_version`, and return what was not found after the one before.

        `groups` are the good ones, also those that are dropped as too stale.
        """
        of_rollouts = [rollout.staleness(policy_version) for group in groups for rollout in group.rollouts]
        staleness = [value for value in of_rollouts if value is not None]
        self._batches.append(
            TrainerFacts(
                num_groups=len(groups) + len(rejected),
                num_refused_groups=len(rejected),
                num_too_long_groups=sum(group.reason == TOO_LONG for group in rejected),
                num_tied_groups=sum(map(_is_tied, groups)),
                num_single_groups=0 if self.advantage_baseline == "batch" else sum(map(_is_single, groups)),
                mean_staleness=sum(staleness) / len(staleness) if staleness else None,
                samplings=frozenset(
                    (group.env_id, rollout.sampling_parameters)
                    for group in groups
                    for rollout in group.rollouts
                    if rollout.sampling_parameters
                ),
            )
        )
        facts = self.facts()
        if not facts.samplings <= self._known_samplings:
            # Another environment, or one that has changed, is another finding.
            self._known.discard("changed_distribution")
        self._known_samplings |= facts.samplings
        findings = diagnose(facts, TRAINER_CHECKS)
        new = [finding for finding in findings if finding.name not in self._known]
        self._known = {finding.name for finding in findings}
        return new

    def facts(self) -> TrainerFacts:
        """The counts of all batches of the window."""
        known = [batch.mean_staleness for batch in self._batches if batch.mean_staleness is not None]
        return TrainerFacts(
            num_groups=sum(batch.num_groups for batch in self._batches),
            num_refused_groups=sum(batch.num_refused_groups for batch in self._batches),
            num_too_long_groups=sum(batch.num_too_long_groups for batch in self._batches),
            num_tied_groups=sum(batch.num_tied_groups for batch in self._batches),
            num_single_groups=sum(batch.num_single_groups for batch in self._batches),
            mean_staleness=sum(known) / len(known) if known else None,
            max_staleness=self.max_staleness,
            samplings=frozenset().union(*(batch.samplings for batch in self._batches)),
        )


def _is_single(group: RolloutGroup) -> bool:
    return len(group.rollouts) == 1 and group.rollouts[0].advantages is None


def _is_tied(group: RolloutGroup) -> bool:
    rollouts = group.rollouts
    has_one_reward = len({rollout.reward for rollout in rollouts}) == 1
    return len(rollouts) > 1 and has_one_reward and all(rollout.advantages is None for rollout in rollouts)
