"""Which files of a run are its model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub.constants import (
    SAFETENSORS_INDEX_FILE,
    SAFETENSORS_SINGLE_FILE,
)
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from ...errors import PreflightError
from ..run_files import RUN_FACTS_FILE


logger = logging.getLogger(__name__)

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
NOT_OF_THE_MODEL = {"trainer_state.json", RUN_FACTS_FILE, "summary.json"}
WEIGHTS = (SAFETENSORS_SINGLE_FILE, SAFETENSORS_INDEX_FILE, ADAPTER_SAFE_WEIGHTS_NAME)
PICKLED_OPTIONS = "training_args.bin"
"""The file holds the Hub's token and the server's key in the clear, and runs code when it is loaded: it never leaves
the machine.
"""


@dataclass(frozen=True)
class RunModel:
    """The newest model of a run: the directory of the trainer, and where the model lies, which is that or one of its
    checkpoints.
    """

    output_dir: Path
    directory: Path


def model_files(directory: Path) -> dict[str, Path]:
    """The files of a directory that make up its model (weights, tokenizer and their configurations), by name in the
    repository.

    The directory is the output directory of a trainer, or a checkpoint. The state of optimizer, data and trainer is
    left out.
    """
    found = {path.name: path for pattern in MODEL_FILES for path in sorted(directory.glob(pattern)) if path.is_file()}
    others = "model*.safetensors*" if is_adapter(directory) else "adapter_*"
    return {name: path for name, path in found.items() if name not in NOT_OF_THE_MODEL and not fnmatch(name, others)}


def is_adapter(directory: Path) -> bool:
    """Whether the newest weights of a directory are a PEFT adapter. It may hold a whole model of a run before, too."""
    newest = _newest_weights(directory)
    return newest is not None and newest.name == ADAPTER_SAFE_WEIGHTS_NAME


def checkpoint_files(directory: Path) -> dict[str, Path]:
    """All files of a checkpoint, for a run that is to be resumed elsewhere, except the pickled options."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in paths if path.name != PICKLED_OPTIONS}


def find_model(run_dir: Path) -> RunModel:
    """Find the newest model of a run that is finished, going on, or was killed: the weights that were written last.

    `run_dir` is the directory of the trainer, that of `trl-atropos launch`, or a checkpoint.

    Raises:
        [`PreflightError`]: there are no weights.
    """
    for output_dir in (run_dir, run_dir / "model"):
        # trainer_state.json is the last file of a checkpoint: without it the weights may be cut off.
        checkpoints = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json")]
        newest = [path for path in map(_newest_weights, (output_dir, *checkpoints)) if path is not None]
        if newest:
            return RunModel(_run_of(output_dir), max(newest, key=_written_at).parent)
    raise PreflightError(
        f"{run_dir} holds no model: neither it, nor its model/, nor a complete checkpoint has {' or '.join(WEIGHTS)}.",
        "A run that ended before its first --save_steps leaves no weights.",
        "Name the --output_dir of a run, the run directory of `trl-atropos launch`, or a checkpoint.",
    )


def merged_repo_of(repo_id: str) -> str:
    """The name of the repository for the merged model, made from that of the repository for its adapter."""
    return f"{repo_id}-merged"


def warn_of_local_base(directory: Path) -> None:
    """Log that nobody else can load an adapter whose base model is a directory of this machine."""
    if not is_adapter(directory):
        return
    path = directory / ADAPTER_CONFIG_NAME
    config: Mapping[str, object] = json.loads(path.read_text(encoding="utf-8"))
    name = str(config.get("base_model_name_or_path") or "")
    if Path(name).is_dir():
        logger.warning(
            f"The adapter names the directory {name} as its base model. Nobody else has it, so the adapter can be loaded here "
            "only. Train from a model of the Hub, or upload the merged model too: --push_merged, or `trl-atropos push --merged`."
        )


def _newest_weights(directory: Path) -> Path | None:
    paths = [path for path in (directory / name for name in WEIGHTS) if path.is_file()]
    return max(paths, key=_written_at, default=None)


def _written_at(path: Path) -> float:
    return path.stat().st_mtime


def _run_of(directory: Path) -> Path:
    is_checkpoint = directory.resolve().name.startswith("checkpoint-")
    return directory.resolve().parent if is_checkpoint else directory
