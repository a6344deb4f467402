"""What a diagnosis is made of: traps with a name, how they show in facts, and what to do.

A preflight also says what is well, and what could not be looked at.

Each name has a row in docs/troubleshooting.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar


GIB = 2**30
Level = Literal["error", "warning", "ok", "unknown"]
FactsT = TypeVar("FactsT")
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Args:
        name (`str`):
            Of the trap; the row of docs/troubleshooting.md.
        level (`str`):
            `"error"`: no training like this; `"warning"`: it may be meant so, or pass; `"ok"`: a good sign; `"unknown"`: not
            checked.
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
            What was seen, for example [`~checks.api.ApiFacts`].
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


@dataclass(frozen=True)
class Unread:
    """A fact that is not known. Nothing is concluded from it.

    Args:
        why (`str`):
            A sentence.
    """

    why: str


NOT_ASKED = Unread("Nothing was given to compare with.")


@dataclass(frozen=True)
class PreflightCheck(Check[FactsT]):
    """A check that also says what is well.

    Args:
        describe (`Callable`):
            Says in a sentence how the facts look where nothing is wrong.
        needs (`tuple[str, ...]`, *optional*, defaults to `()`):
            Fields of the facts without which nothing can be told.
    """

    describe: Callable[[FactsT], str] = field(kw_only=True)
    needs: tuple[str, ...] = field(default=(), kw_only=True)


def examine(facts: FactsT, checks: Sequence[PreflightCheck[FactsT]]) -> list[Finding]:
    """Run all checks.

    Args:
        facts (`FactsT`):
            What was seen.
        checks (sequence of [`PreflightCheck`]):
            Of such facts.

    Returns:
        `list[Finding]`: one per check, in their order, of any level.
    """
    findings = []
    for check in checks:
        unread = [value for name in check.needs if isinstance(value := getattr(facts, name), Unread)]
        if unread:
            findings.append(Finding(check.name, "unknown", f"Not checked: {unread[0].why}"))
        else:
            findings += diagnose(facts, [check]) or [Finding(check.name, "ok", check.describe(facts))]
    return findings


def known(value: T | Unread) -> T:
    """Return a fact that the check has named in `needs`."""
    assert not isinstance(value, Unread), value.why
    return value
