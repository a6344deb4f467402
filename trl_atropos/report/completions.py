"""Tables of prompts and completions for people: on the console, as parquet files, and in the experiment trackers."""

from __future__ import annotations

import importlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainingArguments
from transformers.utils import is_rich_available
from trl.trainer.utils import print_prompt_completions_sample

from ..data.environment_metrics import environment_name
from ..data.options import DataOptions
from ..data.steps import with_advantages
from ..errors import PreflightError
from ..loss.options import StepOptions
from ..types import IGNORE_INDEX, Rollout, RolloutGroup


TRACKERS = ("wandb", "trackio")
"""The trackers that show tables."""

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class CompletionsTable:
    """Shows the rollouts of a step as TRL's `GRPOTrainer` does with `log_completions`, on rank 0.

    Differs from it in that (1) the console gets one table for each environment; (2) the file and the trackers have a
    column `environment`; (3) what is printed is drawn from a generator of its own, so that looking does not change the
    run.

    `processing_class` decodes, with special tokens, rollouts that came without turns of an assistant. `output_dir`
    gets `completions/completions_<step>.parquet`. `num_completions_to_print` is the number for each environment; None
    prints all. `scale_rewards`, `advantage_baseline`, `env_names` and `report_to` are those of `AtroposConfig`; the first two are for the column
    `advantage`, the mean over trained tokens before normalisation.

    Raises:
        [`PreflightError`]: there is no tokenizer.
    """

    processing_class: Any
    output_dir: str | os.PathLike[str]
    scale_rewards: str
    advantage_baseline: str
    num_completions_to_print: int | None = None
    env_names: Sequence[str] | None = None
    report_to: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.processing_class is None:
            raise PreflightError(
                "log_completions is on, and the trainer has no tokenizer.",
                "Environments send tokens; a table shows text.",
                "Pass processing_class to AtroposTrainer, or leave --log_completions out.",
            )

    def log(self, groups: Sequence[RolloutGroup], step: int) -> None:
        """Print, write and track the groups that an optimizer step trained."""
        rows = self._rows(groups, step)
        if not rows:
            return
        if is_rich_available():
            self._print(rows, step)
        table = pd.DataFrame({name: _uniform([row[name] for row in rows]) for name in rows[0]})
        path = Path(self.output_dir) / "completions" / f"completions_{step:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)
        for name in TRACKERS:
            if name in self.report_to:
                _track(importlib.import_module(name), table)

    def _rows(self, groups: Sequence[RolloutGroup], step: int) -> list[dict[str, Any]]:
        rollouts = with_advantages(groups, self.scale_rewards, self.advantage_baseline)
        names = [environment_name(group.env_id, self.env_names) for group in groups for _ in group.rollouts]
        rows = []
        for rollout, name in zip(rollouts, names, strict=True):
            prompt, completion = self._split(rollout)
            rows.append(
                {
                    "step": step,
                    "prompt": prompt,
                    "completion": completion,
                    "reward": rollout.reward,
                    "environment": name,
                    "advantage": _mean_advantage(rollout),
                }
            )
        return sorted(rows, key=lambda row: row["environment"])

    def _split(self, rollout: Rollout) -> tuple[Turns | str, Turns | str]:
        """What the policy was asked and what it did: from its first trained turn, or its first trained token, on."""
        is_trained = (rollout.labels != IGNORE_INDEX).tolist()
        turns = [_plain_turn(turn) for turn in rollout.messages or ()]
        of_assistant = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if of_assistant:
            # Examples in a prompt have turns of an assistant, too: as many as were sampled are its own, from the end.
            num_sampled = sum(1 for is_sampled, _ in groupby(is_trained) if is_sampled)
            start = of_assistant[-num_sampled if 0 < num_sampled <= len(of_assistant) else 0]
            return turns[:start], turns[start:]
        # Without one: an environment that only set `include_messages` sends all of its text as one turn of a user.
        first = is_trained.index(True) if any(is_trained) else len(is_trained)
        ids = rollout.input_ids.tolist()
        return self._decode(ids[:first]), self._decode(ids[first:])

    def _decode(self, ids: list[int]) -> str:
        return _printable(self.processing_class.decode(ids))

    def _print(self, rows: Sequence[dict[str, Any]], step: int) -> None:
        for name, group in groupby(rows, key=lambda row: row["environment"]):
            of_environment, num = list(group), self.num_completions_to_print
            if num is not None and num < len(of_environment):
                of_environment = random.Random(step).sample(of_environment, max(num, 0))
            if of_environment:
                print_prompt_completions_sample(
                    [row["prompt"] for row in of_environment],
                    [row["completion"] for row in of_environment],
                    {"reward": [row["reward"] for row in of_environment]},
                    [row["advantage"] for row in of_environment],
                    step,
                    extra={"environment": [name] * len(of_environment)},
                )


def make_completions_table(
    args: TrainingArguments, data: DataOptions, step: StepOptions, processing_class: Any
) -> CompletionsTable | None:
    """Make the table that the options ask for; None on other ranks than 0, or if they ask for none."""
    if not data.log_completions or args.process_index != 0:
        return None
    return CompletionsTable(
        processing_class,
        args.output_dir,
        step.scale_rewards,
        step.advantage_baseline,
        data.num_completions_to_print,
        data.env_names,
        list(args.report_to or ()),
    )


def _plain_turn(turn: dict[str, Any]) -> dict[str, str]:
    """Return a turn with text alone. Environments may send anything: TRL's printing ends the run at tool calls whose
    arguments are not JSON, and parquet at a column with both text and lists.
    """
    content = turn["content"]
    if isinstance(content, list):
        content = "".join(
            block["text"] if isinstance(block, dict) and isinstance(block.get("text"), str) else json.dumps(block)
            for block in content
        )
    elif not isinstance(content, str):
        content = "" if content is None else json.dumps(content)
    if turn.get("tool_calls"):
        content += json.dumps(turn["tool_calls"])
    return {"role": _printable(str(turn["role"])), "content": _printable(content)}


def _printable(text: str) -> str:
    # JSON can hold half of a surrogate pair, which neither a terminal nor a parquet file takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def _mean_advantage(rollout: Rollout) -> float:
    assert rollout.advantages is not None
    return rollout.advantages.sum().item() / max((rollout.labels != IGNORE_INDEX).sum().item(), 1)


def _uniform(column: list[Any]) -> list[Any]:
    """Give a column one type: turns beside text are written as JSON."""
    if len({type(value) for value in column}) == 1:
        return column
    return [value if isinstance(value, str) else json.dumps(value) for value in column]


def _track(tracker: Any, table: pd.DataFrame) -> None:
    # As in TRL: without a run, W&B is named in `report_to` but not used.
    if tracker.__name__ != "wandb" or tracker.run is not None:
        tracker.log({"completions": tracker.Table(dataframe=table)})
