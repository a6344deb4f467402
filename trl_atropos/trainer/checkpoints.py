"""Which checkpoint a run resumes from, and what it says of the data."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import PreflightError
from ..wire.journal import parse_json


if TYPE_CHECKING:
    from .atropos_config import AtroposConfig


logger = logging.getLogger(__name__)

STATE_KEY = "AtroposTrainer"
"""Where the state of the data stands among the `stateful_callbacks` of trainer_state.json."""

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def read_data_state(checkpoint: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what a checkpoint says of the data; None if the checkpoint is not complete.

    trainer_state.json is the last file that transformers writes, so a checkpoint in the middle of which a trainer was
    killed has none, or half of one.
    """
    path = Path(checkpoint) / TRAINER_STATE_NAME
    state = parse_json(path.read_bytes()) if path.is_file() else None
    if not isinstance(state, dict):
        return None
    data_state = state.get("stateful_callbacks", {}).get(STATE_KEY)
    return data_state if isinstance(data_state, dict) else None


def find_checkpoint(
    output_dir: str | os.PathLike[str], resume_from_checkpoint: str | bool | None
) -> tuple[str | None, dict[str, Any]]:
    """Find the checkpoint to resume from, and return its directory and what it says of the data.

    `resume_from_checkpoint` is a directory, or True for the newest complete checkpoint in `output_dir`. If the run
    starts at step 0, the directory is None and the state is empty.

    Raises:
        [`PreflightError`]: the checkpoint that was asked for is not complete.
    """
    if not resume_from_checkpoint:
        return None, {}
    if isinstance(resume_from_checkpoint, str):
        state = read_data_state(resume_from_checkpoint)
        if state is None:
            raise PreflightError(
                f"The checkpoint {resume_from_checkpoint} is not complete.",
                f"Its {TRAINER_STATE_NAME} is missing, cut off, or without the state of the data: a trainer was killed while it "
                "saved, or another trainer wrote it.",
                "Resume from an earlier one, or let the newest complete one be found (`resume_from_checkpoint=True`).",
            )
        return resume_from_checkpoint, state
    directory = Path(output_dir)
    paths = list(directory.iterdir()) if directory.is_dir() else []
    found = [(int(match[1]), path) for path in paths if (match := _CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        state = read_data_state(path)
        if state is not None:
            return str(path), state
        logger.warning(
            f"{path} is not complete, a trainer was killed while it saved: looking for an earlier checkpoint."
        )
    return None, {}


def check_optimizer(checkpoint: str | None, state: dict[str, Any], args: AtroposConfig) -> None:
    """Refuse to resume without optimizer and schedule unless that is asked for; warn of checkpoints that have neither.

    `checkpoint` and `state` are those of [`find_checkpoint`].

    Raises:
        [`PreflightError`]: the checkpoint is one of the model alone.
    """
    if args.save_only_model and args.save_strategy != "no":
        logger.warning(
            "save_only_model: a run that resumes from these checkpoints starts the optimizer and the learning rate schedule "
            "anew, and says so (--resume_without_optimizer)."
        )
    if checkpoint is None or state.get("has_optimizer", True):
        return
    why = "It was written with save_only_model, so that optimizer and learning rate schedule would start anew in the middle of the run."
    if not args.resume_without_optimizer:
        raise PreflightError(
            f"The checkpoint {checkpoint} holds the model alone.",
            why,
            "Set --resume_without_optimizer to go on so, or start a new run with --model_name_or_path and this checkpoint.",
        )
    logger.warning(f"resume_without_optimizer: {checkpoint} holds the model alone. {why}")


def forget_checkpoint(output_dir: str | os.PathLike[str], global_step: int) -> None:
    """Take from the checkpoint of a step, which is about to be overwritten, what would show it as complete."""
    (Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{global_step}" / TRAINER_STATE_NAME).unlink(missing_ok=True)
