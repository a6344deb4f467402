"""How every test process computes, and what processes of tests are forked from. Loaded before anything that imports torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import fork_server
import pytest


# Threads that spin while they wait cost a factor of ten where processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The cores are taken by other test processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Start the fork server for all workers at once if end-to-end tests are among what is run, while they import, too."""
    deals_to_workers = bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")
    if deals_to_workers and any("e2e" in Path(argument).parts for argument in config.args):
        fork_server.start()


@pytest.fixture(autouse=True)
def level_of_our_log() -> Iterator[None]:
    """Commands that a test runs in this process set it, and what is logged from then on would be what other tests see."""
    logger = logging.getLogger("trl_atropos")
    level = logger.level
    yield
    logger.setLevel(level)
