"""How every test process computes. Loaded before anything that imports torch."""

from __future__ import annotations

import os


# Threads that spin while they wait cost a factor of ten where processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The cores are taken by other test processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
