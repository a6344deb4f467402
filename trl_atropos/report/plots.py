"""The plots of a report, drawn without a display."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .run_files import RunFiles, read_run_files


WINDOW = 4
MAX_POINTS = 500
COLORS = ("#3b82c4", "#d9772b", "#3f9c5a", "#b5485d", "#8a63b8", "#8c6d4f", "#c964a4", "#7a8288")
INK = "#12ab34"
"""Stands for `currentColor` until the SVG is written, which matplotlib has no word for."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One plot over the optimizer steps.

    `name` is the file name without its ending, and `unit` is that of the vertical axis. `series` maps metrics to their
    words in the legend. `hint` says what would have recorded a plot that is empty. A plot that `is_stacked` shows
    areas on top of each other instead of lines.
    """

    name: str
    title: str
    unit: str
    series: dict[str, str]
    hint: str
    is_stacked: bool = False


PHASES = ("gather", "merge", "stage", "build", "pause", "transfer", "finish", "resume", "verify")
REST = "rest_s"
PLOTS = (
    Plot("reward", "Reward", "reward", {"reward": "mean of the step"}, "every run with --logging_steps 1 logs it"),
    Plot("kl", "KL", "nats", {"kl": "kl"}, "train with --beta above 0"),
    Plot("entropy", "Entropy", "nats", {"entropy": "entropy"}, "every run of this version logs it"),
    Plot(
        "importance_ratio",
        "Importance ratio",
        "ratio",
        {f"sampling/importance_sampling_ratio/{name}": name for name in ("min", "mean", "max")},
        "the environments must send inference_logprobs",
    ),
    Plot(
        "clip_ratio",
        "Clipped tokens",
        "fraction",
        {"clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high", "cispo_clip_ratio": "cispo"},
        "train with a loss that clips its ratio",
    ),
    Plot(
        "staleness",
        "Staleness",
        "versions",
        {"staleness/mean": "mean", "staleness/max": "max"},
        "publish to the server that the environments ask; it tells them the policy_version",
    ),
    Plot(
        "step_time",
        "Where the time of a step went",
        "seconds",
        {"perf/batch_wait_s": "wait for rollouts", REST: "forward, backward, rest", "perf/weight_sync_s": "publish"},
        "every run of this version logs it",
        is_stacked=True,
    ),
    Plot(
        "publish",
        "Publish by part",
        "seconds",
        {f"perf/weight_sync_{phase}_s": phase for phase in PHASES},
        "train with --vllm_server_base_url, so that the policy is published",
        is_stacked=True,
    ),
    Plot(
        "logprob_probe",
        "Logprob probe",
        "nats",
        {"logprob_probe/mean_abs_diff": "trainer against server"},
        "it is measured by a publish to a vLLM server",
    ),
    Plot(
        "swallowed",
        "Moved weights that rounding swallowed",
        "fraction",
        {"weight_sync/swallowed_fraction": "swallowed"},
        "it is measured by a publish in a smaller dtype than the trainer's",
    ),
    Plot(
        "throughput",
        "Throughput",
        "tokens per second",
        {"tokens_per_s": "all tokens", "trained_tokens_per_s": "trained tokens"},
        "every run with --logging_steps 1 logs it",
    ),
    Plot(
        "length",
        "Trained tokens of a rollout",
        "tokens",
        {f"completions/{name}_length": name for name in ("min", "mean", "max")},
        "every run of this version logs it",
    ),
    Plot(
        "dropped",
        "Dropped as too old",
        "rollouts per step",
        {"staleness/num_dropped": "dropped"},
        "train with --max_staleness",
    ),
)


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Return the mean of each value with up to `window - 1` values before it."""
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def series_of(run: RunFiles, plot: Plot) -> dict[str, Points]:
    """Return what one of `PLOTS` shows: the words of each series that has a value, with its points.

    The points are `(step, value)`, at most 500 for each series.
    """
    found = {}
    for key, label in plot.series.items():
        points = _points(run, key)
        if points:
            found[label] = _thin(points, key)
    if plot.name == "reward" and found:
        (points,) = found.values()
        found[f"mean of {WINDOW} points"] = list(
            zip([step for step, _ in points], running_mean([value for _, value in points]), strict=True)
        )
        names = run.environments()
        # The only one has the mean of the step, and would cover it.
        for name in names if len(names) > 1 else []:
            found[name] = _thin(run.values(f"env/{name}/reward"), "reward")
    return found


def _points(run: RunFiles, key: str) -> Points:
    if key == REST:
        parts = [dict(run.values(name)) for name in ("perf/batch_wait_s", "perf/weight_sync_s")]
        return [
            (step, max(0.0, s - sum(part.get(step, 0.0) for part in parts))) for step, s in run.values("step_time")
        ]
    times = {step: s for step, s in run.values("step_time") if s > 0}
    if key == "tokens_per_s":
        totals = run.values("num_tokens")
        return [
            (step, (total - before) / times[step])
            for (previous, before), (step, total) in pairwise(totals)
            # The time of a line is that of one step, so the tokens must be too.
            if step in times and step == previous + 1
        ]
    if key == "trained_tokens_per_s":
        return [(step, count / times[step]) for step, count in run.values("num_trained_tokens") if step in times]
    return run.values(key)


def _thin(points: Points, key: str) -> Points:
    """Join neighbours until at most `MAX_POINTS` are left; extremes stay extremes."""
    size = -(-len(points) // MAX_POINTS)
    reduce = max if "max" in key else min if "min" in key else statistics.fmean
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(bucket[-1][0], float(reduce([value for _, value in bucket]))) for bucket in buckets]


def draw(plot: Plot, series: dict[str, Points], dark_text: str = "black") -> Any:
    """Return the matplotlib figure of a plot, without a display behind it.

    `series` is what `series_of` returned, and not empty. `dark_text` is the colour of text and axes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    if plot.is_stacked:
        steps = sorted({step for points in series.values() for step, _ in points})
        heights = [[dict(points).get(step, 0.0) for step in steps] for points in series.values()]
        axes.stackplot(steps, *heights, labels=list(series), colors=COLORS, step="mid")
        axes.set_ylim(bottom=0)
    else:
        for index, (label, points) in enumerate(series.items()):
            xs, ys = zip(*points, strict=True)
            marker = "o" if len(points) <= 40 else ""
            axes.plot(xs, ys, marker=marker, markersize=3, label=label, color=COLORS[index % len(COLORS)])
        if all(value >= 0 for points in series.values() for _, value in points):
            axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(plot.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.tick_params(colors=dark_text)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(dark_text)
    for side, spine in axes.spines.items():
        spine.set_color(dark_text)
        spine.set_visible(side in ("left", "bottom"))
    if len(series) > 1:
        # Below the axes, where it covers no point.
        figure.legend(loc="outside lower center", ncols=4, frameon=False, labelcolor=dark_text, fontsize=8)
    return figure


def to_svg(plot: Plot, series: dict[str, Points]) -> str:
    """Return a plot as an `<svg>` element for a page, in the page's colour of text."""
    import matplotlib

    stream = io.StringIO()
    # The salt keeps apart the ids of several plots on one page; text stays text, which is smaller and can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name, "font.family": "sans-serif"}):
        draw(plot, series, INK).savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # A page has one root of ids: matplotlib numbers its groups from 1 in every file.
    text = text.replace('id="', f'id="{plot.name}-').replace("url(#", f"url(#{plot.name}-")
    return text.replace('href="#', f'href="#{plot.name}-')


def save_png(plot: Plot, series: dict[str, Points], path: Path) -> None:
    """Write a plot as a PNG with a white ground."""
    draw(plot, series).savefig(path, format="png", dpi=120)


def save_reward_plot(run_dir: Path, path: Path) -> None:
    """Write the reward over the steps of a run as a PNG. `run_dir` is the directory of the trainer.

    Raises:
        [`PreflightError`]: there is no log of a run.
    """
    plot = next(plot for plot in PLOTS if plot.name == "reward")
    save_png(plot, series_of(read_run_files(run_dir), plot), path)
