"""The metrics of a step, taken apart by environment."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..loss.metrics import Metric, mean_of
from ..types import RejectedGroup, RolloutGroup
from .rollout_metrics import rollout_metrics


SHARED = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "completions/mean_length": "completions/mean_length",
    "completions/clipped_ratio": "completions/clipped_ratio",
    "staleness": "staleness/mean",
}
"""Name behind `env/<name>/` -> name of the same metric of the whole step."""


def environment_name(env_id: int | None, env_names: Sequence[str] | None) -> str:
    """How metrics and tables name an environment: by its entry in the option `env_names`, else by its number.

    `env_id` is the API's number of the environment; None if the group did not say it.
    """
    if env_id is None:
        return "env_unknown"
    if env_names is not None and 0 <= env_id < len(env_names):
        return env_names[env_id]
    return f"env_{env_id}"


class EnvironmentMetrics:
    """Makes the metrics `env/<name>/...` of every step; on rank 0.

    Environments with a name in the option `env_names`, and those that sent anything before, are reported in every
    step: one that has fallen silent has a `batch_frac` of 0, and a mean over several steps counts those without it.
    """

    def __init__(self, env_names: Sequence[str] | None):
        self.env_names = env_names
        self._names = dict.fromkeys(env_names or ())

    def of_step(
        self,
        groups: Sequence[RolloutGroup],
        rejected: Sequence[RejectedGroup],
        stale: Sequence[RolloutGroup],
        *,
        policy_version: int,
        eos_token_ids: frozenset[int] | None,
        fetched_ago_s: float | None = None,
    ) -> dict[str, Metric]:
        """The metrics of one optimizer step.

        `groups` are trained, as validation left them; `rejected` and `stale` are what was refused, and what was
        dropped as too old, since the last step. `policy_version` is the trainer's when the step begins.
        `eos_token_ids` are the tokens that end a completion, None if they are unknown; the groups were fetched
        `fetched_ago_s` seconds ago, None if that is unknown.

        The names behind `env/<name>/` are those of `ENVIRONMENT_METRICS` in `report/metric_help.py`.
        """
        names = [self._name(group.env_id) for group in groups for _ in group.rollouts]
        dropped = [self._name(group.env_id) for group in rejected for _ in range(group.num_rollouts)]
        dropped += [self._name(group.env_id) for group in stale for _ in group.rollouts]
        metrics: dict[str, Metric] = {}
        for name in self._names:
            of_environment = [group for group in groups if self._name(group.env_id) == name]
            overall = rollout_metrics(of_environment, policy_version, eos_token_ids)
            own = {suffix: overall[shared] for suffix, shared in SHARED.items() if shared in overall}
            own["batch_frac"] = mean_of(torch.tensor([other == name for other in names]))
            own["num_dropped"] = mean_of(float(dropped.count(name)))
            if of_environment and fetched_ago_s is not None:
                own["age_s"] = mean_of(fetched_ago_s)
            metrics.update({f"env/{name}/{suffix}": metric for suffix, metric in own.items()})
        return metrics

    def _name(self, env_id: int | None) -> str:
        name = environment_name(env_id, self.env_names)
        self._names.setdefault(name)
        return name
