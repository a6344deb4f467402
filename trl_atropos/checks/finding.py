"""What a diagnosis is made of: traps with a name, how they show in facts, and what to do.

`diagnose` gives what is wrong; `examine` also says what is well, and what could not be looked at.

Each name has a row in docs/troubleshooting.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar


GIB = 2**30
Level = Literal["error", "warning", "ok", "unknown"]
FactsT = TypeVar("FactsT", contravariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that a check found: what was seen, with values; what it means; the option or command that mends it.

    Each is a sentence. `name` is that of the trap, a row of docs/troubleshooting.md. Of the levels, `"error"` is no
    training like this, `"warning"` may be meant so or pass, `"ok"` is a good sign, and `"unknown"` was not checked.
    """

    name: str
    level: Level
    what: str
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.why} {self.fix}".rstrip()


@dataclass(frozen=True)
class Unread:
    """A fact that is not known, and a sentence that says why. Nothing is concluded from it."""

    why: str


NOT_ASKED = Unread("Nothing was given to compare with.")


def known(value: T | Unread) -> T:
    """Return a fact that the check has named in `needs`."""
    assert not isinstance(value, Unread), value.why
    return value


def _describe_nothing(facts: object) -> str:
    return "It was not found."


@dataclass(frozen=True)
class Check(Generic[FactsT]):
    """A trap: `name`, `level`, `why` and `fix` are those of its [`Finding`].

    `detect` says in a sentence how it shows in the facts, and gives None where it does not; `describe` says how the
    facts look then. `needs` names the fields of the facts without which nothing can be told. Where a trap is found
    that `hides_others`, the checks after it are not asked.
    """

    name: str
    level: Level
    detect: Callable[[FactsT], str | None]
    why: str
    fix: str
    hides_others: bool = field(default=False, kw_only=True)
    describe: Callable[[FactsT], str] = field(default=_describe_nothing, kw_only=True)
    needs: tuple[str, ...] = field(default=(), kw_only=True)


def examine(facts: FactsT, checks: Sequence[Check[FactsT]]) -> list[Finding]:
    """Run checks: one finding each, of any level and in their order, up to a trap that hides the others."""
    findings: list[Finding] = []
    for check in checks:
        unread = [value for name in check.needs if isinstance(value := getattr(facts, name), Unread)]
        if unread:
            findings.append(Finding(check.name, "unknown", f"Not checked: {unread[0].why}"))
            continue
        what = check.detect(facts)
        if what is None:
            findings.append(Finding(check.name, "ok", check.describe(facts)))
            continue
        findings.append(Finding(check.name, check.level, what, check.why, check.fix))
        if check.hides_others:
            break
    return findings


def diagnose(facts: FactsT, checks: Sequence[Check[FactsT]]) -> list[Finding]:
    """The errors and warnings of the checks, the likeliest cause first; empty if all is well."""
    return [finding for finding in examine(facts, checks) if finding.level in ("error", "warning")]
