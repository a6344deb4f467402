"""What a run leaves behind, read for its report: log history, facts of the run, refused groups, completions."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PreflightError


RUN_FACTS_FILE = "run_facts.json"
LAUNCH_SUMMARY_FILE = "summary.json"
"""What `trl-atropos launch` writes beside the directory of its trainer once that has ended."""
MAX_SHOWN_STEPS = 6
MAX_TEXT_CHARACTERS = 1500

LogEntry = Mapping[str, Any]


@dataclass(frozen=True)
class Completion:
    """One rollout as text.

    `step` is the number of the optimizer step. Prompt and completion are shortened to 1500 characters. `reward` is in
    the environment's unit, and `advantage` is the mean over trained tokens before normalisation.
    """

    step: int
    environment: str
    prompt: str
    completion: str
    reward: float
    advantage: float


@dataclass(frozen=True)
class RunFiles:
    """What a report is made from.

    `output_dir` is the directory of the trainer, and `state_path` the `trainer_state.json` that was read; None if the
    log history came from the trainer itself. `history` holds the log lines of optimizer steps, oldest first. `facts`
    are `config`, `versions` and `run` (how it was started); empty if they were not recorded.

    `refused` counts, by reason, the groups in `quarantine.jsonl` and those that were dropped as too old. `staleness`
    counts trained rollouts by the number of versions that the policy had moved on since they were sampled; those of
    unknown version are left out. `completions` are a selection: of at most 6 steps the best, the middle and the worst
    rollout. `launch` is the summary of the launch that the run was a part of; empty if there was none or it goes on.
    """

    output_dir: Path
    state_path: Path | None
    history: Sequence[LogEntry]
    facts: dict[str, dict[str, Any]]
    refused: Counter[str]
    staleness: Counter[int]
    completions: Sequence[Completion]
    launch: Mapping[str, Any]

    def values(self, key: str) -> list[tuple[float, float]]:
        """Return `(step, value)` of every log line with a finite value of a metric."""
        return [
            (float(entry.get("step", index)), float(entry[key]))
            for index, entry in enumerate(self.history, start=1)
            if _is_number(entry.get(key)) and math.isfinite(entry[key])
        ]

    def num_not_finite(self) -> Counter[str]:
        """Count the values of each metric that are NaN or infinite."""
        return Counter(
            key
            for entry in self.history
            for key, value in entry.items()
            if _is_number(value) and not math.isfinite(value)
        )

    def environments(self) -> list[str]:
        """Return the names of the environments that have a metric of their own."""
        keys = {key for entry in self.history for key in entry}
        return sorted(
            key[len("env/") : -len("/reward")] for key in keys if key.startswith("env/") and key.endswith("/reward")
        )


def read_run_files(run_dir: Path, history: Sequence[LogEntry] | None = None) -> RunFiles:
    """Read a run that is finished, going on, or was killed.

    `run_dir` is the directory of the trainer, or that of `trl-atropos launch`. `history` is the log history of a
    trainer in memory; if it is not given, that of `trainer_state.json` is read, or that of the newest checkpoint that
    can be read.

    Raises:
        [`PreflightError`]: there is no log with an optimizer step, or a file cannot be read.
    """
    state_path = None
    output_dir = run_dir
    if history is None:
        state_path, history = _read_history(run_dir)
        output_dir = (
            state_path.parent.parent if state_path.parent.name.startswith("checkpoint-") else state_path.parent
        )
    steps = [entry for entry in history if "loss" in entry or "reward" in entry]
    if not steps:
        raise _no_history(run_dir)
    try:
        marks = list(_json_lines(output_dir / "journal" / "marks.jsonl"))
        return RunFiles(
            output_dir,
            state_path,
            steps,
            _facts(output_dir),
            _refused(output_dir) + _dropped(marks),
            _staleness(marks, steps),
            _completions(output_dir),
            _launch(output_dir),
        )
    except (OSError, ValueError, KeyError) as exc:
        raise PreflightError(
            f"A file of the run in {output_dir} cannot be read: {exc}.",
            "It may be cut off, or come from another program.",
            "Move the file away, and make the report with `trl-atropos report` again.",
        ) from exc


def _read_history(run_dir: Path) -> tuple[Path, Sequence[LogEntry]]:
    for directory in (run_dir, run_dir / "model"):
        checkpoints = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
        for path in (folder / "trainer_state.json" for folder in (directory, *checkpoints)):
            try:
                history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            except (OSError, ValueError, KeyError, TypeError):
                # A run that was killed leaves its last file missing or cut off; the one before it is whole.
                continue
            if isinstance(history, list):
                return path, [entry for entry in history if isinstance(entry, dict)]
    raise _no_history(run_dir)


def _no_history(run_dir: Path) -> PreflightError:
    return PreflightError(
        f"{run_dir} holds no trainer_state.json with a logged optimizer step, and neither do its checkpoints.",
        "The report is made from the log history in it.",
        "Name the --output_dir of a run, or the run directory of `trl-atropos launch`; a run that may be killed needs "
        "`--save_steps` and `--logging_steps 1`.",
    )


def _facts(output_dir: Path) -> dict[str, dict[str, Any]]:
    path = output_dir / RUN_FACTS_FILE
    if not path.exists():
        return {}
    facts = json.loads(path.read_text(encoding="utf-8"))
    return {name: dict(facts.get(name, {})) for name in ("config", "versions", "run")}


def _launch(output_dir: Path) -> dict[str, Any]:
    path = output_dir.parent / LAUNCH_SUMMARY_FILE
    # So a launch calls the directory of its trainer.
    if output_dir.name != "model" or not path.exists():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _refused(output_dir: Path) -> Counter[str]:
    refused = _json_lines(output_dir / "quarantine.jsonl")
    return Counter(str(group.get("reason", "unknown")) for group in refused)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Return the objects of a file; none if there is no file."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        # A run that goes on may be in the middle of its last line.
        yield from (json.loads(line) for line in file if line.endswith("\n"))


def _dropped(marks: Sequence[Mapping[str, Any]]) -> Counter[str]:
    dropped: Counter[str] = Counter()
    for mark in marks:
        if mark["event"] == "dropped":
            dropped[f"{mark['reason']} (dropped)"] += len(mark["groups"])
    return dropped


def _staleness(marks: Sequence[Mapping[str, Any]], steps: Sequence[LogEntry]) -> Counter[int]:
    sampled = {
        (mark["batch"], group): versions
        for mark in marks
        if mark["event"] == "versions"
        for group, versions in enumerate(mark["policy_versions"], start=mark["first_group"])
    }
    dropped = {(mark["batch"], group) for mark in marks if mark["event"] == "dropped" for group in mark["groups"]}
    # A step that was made again after a resume has several marks, of which the last counts.
    trained = {mark["step"]: mark for mark in marks if mark["event"] == "trained"}
    published = sorted((entry["step"], int(entry["policy_version"])) for entry in steps if "policy_version" in entry)
    counts: Counter[int] = Counter()
    for step, mark in trained.items():
        num_earlier = bisect_left(published, (step, 0))
        before = published[num_earlier - 1][1] if num_earlier else 0
        groups = range(mark["first_group"], mark["first_group"] + mark["num_groups"])
        for place in ((mark["batch"], group) for group in groups):
            if place not in dropped:
                counts.update(before - version for version in sampled.get(place) or () if version is not None)
    return counts


def _completions(output_dir: Path) -> list[Completion]:
    paths = sorted((output_dir / "completions").glob("completions_*.parquet"))
    if not paths:
        return []
    import pandas as pd

    last = len(paths) - 1
    chosen = sorted({round(index * last / (MAX_SHOWN_STEPS - 1)) for index in range(MAX_SHOWN_STEPS)})
    shown = []
    for path in (paths[index] for index in chosen):
        rows = pd.read_parquet(path).sort_values("reward", ascending=False).to_dict("records")
        for row in (rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1}) if rows):
            texts = (_text(row["prompt"]), _text(row["completion"]))
            shown.append(
                Completion(
                    int(row["step"]), str(row["environment"]), *texts, float(row["reward"]), float(row["advantage"])
                )
            )
    return shown


def _text(value: Any) -> str:
    """Return a text, or turns of a conversation as one, shortened."""
    if not isinstance(value, str):
        value = "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    if len(value) <= MAX_TEXT_CHARACTERS:
        return str(value)
    return f"{value[:MAX_TEXT_CHARACTERS]} … [{len(value) - MAX_TEXT_CHARACTERS} more characters]"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
