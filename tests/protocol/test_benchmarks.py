"""The benchmarks of `trl-atropos api` and `trl-atropos gateway` run and lose nothing: small ones, whose times say nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trajectory_api import ROOT


def run_benchmark(name: str, *arguments: str) -> list[dict[str, Any]]:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def test_a_short_soak_gets_every_group_once_and_in_order(tmp_path: Path) -> None:
    *intervals, last = run_benchmark(
        "api_soak.py", "--num_groups", "1024", "--interval_groups", "400", "--directory", str(tmp_path)
    )
    assert (last["num_groups"], last["error"]) == (1024, None)
    assert intervals[-1]["num_groups"] == 1024 and len(intervals) >= 2
    assert all(line["rss_mb"] > 0 for line in intervals)
    # Everything may be posted before the last interval begins.
    assert all(line["post_p50_ms"] is None or line["post_p50_ms"] > 0 for line in intervals)
    assert intervals[0]["post_p50_ms"] is not None


def test_a_restart_finds_the_whole_queue(tmp_path: Path) -> None:
    (line,) = run_benchmark("api.py", "--restart_bytes", "2000000", "--directory", str(tmp_path))
    assert line["queue_bytes"] >= 2_000_000
    assert line["queue_groups"] > 1


def test_sessions_and_environments_are_answered_through_a_gateway() -> None:
    arguments = ["--num_sessions", "3", "--num_turns", "2", "--history_tokens", "300", "--generation_s", "0.1"]
    arguments += ["--num_streams", "3"]
    passing, sessions, streams, held = run_benchmark("gateway.py", *arguments)
    assert passing["through_p50_ms"] > 0
    # One session more, in which the stand-in learns its answers.
    assert (sessions["num_turns"], sessions["spliced_share"]) == (8, 1.0)
    assert streams["through_first_text_p50_ms"] > 0 and streams["through_between_parts_p50_ms"] > 0
    assert all(name in passing | sessions | streams for name in held.keys() - {"num_cpus"})
