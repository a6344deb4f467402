"""The table of findings that `doctor` and `preflight` print, and the exit code that follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checks.finding import Finding


STYLES = {"error": "bold red", "warning": "yellow", "ok": "green", "unknown": "cyan"}


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """Print one row a finding."""
    table = Table(show_lines=True)
    for title in ("level", "check", "what was seen, what it means, what to do"):
        table.add_column(title, no_wrap=title != "what was seen, what it means, what to do", overflow="fold")
    for finding in findings:
        text = "\n".join(part for part in (finding.what, finding.why, finding.fix) if part)
        # Text objects, because a string would be read as markup, and brackets in it as styles.
        table.add_row(Text(finding.level, STYLES[finding.level]), Text(finding.name), Text(text))
    console.print(table)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if there is an error, 0 otherwise, also with warnings."""
    return int(any(finding.level == "error" for finding in findings))
