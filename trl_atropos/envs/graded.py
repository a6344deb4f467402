"""Episodes of one question and one answer."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .source import EpisodeStep


logger = logging.getLogger(__name__)

INSTRUCTION = "End with a line that holds the answer and nothing else."

ANSWER_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What graders raise that read an answer as a number, a formula or code, and were not written for what a policy says."""


def find_answer(completion: str) -> str:
    """Return what stands in the last `<answer>` of a completion, or else in its last line behind its last `=` or `:`."""
    if "<answer>" in completion:
        return completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    lines = completion.strip().splitlines() or [""]
    return lines[-1].replace(":", "=").rpartition("=")[2].strip().removesuffix(".")


_told: list[str] = []


def warn_of_grader(answer: str) -> None:
    """Log the exception of a grader that is being handled, the first time in this process."""
    if not _told:
        _told.append(answer)
        logger.warning(
            "The grader of the task failed on the answer %r; such answers get reward 0.", answer, exc_info=True
        )


class GradedEpisode:
    """A question, and a grade for the answer.

    Args:
        question (`str`):
            Without an instruction where the answer is to stand, which is added.
        grade (`Callable[[str], float]`):
            Reward of an answer. If it raises one of `ANSWER_FAULTS` the reward is 0, and the first time of a process is
            logged with its traceback.
    """

    def __init__(self, question: str, grade: Callable[[str], float]):
        self.messages = [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}]
        self._grade = grade

    def step(self, text: str) -> EpisodeStep:
        """Grade the answer of a completion."""
        answer = find_answer(text)
        try:
            return EpisodeStep(None, float(self._grade(answer)))
        except ANSWER_FAULTS:
            warn_of_grader(answer)
            return EpisodeStep(None, 0.0)

    def close(self) -> None:
        """There is nothing to give back."""
