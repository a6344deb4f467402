"""The keys of summary.json, in order, which readers of a run rely on."""

from __future__ import annotations


SUMMARY_KEYS = [
    "num_steps",
    "reward_first",
    "reward_last",
    "rewards",
    "policy_version",
    "server_weight_version",
    "num_rollouts_trained",
    "num_rollouts_dropped",
    "publish_s_median",
    "step_s_median",
    "wall_s",
    "logprob_probe_mean_abs_diff",
    "peak_rss_bytes_trainer",
    "num_restarts",
    "gateway",
]
