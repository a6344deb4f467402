"""Compare the logged losses of two runs, bit by bit.

    python examples/scripts/compare_losses.py OUTPUT_DIR OTHER_OUTPUT_DIR

Prints the loss of every step of both and how many differ. Exit code 1 if any does, or if the runs have different steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def read_losses(output_dir: Path) -> dict[int, float]:
    """The loss of each logged step of a run that ended."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, nargs=2, help="two directories with a trainer_state.json")
    first, second = (read_losses(path) for path in parser.parse_args().output_dir)
    num_different = 0
    for step in sorted({*first, *second}):
        is_equal = first.get(step) == second.get(step)
        num_different += not is_equal
        print(f"{step:6d}  {first.get(step)!s:>24}  {second.get(step)!s:>24}  {'' if is_equal else 'differs'}")
    print(f"{num_different} of {len({*first, *second})} losses differ")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
