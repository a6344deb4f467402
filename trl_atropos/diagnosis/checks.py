"""What a diagnosis is made of: traps with a name, how they show in facts, and what to do.

Each name has a row in docs/troubleshooting.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar


Level = Literal["error", "warning", "ok"]
FactsT = TypeVar("FactsT")


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Args:
        name (`str`):
            Of the trap; the row of docs/troubleshooting.md.
        level (`str`):
            `"error"`: no training like this; `"warning"`: it may be meant so, or pass; `"ok"`: a good sign.
        what (`str`):
            What was seen, with values: a sentence.
        why (`str`, *optional*, defaults to `""`):
            What it means: a sentence.
        fix (`str`, *optional*, defaults to `""`):
            The option or command that mends it: a sentence.
    """

    name: str
    level: Level
    what: str
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.why} {self.fix}".rstrip()


@dataclass(frozen=True)
class Check(Generic[FactsT]):
    """A trap.

    Args:
        name (`str`), level (`str`), why (`str`), fix (`str`):
            See [`Finding`].
        detect (`Callable`):
            Says in a sentence how the trap shows in the facts; None where it does not.
        hides_others (`bool`, *optional*, defaults to `False`):
            Whether nothing else can be told where it is found.
    """

    name: str
    level: Level
    detect: Callable[[FactsT], str | None]
    why: str
    fix: str
    hides_others: bool = False


def diagnose(facts: FactsT, checks: Sequence[Check[FactsT]]) -> list[Finding]:
    """What the checks find in the facts.

    Args:
        facts (`FactsT`):
            What was seen, for example [`~diagnosis.api.ApiFacts`].
        checks (sequence of [`Check`]):
            The traps of such facts, for example `API_CHECKS`.

    Returns:
        `list[Finding]`: errors and warnings, the likeliest cause first; empty if all is well.
    """
    findings = []
    for check in checks:
        what = check.detect(facts)
        if what is not None:
            findings.append(Finding(check.name, check.level, what, check.why, check.fix))
            if check.hides_others:
                break
    return findings
