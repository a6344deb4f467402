"""Every metric of a run under its name: what it is, its unit or range, and what a bad value means."""

from __future__ import annotations


METRICS: dict[str, str] = {
    "reward": "Mean reward of the rollouts, in the environment's unit. Flat or falling: the policy does not learn.",
    "reward_std": (
        "Standard deviation of the rewards inside a group, mean over groups, in the environment's unit. Near 0: the "
        "rollouts of a prompt are alike and teach nothing."
    ),
    "frac_reward_zero_std": (
        "Fraction of groups whose rewards are all equal, 0 to 1. Near 1: the task is too easy or too hard."
    ),
    "num_tokens": "Tokens seen since the start of training, prompts included. Count.",
    "num_trained_tokens": "Trained tokens of the step, the denominator of its loss. Count. 0: nothing was learned.",
    "num_rollouts_trained": "Rollouts trained since the start. Count.",
    "num_rollouts_dropped": (
        "Rollouts dropped since the start: refused by validation, or too long. Count. Growing as fast as "
        "num_rollouts_trained: half of the generation is lost."
    ),
    "completions/mean_length": "Mean number of trained tokens of a rollout. Falling to 0: the policy stops at once.",
    "completions/min_length": "Trained tokens of the shortest rollout. Near 0: it teaches nothing.",
    "completions/max_length": "Trained tokens of the longest rollout. At max_tokens: completions are cut off.",
    "completions/clipped_ratio": (
        "Fraction of rollouts that end with a trained token that is no end-of-sequence token, 0 to 1, where these are known. "
        "High: completions are cut off, or stopped at strings."
    ),
    "advantages/zero_std": (
        "1 if all advantages of the step were equal before normalisation, else 0. 1: nothing tells good from bad."
    ),
    "advantages/clipped_frac_low": (
        "Fraction of trained tokens below the lower bound of advantage_clipping, 0 to 1. Above a few percent: the "
        "bound shapes the reward."
    ),
    "advantages/clipped_frac_high": (
        "Fraction of trained tokens above the upper bound of advantage_clipping, 0 to 1. Above a few percent: the "
        "bound shapes the reward."
    ),
    "inference_logprobs/missing_frac": (
        "Fraction of rollouts that came without a logprob for every trained token, 0 to 1. Above 0 with a ratio loss: "
        "those rollouts have no off-policy correction from the server."
    ),
    "entropy": "Mean entropy of the next-token distribution at trained tokens, in nats. Near 0: exploration is over.",
    "clip_ratio/low_mean": (
        "Fraction of trained tokens with negative advantage whose ratio fell below 1 - epsilon, 0 to 1. High: steps "
        "are too large or the data is too old."
    ),
    "clip_ratio/low_min": "Smallest clip_ratio/low_mean of a rollout, 0 to 1. Above 0: no rollout is left unclipped.",
    "clip_ratio/high_mean": (
        "Fraction of trained tokens with positive advantage whose ratio rose above 1 + epsilon_high, 0 to 1. High: "
        "steps are too large or the data is too old."
    ),
    "clip_ratio/high_max": (
        "Largest clip_ratio/high_mean of a rollout, 0 to 1. Near 1: a rollout teaches nothing any more."
    ),
    "cispo_clip_ratio": (
        "Fraction of trained tokens with positive advantage whose ratio exceeds epsilon_high, 0 to 1, for cispo. High: the "
        "data is too old."
    ),
    "kl": (
        "Mean KL term at trained tokens (k3 estimator, times the importance ratio unless use_bias_correction_kl is off), in "
        "nats. Above about 0.1: the policy has left the reference."
    ),
    "off_policy_mask/masked_frac": (
        "Fraction of trained tokens that off_policy_mask_threshold takes out of the loss, 0 to 1. High: the data is too old."
    ),
    "entropy_mask/threshold": (
        "Entropy in nats above which a token is trained, with `top_entropy_quantile`. It falls with `entropy`."
    ),
    "vespo/phi_seq_mean": (
        "Mean weight of a rollout in `vespo`, over trained tokens. 1 on policy; near 0: rollouts are too far from the policy to "
        "train."
    ),
    "sampling/other_distribution_frac": (
        "Fraction of rollouts that `/generate` sampled with top_p, top_k, min_p, penalties or other parameters that make "
        "another distribution of the policy's, 0 to 1. Above 0: their logprobs are not the policy's."
    ),
    "sampling/correction_weight/mean": (
        "Mean weight of vllm_importance_sampling_correction. Far from 1: the server sampled from another policy."
    ),
    "sampling/correction_weight/zero_frac": (
        "Fraction of trained tokens whose correction weight is 0, 0 to 1. High: most of the batch is thrown away."
    ),
    "distillation/loss": (
        "Mean cross entropy to the teacher's named tokens, in nats. Not falling: distillation_coef is too small."
    ),
    "clip_ratio/region_mean": "Sum of clip_ratio/low_mean and clip_ratio/high_mean, 0 to 1: tokens without gradient.",
    "sampling/sampling_logp_difference/mean": (
        "Mean |trainer_logprobs - inference_logprobs|, in nats. Above about 0.1 on fresh data: server and trainer "
        "disagree about the policy."
    ),
    "sampling/sampling_logp_difference/max": "Largest |trainer_logprobs - inference_logprobs|, in nats.",
    "sampling/importance_sampling_ratio/mean": (
        "Mean of exp(trainer_logprobs - inference_logprobs). 1 on policy; far from 1: the data is off-policy."
    ),
    "sampling/importance_sampling_ratio/min": "Smallest importance ratio. Near 0: a token the policy has abandoned.",
    "sampling/importance_sampling_ratio/max": (
        "Largest importance ratio, capped at exp(20). At the cap: an inference logprob that cannot be right."
    ),
    "staleness/mean": "Mean of the trainer's policy_version minus the rollout's, in versions, where it is known.",
    "staleness/max": "Largest staleness, in versions. Above 2 or 3: old batches wait in the API.",
    "staleness/unknown_frac": "Fraction of rollouts without a policy_version, 0 to 1. 1: staleness is not bounded.",
    "staleness/num_dropped": (
        "Rollouts dropped for a staleness above max_staleness, mean over steps. Count. Above 0: generation is slower than "
        "the steps, or several batches wait in the API."
    ),
    "staleness/dropped_mean_length": (
        "Mean number of trained tokens of a rollout that was dropped as too old. Above completions/mean_length: long rollouts "
        "are lost more often, and training is biased towards short ones."
    ),
    "staleness/downweighted_frac": (
        "Fraction of groups whose advantages count less because of their staleness, 0 to 1. High: most of the data is old."
    ),
    "data/num_unknown_fields": (
        "Fields of the step's groups that nobody reads. Count. Above 0: an environment sends something that has no effect."
    ),
    "data/num_quarantined": "Groups refused since the start, all in quarantine.jsonl. Count. Growing: mend that environment.",
    "data/num_api_restarts": (
        "Restarts of the Atropos API since the start. Count. Above 0: environments of before it must be restarted."
    ),
    "data/num_batches_maybe_lost": (
        "Batches since the start that the API may have handed out and that did not arrive. Count. Above 0: see the log."
    ),
    "data/replayed": "1 if the step trained a batch from the journal of an earlier run, else 0.",
    "policy_version": "Weight sets published so far; 0 is the starting checkpoint. Standing still: no publish.",
    "logprob_probe/mean_abs_diff": (
        "Mean |trainer - server| logprob on fixed prompts after a publish, in nats. Above what the dtype explains: "
        "the server does not hold the weights that were sent."
    ),
    "step_time": "Wall time of the optimizer step with data and publish, in seconds.",
    "perf/batch_wait_s": "Time waited for rollouts, in seconds. Most of step_time: generation is the bottleneck.",
    "perf/fetch_s": (
        "Time to fetch, journal and check the batch, the wait for it included, in seconds. What of it is not in "
        "perf/batch_wait_s was spent while the step before was trained."
    ),
    "perf/computed_tokens_frac": (
        "Positions that forward passes computed, padding included, per token of the rollouts. Above 1: padding; below 1: "
        "shared prefixes were computed once. 1 / groups' size at best."
    ),
    "perf/num_micro_batches": (
        "Forward passes of a rank in a step, mean over ranks. Count. Many small ones: raise max_tokens_per_micro_batch."
    ),
    "hub/num_failed_uploads": (
        "Uploads to the Hub that failed since the start. Count. Above 0: the log has the command that repeats them."
    ),
    "perf/has_layout_fallback": "1 if forward passes are not made in the best way, 0 else; the log says why.",
    "perf/skipped_steps_frac": (
        "Fraction of steps that the float16 loss scaler left out because the gradient overflowed, 0 to 1. Above 0 after the "
        "first steps: train with bf16."
    ),
    "perf/weight_sync_s": "Wall time of the publish, in seconds. Large against step_time: publish less often.",
    "perf/weight_sync_blocked_s": "Time for which the trainer did nothing but publish, or wait for the publish before, in seconds. With "
    "weight_sync_background the other metrics of a publish are those of the publish before.",
    "perf/weight_sync_fraction": "Share of the time since the last publish for which the trainer was held by it, 0 to 1. Large: publish "
    "beside the training (weight_sync_background), or less often.",
    "perf/weight_sync_gather_s": "Part of the publish that gathers sharded weights over ranks, in seconds.",
    "perf/weight_sync_merge_s": "Part of the publish that merges LoRA into the weights, in seconds.",
    "perf/weight_sync_stage_s": "Part of the publish that casts and copies weights before the pause, in seconds.",
    "perf/weight_sync_pause_s": "Part of the publish that freezes generation, in seconds.",
    "perf/weight_sync_build_s": "Part of the publish that moves and loads the weights beside those that are served, in seconds.",
    "perf/weight_sync_transfer_s": "Part of the publish that moves and loads the weights of a paused server, in seconds. 0: they were "
    "loaded beside the served ones.",
    "perf/weight_sync_load_s": "What of moving and loading the slowest worker spends in loading, in seconds.",
    "perf/weight_sync_finish_s": "Part of the publish that puts the weights in place, in seconds.",
    "perf/weight_sync_resume_s": "Part of the publish that lets requests run again, in seconds.",
    "perf/weight_sync_verify_s": "Part of the publish that reads back version and logprob probe, in seconds.",
    "perf/weight_sync_paused_s": "Time for which the server was paused, in seconds: lost to generation.",
    "perf/weight_sync_bytes": "What travelled to one server, in bytes.",
    "perf/weight_sync_mb_per_s": "Those bytes over the wall time of the publish, in MB per second.",
    "perf/weight_sync_retries": "Attempts of the publish after the first, over all servers. Count. Above 0: see the log.",
    "perf/weight_sync_failures": "Attempts of the publish that failed, over all servers. Count. Above 0: see the log.",
    "weight_sync/swallowed_fraction": (
        "Share of the weights that moved since the last publish and whose value in the server's dtype did not, on a "
        "sample, 0 to 1. Near 1: the server does not see the training; raise the learning rate or serve in float32."
    ),
    "trajectory_api/keeps_batches": (
        "1 if the API is `trl-atropos api`, 0 else: `run-api` shows nothing of what follows, and what it holds is lost with it."
    ),
    "trajectory_api/num_queued_groups": (
        "Groups that wait in `trl-atropos api` after a batch was fetched. Count. Growing: the trainer is slower than the "
        "environments, and rollouts get stale."
    ),
    "trajectory_api/stored_bytes": (
        "What `trl-atropos api` holds, in bytes. Near its --max_queue_bytes: environments are held up."
    ),
    "trajectory_api/num_unacknowledged_batches": (
        "Batches that trainers fetched from `trl-atropos api` and have not acknowledged. Count. Above 0 for long: a trainer that "
        "was killed and not started again."
    ),
    "trajectory_api/num_restarts": (
        "Starts of the server of `trl-atropos api` since the start. Count. Above 0: it was killed; nothing is to be done, but "
        "see its log."
    ),
    "trajectory_api/num_posts_refused": (
        "Posts that `trl-atropos api` refused for what they hold, since the start. Count. Above 0: see its log, and mend "
        "that environment."
    ),
    "trajectory_api/num_posts_repeated": (
        "Posts that came again because their answer was lost, and were stored once, since the start. Count. Growing "
        "without restarts: the network loses answers."
    ),
    "trajectory_api/num_posts_turned_away": (
        "Posts that found the queue of `trl-atropos api` full for too long, since the start. Count. Above 0: "
        "environments lose groups; start fewer of them, or raise --max_queue_bytes."
    ),
    "trajectory_api/num_batches_repeated": (
        "Batches that were handed out again to the trainer that had asked for them, since the start. Count. Above 0: an answer was "
        "lost on its way."
    ),
    "trajectory_api/num_batches_put_back": (
        "Batches that returned to the queue, since the start. Count. Above 0: a trainer was silent for too long, or broke "
        "the connection."
    ),
    "memory/peak_rss_bytes": "Peak resident memory of the trainer process, in bytes. Growing: a leak.",
}
"""Every metric that a training run logs: what it is, its unit, and what a bad value means."""

ENVIRONMENT_METRICS: dict[str, str] = {
    "reward": "Mean reward of its rollouts, in the environment's unit.",
    "reward_std": "Standard deviation of the rewards inside a group, mean over its groups, in the environment's unit.",
    "frac_reward_zero_std": "Fraction of its groups whose rewards are all equal, 0 to 1. Near 1: it teaches nothing.",
    "completions/mean_length": "Mean number of trained tokens of its rollouts.",
    "completions/clipped_ratio": (
        "Fraction of its rollouts that end with a trained token that is no end-of-sequence token, 0 to 1, where these are "
        "known."
    ),
    "batch_frac": "Its share of the trained rollouts, 0 to 1. 0: it has fallen silent, or all of its groups are dropped.",
    "num_dropped": (
        "Its rollouts that were refused or dropped as too old, mean over steps. Count. Above 0: see quarantine.jsonl and the "
        "log."
    ),
    "staleness": "Mean of the trainer's policy_version minus its rollouts', in versions, where it is known.",
    "age_s": "Mean time since its groups were fetched, in seconds.",
}
"""The metrics of every environment, by what follows `env/<name>/`; `<name>` is that of `env_names`, or `env_<id>`."""

EVALUATION_METRICS: dict[str, str] = {
    "exact_match": "Fraction of the prompts with an answer whose completion, stripped, equals it, 0 to 1.",
    "contains_answer": "Fraction of the prompts with an answer whose completion contains it, 0 to 1.",
    "mean_length": "Mean number of tokens of a completion. At eval_max_tokens: completions are cut off.",
    "num_prompts": "Prompts that were evaluated. Count.",
}
"""The metrics of the prompts of `eval_path`, by what follows `eval_`, or `eval_<env>/` for those with an `env`."""
