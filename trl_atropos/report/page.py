"""The HTML page of a run. Everything on it is inside of it: no request leaves the browser."""

from __future__ import annotations

import os
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from .plots import PLOTS, Plot, Points, save_png, series_of, to_svg
from .run_files import RunFiles


REPORT_FILE = "report.html"


def write_report(run: RunFiles, path: Path, png_dir: Path | None = None) -> None:
    """Write the report of a run.

    The page at `path` is replaced whole, so that a browser never sees half of one. `png_dir`, if given, gets every
    plot as a PNG.

    Raises:
        `OSError`: a file cannot be written.
    """
    drawn = [(plot, series_of(run, plot)) for plot in PLOTS]
    text = render_page(run, drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8", errors="replace")
    os.replace(scratch, path)
    if png_dir is not None:
        png_dir.mkdir(parents=True, exist_ok=True)
        for plot, series in drawn:
            if series:
                save_png(plot, series, png_dir / f"{plot.name}.png")


def render_page(run: RunFiles, drawn: list[tuple[Plot, dict[str, Points]]]) -> str:
    """Return the page as text; what comes from the run is escaped."""
    template = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    plots = [
        {
            "title": plot.title,
            "hint": plot.hint,
            "alt": _describe(plot, series),
            # Legends can be names of environments, which matplotlib escapes.
            "svg": Markup(to_svg(plot, series)) if series else None,
        }
        for plot, series in drawn
    ]
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            name=_name(run.output_dir.resolve()),
            is_checkpoint=run.state_path is not None and run.state_path.parent != run.output_dir,
            cards=_cards(run),
            warnings=find_warnings(run),
            plots=plots,
            api=_api_rows(run),
            launch=_launch_rows(run),
            refused=run.refused.most_common(),
            staleness=sorted(run.staleness.items()),
            num_known=run.staleness.total(),
            completions=run.completions,
            config=run.facts.get("config"),
            versions=run.facts.get("versions"),
        )
    )


def find_warnings(run: RunFiles) -> list[str]:
    """Return what in the log needs a look, by the bounds that docs/metrics.md names."""
    found = [f"{count} values of {key} are NaN or infinite." for key, count in sorted(run.num_not_finite().items())]
    bounds = (
        ("logprob_probe/mean_abs_diff", 0.1, "The logprob probe was above 0.1 nats: server and trainer may differ."),
        ("perf/weight_sync_failures", 0, "At least one attempt of a publish failed; see the log."),
        ("trajectory_api/num_posts_refused", 0, "The trajectory API refused posts; its log says why."),
        ("trajectory_api/num_posts_turned_away", 0, "Environments found the queue of the trajectory API full."),
        ("data/num_batches_maybe_lost", 0, "At least one batch may be lost; see the log."),
    )
    for key, bound, sentence in bounds:
        values = [value for _, value in run.values(key)]
        if values and max(values) > bound:
            found.append(f"{sentence} Largest {key}: {max(values):.3g}.")
    if run.refused:
        found.append(f"{run.refused.total()} groups were refused or dropped; the reasons are below.")
    return found


def _name(output_dir: Path) -> str:
    # `trl-atropos launch` calls the directory of every trainer so.
    return f"{output_dir.parent.name}/{output_dir.name}" if output_dir.name == "model" else output_dir.name


def _cards(run: RunFiles) -> list[tuple[str, str]]:
    cards = [("steps", f"{int(run.history[-1].get('step', len(run.history)))}")]
    rewards = [value for _, value in run.values("reward")]
    if rewards:
        cards += [("first reward", f"{rewards[0]:.3f}"), ("last reward", f"{rewards[-1]:.3f}")]
    for key, title, spec in (
        ("policy_version", "policy version", ".0f"),
        ("num_rollouts_trained", "rollouts trained", ",.0f"),
        ("num_rollouts_dropped", "rollouts dropped", ",.0f"),
    ):
        values = run.values(key)
        if values:
            cards.append((title, format(values[-1][1], spec)))
    return cards


def _api_rows(run: RunFiles) -> list[tuple[str, str]]:
    """What the log knows of the trajectory API; nothing for recorded data and for logs of earlier versions."""
    kinds = [value for _, value in run.values("trajectory_api/keeps_batches")]
    if not kinds:
        return []
    rows = [("API", "trl-atropos api" if kinds[-1] else "run-api, which shows no more of itself")]
    for key, title in (
        ("num_queued_groups", "groups in the queue"),
        ("stored_bytes", "bytes stored"),
        ("num_unacknowledged_batches", "batches without a receipt"),
    ):
        values = [value for _, value in run.values(f"trajectory_api/{key}")]
        if values:
            rows.append((title, f"{values[-1]:,.0f} at the end, at most {max(values):,.0f}"))
    for key, title in (
        ("num_restarts", "restarts"),
        ("num_posts_refused", "posts refused for what they hold"),
        ("num_posts_repeated", "posts that came twice and were stored once"),
        ("num_posts_turned_away", "posts that found the queue full"),
        ("num_batches_repeated", "batches handed out again to their trainer"),
        ("num_batches_put_back", "batches that returned to the queue"),
    ):
        values = [value for _, value in run.values(f"trajectory_api/{key}")]
        if values:
            rows.append((title, f"{_sum_over_resumes(values):,.0f}"))
    return rows


def _launch_rows(run: RunFiles) -> list[tuple[str, str]]:
    """Parts that a launch started again, and what its gateway counted; nothing for other runs."""
    rows = [(f"{name} started again", str(count)) for name, count in run.launch.get("num_restarts", {}).items()]
    counts = run.launch.get("gateway")
    if counts is None:
        return rows
    for key, title in (
        ("num_sessions", "sessions of the gateway"),
        ("num_turns", "turns"),
        ("num_branches", "branches: histories that were rewritten"),
        ("num_groups_sent", "groups sent"),
        ("num_groups_lost", "groups given up"),
        ("num_sampled_tokens", "sampled tokens"),
    ):
        rows.append((title, f"{counts[key]:,}"))
    rows.append(("share of later turns that continue what was sampled", f"{counts['spliced_share']:.3f}"))
    return rows + [
        (f"tokens not trained: {reason}", f"{number:,}") for reason, number in counts["masked_tokens"].items()
    ]


def _sum_over_resumes(values: list[float]) -> float:
    """The count of a whole run, of which every trainer process begins with 0."""
    return values[0] + sum(now - before if now >= before else now for before, now in pairwise(values))


def _describe(plot: Plot, series: dict[str, Points]) -> str:
    parts = []
    for label, points in series.items():
        values: list[Any] = [value for _, value in points]
        parts.append(
            f"{label} from {values[0]:.3g} to {values[-1]:.3g}, least {min(values):.3g}, most {max(values):.3g}"
        )
    return f"{plot.title} in {plot.unit} over the optimizer steps: {'; '.join(parts)}."
