"""What the environment beside it imports."""

from __future__ import annotations


def reward(answer: str, number: int) -> float:
    """1 for the right answer, and a little for each attempt, so that no two are alike."""
    return float(answer == "3") + number / 100
