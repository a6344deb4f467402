"""What a finished run leaves behind beside its report: `summary.json` and the tables on the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...errors import PreflightError
from ...report.step_columns import COLUMNS, cell


WINDOW = 4
"""Steps over which `reward_first` and `reward_last` are taken."""

OF_GATEWAY = (
    *("num_sessions", "num_sessions_discarded", "num_turns", "num_branches", "spliced_share", "num_refused"),
    *("num_sampled_tokens", "masked_tokens", "num_groups_sent", "num_groups_lost"),
)
"""What the summary has of the counts of gateways (`gateway/counts.py`), summed."""

LogEntry = Mapping[str, Any]


def read_training_log(output_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of `trainer_state.json` that describe an optimizer step.

    Raises:
        PreflightError: There is no such file, or it holds no step.
    """
    path = output_dir / "trainer_state.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError) as exc:
        raise _no_log_error(path) from exc
    entries = [entry for entry in history if "reward" in entry]
    if not entries:
        raise _no_log_error(path)
    return entries


def _no_log_error(path: Path) -> PreflightError:
    return PreflightError(
        f"{path} holds no log entry with a reward.",
        "The summary of the run is made from it.",
        "Let the training script call `trainer.save_state()` at the end, and train with `--logging_steps 1`.",
    )


def summarize(
    entries: Sequence[LogEntry],
    server_weight_version: int | str | None,
    wall_s: float,
    num_restarts: Mapping[str, int],
    of_gateway: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Reduce the log of a run, one entry per optimizer step in order, to the numbers by which it is judged.

    `server_weight_version` is what the inference server reported after training, `wall_s` the seconds from the start
    of the launch to the end of training, `num_restarts` how often parts of it were started again, by name, `of_gateway` what gateways counted, if there was one. In the result, `reward_first` and `reward_last` are means over `WINDOW`
    steps; `logprob_probe_mean_abs_diff` is the largest of the run, in nats; counts are totals; what was never logged
    is None.
    """
    rewards = [float(entry["reward"]) for entry in entries]
    return {
        "num_steps": int(entries[-1].get("step", len(entries))),
        "reward_first": statistics.fmean(rewards[:WINDOW]),
        "reward_last": statistics.fmean(rewards[-WINDOW:]),
        "rewards": rewards,
        "policy_version": _as_int(_last(entries, "policy_version")),
        "server_weight_version": _as_int(server_weight_version),
        "num_rollouts_trained": _as_int(_last(entries, "num_rollouts_trained")),
        "num_rollouts_dropped": _as_int(_last(entries, "num_rollouts_dropped")),
        "publish_s_median": _reduce(entries, "perf/weight_sync_s", statistics.median),
        "step_s_median": _reduce(entries, "step_time", statistics.median),
        "wall_s": wall_s,
        "logprob_probe_mean_abs_diff": _reduce(entries, "logprob_probe/mean_abs_diff", max),
        "peak_rss_bytes_trainer": _as_int(_reduce(entries, "memory/peak_rss_bytes", max)),
        "num_restarts": dict(num_restarts),
        "gateway": None if of_gateway is None else dict(of_gateway),
    }


def describe_gateway(counts: Mapping[str, Any]) -> str:
    """Return what a gateway counted, the values of `OF_GATEWAY`, in one line."""
    masked = ", ".join(f"{reason} {number}" for reason, number in counts["masked_tokens"].items())
    return (
        f"{counts['num_sessions']} sessions, {counts['num_turns']} turns, {counts['num_branches']} branches, "
        f"spliced share {counts['spliced_share']:.2f}; of {counts['num_sampled_tokens']} sampled tokens masked: "
        f"{masked or 'none'}; {counts['num_groups_sent']} groups sent, {counts['num_groups_lost']} lost"
    )


def print_report(
    console: Console,
    entries: Sequence[LogEntry],
    prompts: Sequence[str],
    before: Sequence[Sequence[str]],
    after: Sequence[Sequence[str]],
) -> None:
    """Print the steps as a table, and the completions of the prompts before and after training side by side."""
    table = Table(title="Training")
    for title in ("step", *(title for title, _, _ in COLUMNS)):
        table.add_column(title, justify="right")
    for entry in entries:
        numbers = [cell(entry.get(name), spec).strip() for _, name, spec in COLUMNS]
        table.add_row(str(entry.get("step", "?")), *numbers)
    console.print(table)

    if prompts:
        table = Table(title="Completions", show_lines=True)
        for title in ("prompt", "before training", "after training"):
            table.add_column(title)
        for prompt, first, last in zip(prompts, before, after, strict=True):
            cells = [prompt, "\n".join(text.strip() for text in first), "\n".join(text.strip() for text in last)]
            # Text objects, because a string would be read as markup, and brackets in it as styles.
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)


def _last(entries: Sequence[LogEntry], key: str) -> Any:
    return next((entry[key] for entry in reversed(entries) if key in entry), None)


def _reduce(entries: Sequence[LogEntry], key: str, reduction: Callable[[list[float]], float]) -> float | None:
    values = [float(entry[key]) for entry in entries if key in entry]
    return float(reduction(values)) if values else None


def _as_int(value: Any) -> int | Any:
    """Return whole numbers as int; logs hold them as floats and vLLM reports its weight version as text."""
    if isinstance(value, str):
        return int(value) if value.isdecimal() else value
    return None if value is None else int(value)
