"""A run's log becomes `summary.json`, a plot and tables. The log is written by hand."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from summary_keys import SUMMARY_KEYS

from trl_atropos.cli.launch.summary import OF_GATEWAY, describe_gateway, print_report, read_training_log, summarize
from trl_atropos.errors import PreflightError
from trl_atropos.gateway.counts import GatewayCounts


def make_entry(step: int, reward: float) -> dict[str, Any]:
    return {
        "step": step,
        "reward": reward,
        "reward_std": 0.25,
        "loss": -0.01,
        "staleness/mean": 1.0,
        "policy_version": float(step),
        "num_rollouts_trained": 32.0 * step,
        "num_rollouts_dropped": 2.0,
        "step_time": float(step),
        "perf/weight_sync_s": step / 10,
        "logprob_probe/mean_abs_diff": 0.02 if step == 2 else 0.01,
        "memory/peak_rss_bytes": 1000.0 * step,
    }


REWARDS = [0.0, 0.25, 0.25, 0.5, 0.75, 1.0]
ENTRIES = [make_entry(step, reward) for step, reward in enumerate(REWARDS, start=1)]


def test_summary_has_exactly_the_promised_keys_and_values() -> None:
    summary = summarize(ENTRIES, server_weight_version="6", wall_s=12.5, num_restarts={"api": 2})
    assert list(summary) == SUMMARY_KEYS
    assert summary["num_steps"] == 6
    assert summary["reward_first"] == 0.25  # (0 + 0.25 + 0.25 + 0.5) / 4
    assert summary["reward_last"] == 0.625  # (0.25 + 0.5 + 0.75 + 1) / 4
    assert summary["rewards"] == REWARDS
    assert summary["policy_version"] == summary["server_weight_version"] == 6
    assert summary["num_rollouts_trained"] == 192  # 6 x 32: the log counts since the start
    assert summary["num_rollouts_dropped"] == 2
    assert summary["step_s_median"] == 3.5  # between 3 and 4
    assert summary["publish_s_median"] == pytest.approx(0.35)
    assert summary["wall_s"] == 12.5
    assert summary["logprob_probe_mean_abs_diff"] == 0.02  # the largest, not the last
    assert summary["peak_rss_bytes_trainer"] == 6000
    assert summary["num_restarts"] == {"api": 2}
    assert json.loads(json.dumps(summary)) == summary


def test_shorter_run_than_the_window_averages_what_there_is() -> None:
    summary = summarize(ENTRIES[:2], server_weight_version=2, wall_s=1.0, num_restarts={})
    assert summary["reward_first"] == summary["reward_last"] == 0.125


def test_number_that_was_never_logged_is_none_and_not_zero() -> None:
    summary = summarize([{"step": 1, "reward": 0.5}], server_weight_version=None, wall_s=1.0, num_restarts={})
    absent = [key for key, value in summary.items() if value is None]
    known = ("num_steps", "reward_first", "reward_last", "rewards", "wall_s", "num_restarts")
    assert absent == [key for key in SUMMARY_KEYS if key not in known]


def test_what_a_gateway_counted_is_in_the_summary_and_in_one_line() -> None:
    counts = GatewayCounts(num_sessions=8, num_turns=24, num_spliced=12, num_branches=4, num_sampled_tokens=100)
    counts.masked_tokens.update({"grammar": 7, "undelivered": 2})
    shown = {name: counts.values()[name] for name in OF_GATEWAY}
    summary = summarize(ENTRIES, server_weight_version=2, wall_s=1.0, num_restarts={}, of_gateway=shown)
    assert summary["gateway"]["masked_tokens"] == {"grammar": 7, "undelivered": 2}
    assert (
        describe_gateway(shown)
        == (
            "8 sessions, 24 turns, 4 branches, spliced share 0.75; of 100 sampled tokens masked: grammar 7, undelivered 2; "  # 12 / 16
            "0 groups sent, 0 lost"
        )
    )


def test_weight_version_that_is_no_number_is_kept_as_it_is() -> None:
    assert (
        summarize(ENTRIES, server_weight_version="default", wall_s=1.0, num_restarts={})["server_weight_version"]
        == "default"
    )


def test_log_is_read_without_the_entry_that_ends_the_training(tmp_path: Path) -> None:
    history = [*ENTRIES, {"step": 6, "train_runtime": 10.0, "train_loss": 0.1}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert read_training_log(tmp_path) == ENTRIES


@pytest.mark.parametrize("content", [None, "{", "{}", '{"log_history": [{"train_loss": 1}]}'])
def test_log_without_steps_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(PreflightError, match="no log entry with a reward"):
        read_training_log(tmp_path)


def test_report_shows_rewards_and_completions_side_by_side() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    print_report(console, ENTRIES, ["The capital of Peru is"], [[" Lima, the largest"]], [[" [bold]Lima."]])
    text = console.export_text()
    assert "0.625" not in text and "0.750" in text and "1.000" in text
    # Those of the trainer's own lines; how long a batch was waited for is not in these logs.
    (titles,) = [re.split(" *[┃] *", line.strip("┃ ")) for line in text.splitlines() if "publish s" in line]
    assert titles == ["step", "reward", "std", "loss", "stale", "wait s", "publish s", "step s"]
    (last,) = [re.split(" *[│] *", line.strip("│ ")) for line in text.splitlines() if "1.000" in line]
    assert last == ["6", "1.000", "0.250", "-0.0100", "1.00", "?", "0.60", "6.00"]
    (row,) = [line for line in text.splitlines() if "Peru" in line]
    # Brackets of a completion are text, not markup.
    assert "Lima, the largest" in row and "[bold]Lima." in row
