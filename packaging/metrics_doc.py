"""Write docs/metrics.md from the tables of `trl_atropos.loss.metrics`.

Usage: python packaging/metrics_doc.py
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from trl_atropos.report.metric_help import ENVIRONMENT_METRICS, EVALUATION_METRICS, METRICS


TARGET = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
HEADER = """\
# Metrics

Every metric that a training run logs, with its unit and what a bad value means. Made from `trl_atropos/report/metric_help.py` by
`python packaging/metrics_doc.py`; do not edit.

A metric covers the optimizer steps since the last log line, all micro-batches and all ranks; a mean weighs every value alike,
however the batch was split. A metric without data is left out of the log line. `loss`, `grad_norm`, `learning_rate` and `epoch`
are those of the `Trainer` of transformers.
"""

ENVIRONMENTS = """\
## Each environment: `env/<name>/`

`<name>` is that of the environment in `env_names`, `env_<id>` without one, and `env_unknown` for groups that came without an
`env_id`. Environments with a name, and those that sent anything before, are in every log line.
"""
EVALUATIONS = """\
## Evaluations: `eval_`

With `eval_path`, over all prompts as `eval_exact_match` and so on, and over the prompts with the `env` `<name>` as
`eval_<name>/exact_match` and so on.
"""
EVALUATIONS_OF_ENVIRONMENTS = """\
With `eval_log_dir`, what the environments' own `evaluate` logged there since the last evaluation: `eval_<name>/<metric>`, where
`<name>` is the subdirectory that holds the environment's `metrics.json`, or the name of the task if there is none.
"""


def render() -> str:
    """The page: one table for each prefix of the names, those without a prefix first; then the families of names."""

    def prefix(name: str) -> str:
        return name.split("/")[0] if "/" in name else ""

    parts = [HEADER]
    # A stable sort: inside of a group the order is that of the dictionary.
    for group, names in groupby(sorted(METRICS, key=prefix), prefix):
        title = f"`{group}/`" if group else "Without a prefix"
        parts.append(f"## {title}\n\n" + table({name: METRICS[name] for name in names}))
    parts += [ENVIRONMENTS, table(ENVIRONMENT_METRICS)]
    parts += [EVALUATIONS, table(EVALUATION_METRICS), EVALUATIONS_OF_ENVIRONMENTS]
    return "\n".join(parts)


def table(metrics: dict[str, str]) -> str:
    """A table of names and descriptions.

    Args:
        metrics (`dict[str, str]`):
            Name to description.
    """
    rows = ["| `{}` | {} |".format(name, meaning.replace("|", "\\|")) for name, meaning in metrics.items()]
    return "\n".join(["| Metric | Meaning |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    TARGET.write_text(render())
