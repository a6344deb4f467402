"""Open the first task of every name of the ecosystems that are installed; docs/environments.md has the figures.

Usage: python benchmarks/environments.py [ECOSYSTEM]...

One JSON line for each ecosystem: how many names it has, how many open here, and what the others said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time

from trl_atropos.envs.ecosystems import ECOSYSTEMS, find_ecosystem, open_source
from trl_atropos.errors import PreflightError


def measure(ecosystem: str) -> dict[str, object]:
    """Open every name of an ecosystem once."""
    start = time.perf_counter()
    names = find_ecosystem(ecosystem).task_names()
    refused = {}
    for name in names:
        try:
            # Some games print while they are made.
            with contextlib.redirect_stdout(sys.stderr):
                open_source(f"{ecosystem}:{name}", {})
        except PreflightError as exc:
            refused[name] = str(exc)
    return {
        "ecosystem": ecosystem,
        "num_names": len(names),
        "num_open": len(names) - len(refused),
        "seconds": round(time.perf_counter() - start, 1),
        "refused": refused,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "ecosystems", nargs="*", default=None, metavar="ECOSYSTEM", help="default: all that are installed"
    )
    chosen = parser.parse_args().ecosystems
    for name in chosen or [row.name for row in ECOSYSTEMS.values() if row.is_installed]:
        print(json.dumps(measure(name)), flush=True)
