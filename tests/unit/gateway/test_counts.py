"""Counts of several gateways together, and their files: of processes that are killed, and where nothing can be written."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_atropos.gateway.counts import GatewayCounts
from trl_atropos.gateway.counts_file import CountsFile, read_counts


TIMEOUT_S = 30.0

COUNTING = """
import asyncio, sys
from pathlib import Path
from trl_atropos.gateway.counts import GatewayCounts
from trl_atropos.gateway.counts_file import CountsFile

async def count():
    counts = GatewayCounts(num_sessions=int(sys.argv[2]))
    keeping = asyncio.create_task(CountsFile(counts, Path(sys.argv[1])).keep())
    await asyncio.sleep(0.1)
    counts.num_sessions += 1
    await keeping

asyncio.run(count())
"""


def test_two_gateways_count_together():
    first = GatewayCounts(num_turns=4, num_roots=1, num_spliced=3)
    first.masked_tokens.update({"grammar": 7})
    second = GatewayCounts(num_turns=3, num_roots=1, num_spliced=1, num_branches=1)
    second.masked_tokens.update({"grammar": 1, "abandoned": 2})
    both = GatewayCounts.of_values(json.loads(json.dumps({**first.values(), "num_open_sessions": 1}))) + second
    assert (both.num_turns, both.num_roots, both.num_spliced, both.num_branches) == (7, 2, 4, 1)
    assert both.masked_tokens == {"grammar": 8, "abandoned": 2}
    assert both.spliced_share == 4 / 5  # not the mean of 1 and 1 / 2


def test_what_was_counted_survives_the_signal_that_ends_a_process(tmp_path: Path):
    directory = tmp_path / "counts"
    assert read_counts(directory) == []
    ends = (signal.SIGTERM, signal.SIGKILL)
    for number, end in enumerate(ends):
        command = [sys.executable, "-c", COUNTING, str(directory), str(10 * number)]
        process = subprocess.Popen(command)
        deadline = time.monotonic() + TIMEOUT_S
        while sum(counts.num_sessions for counts in read_counts(directory)) < 1 + number * 11:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(end)
        assert process.wait(TIMEOUT_S) == -end
    assert sorted(counts.num_sessions for counts in read_counts(directory)) == [1, 11]


def test_a_file_is_written_when_something_changed(tmp_path: Path):
    counts = GatewayCounts()
    file = CountsFile(counts, tmp_path)
    file.write()
    file.path.unlink()
    file.write()
    assert not file.path.exists()
    counts.num_turns += 1
    file.write()
    assert [read.num_turns for read in read_counts(tmp_path)] == [1]


def test_where_nothing_can_be_written_the_log_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "taken").touch()
    counts = GatewayCounts()
    file = CountsFile(counts, tmp_path / "taken")

    async def keep() -> None:
        keeping = asyncio.create_task(file.keep())
        await asyncio.sleep(0)
        counts.num_turns += 1
        file.write()
        keeping.cancel()

    asyncio.run(keep())
    assert caplog.text.count("event=counts_not_written") == 1
    (tmp_path / "taken").unlink()
    file.write()
    assert [read.num_turns for read in read_counts(tmp_path / "taken")] == [1]
