"""Records the facts of a run when it starts, and writes its report when it ends."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import PreflightError
from .page import REPORT_FILE, write_report
from .run_files import RUN_FACTS_FILE, read_run_files
from .secrets import HIDDEN, is_secret, shown_command, without_logins


logger = logging.getLogger(__name__)

PARTS = ("trl-atropos", "atroposlib", "trl", "transformers", "torch", "vllm", "accelerate", "peft", "datasets")


class ReportCallback(TrainerCallback):
    """Writes `run_facts.json` when training begins and, if `writes_page`, `report.html` when it ends, into
    `output_dir`, on rank 0.

    A report that cannot be written is logged and does not end the run.
    """

    def __init__(self, writes_page: bool = True):
        self.writes_page = writes_page

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what the report says of options and versions."""
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / RUN_FACTS_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"config": changed_options(args), "versions": versions(), "run": run_facts(args)}
            path.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        except OSError as exc:
            logger.warning(f"{path} cannot be written: {exc}. The report will lack configuration and versions.")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report."""
        if not state.is_world_process_zero or not self.writes_page:
            return
        output_dir = Path(str(args.output_dir))
        try:
            # The trainer writes trainer_state.json only after this.
            write_report(read_run_files(output_dir, state.log_history), output_dir / REPORT_FILE)
        except (PreflightError, OSError, ValueError) as exc:
            logger.warning(
                f"The report of the run was not written: {exc} Training is not affected; after mending it, run "
                f"`trl-atropos report {output_dir}`."
            )


def changed_options(args: TrainingArguments) -> dict[str, str]:
    """Return the options of a run that differ from their defaults, by name and as text.

    The value of a token, key or password, and a login inside of a URL, is `***`.
    """
    defaults = {field.name: field.default for field in fields(args)}
    shown = {}
    for name, default in defaults.items():
        value = getattr(args, name)
        if value is None or value == default or name.startswith("_"):
            continue
        shown[name] = HIDDEN if is_secret(name) else without_logins(str(value))
    return shown


def run_facts(args: TrainingArguments) -> dict[str, str]:
    """Return how a run was started, and on what: `command` without secrets, `num_processes`, `device`."""
    import torch

    cuda = args.device.type == "cuda"
    device = torch.cuda.get_device_name(args.device) if cuda else f"{args.device.type}, {os.cpu_count()} cores"
    return {
        "command": shown_command(["python", *sys.argv]),
        "num_processes": str(args.world_size),
        "device": device,
    }


def versions() -> dict[str, str]:
    """Return the installed parts of a run with their versions."""
    found = {}
    for name in PARTS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
