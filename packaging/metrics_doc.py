"""Write docs/metrics.md from `trl_atropos.metrics.METRICS`.

Usage: python packaging/metrics_doc.py
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from trl_atropos.metrics import METRICS


TARGET = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
HEADER = """\
# Metrics

Every metric that a training run logs, with its unit and what a bad value means. Made from `trl_atropos/metrics.py` by
`python packaging/metrics_doc.py`; do not edit.

A metric covers the optimizer steps since the last log line, all micro-batches and all ranks; a mean weighs every value alike,
however the batch was split. A metric without data is left out of the log line. `loss`, `grad_norm`, `learning_rate` and `epoch`
are those of the `Trainer` of transformers.
"""


def render(metrics: dict[str, str]) -> str:
    """The page: one table for each prefix of the names, those without a prefix first.

    Args:
        metrics (`dict[str, str]`):
            Name to description.
    """

    def prefix(name: str) -> str:
        return name.split("/")[0] if "/" in name else ""

    parts = [HEADER]
    # A stable sort: inside of a group the order is that of the dictionary.
    for group, names in groupby(sorted(metrics, key=prefix), prefix):
        title = f"`{group}/`" if group else "Without a prefix"
        rows = ["| `{}` | {} |".format(name, metrics[name].replace("|", "\\|")) for name in names]
        parts.append("\n".join([f"## {title}", "", "| Metric | Meaning |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(render(METRICS))
