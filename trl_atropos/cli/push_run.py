"""What `trl-atropos push` does: find the model of a run, make its card, upload both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import PreflightError
from ..report.hub.merged import MERGED_DIR, save_merged
from ..report.hub.model_card import describe_merged, files_to_upload, write_model_card
from ..report.hub.run_model import RunModel, find_model, is_adapter, merged_repo_of, model_files, warn_of_local_base
from ..report.hub.training_config import TRAINING_CONFIG_FILE
from ..report.hub.upload import HubClient, wait_for
from ..trainer.yaml_file import read_yaml


@dataclass(frozen=True)
class Push:
    """What the command was told.

    `run_dir` is the directory of the trainer, that of `trl-atropos launch`, or a checkpoint. `hub_model_id` defaults
    to its name, in the namespace of the token. `revision` is a branch, made if there is none. `merged` uploads an
    adapter merged into its base model as well. `dry_run` shows the files and uploads nothing.
    """

    run_dir: Path
    hub_model_id: str | None = None
    private: bool = False
    revision: str | None = None
    merged: bool = False
    dry_run: bool = False


def run_push(push: Push, console: Console | None = None) -> list[str]:
    """Upload what a finished or killed run left, show the files, and return the URLs of the commits.

    Raises:
        PreflightError: There is no model, or it cannot be merged.
        HubUploadError: The Hub did not take it.
    """
    console = console or Console()
    model = find_model(push.run_dir)
    if push.merged and not is_adapter(model.directory):
        raise PreflightError(
            f"{model.directory} holds a whole model and no adapter.",
            "There is nothing to merge.",
            "Leave out --merged.",
        )
    warn_of_local_base(model.directory)
    name = push.hub_model_id or model.output_dir.resolve().name
    if push.dry_run:
        _show(console, files_to_upload(model.directory, model.output_dir), model, name)
        return []
    hub = HubClient(model.output_dir, logs_failures=False)
    repo_id = hub.create_repo(name, push.private, push.revision)
    config = _config_of(model)
    write_model_card(
        model.output_dir, config, hub_model_id=repo_id, tags=("peft",) if is_adapter(model.directory) else ()
    )
    uploads = [(repo_id, files_to_upload(model.directory, model.output_dir))]
    if push.merged:
        merged_id = hub.create_repo(merged_repo_of(repo_id), push.private, push.revision)
        merged = _merge(model, console)
        files = describe_merged(model.output_dir, config, merged_id, repo_id)
        uploads.append((merged_id, {**model_files(merged), **files}))
    urls = []
    for target, files in uploads:
        _show(console, files, model, target)
        future = hub.upload(files, target, "Upload with trl-atropos push", revision=push.revision)
        wait_for(future, f"the model to {target}")
        failure = future.exception()
        if failure is not None:
            raise hub.explain(target, failure) from failure
        urls.append(str(future.result().commit_url))
    return urls


def _config_of(model: RunModel) -> dict[str, Any]:
    path = model.output_dir / TRAINING_CONFIG_FILE
    if not path.exists():
        return {}
    why, fix = "The model card is made from it.", "Mend it, or move it away."
    config = read_yaml(path, str(path), why, fix) or {}
    if not isinstance(config, dict):
        raise PreflightError(f"{path} holds a {type(config).__name__}, not a mapping.", why, fix)
    return config


def _merge(model: RunModel, console: Console) -> Path:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    merged = model.output_dir / MERGED_DIR
    with console.status("Merging the adapter into its base model"):
        try:
            policy = AutoPeftModelForCausalLM.from_pretrained(str(model.directory))
            tokenizer = AutoTokenizer.from_pretrained(str(model.directory))
        except (OSError, ValueError) as exc:
            raise PreflightError(
                f"The adapter in {model.directory} cannot be loaded: {exc}.",
                "It is merged into the base model that adapter_config.json names.",
                "Make that model available, or leave out --merged.",
            ) from exc
        save_merged(policy, tokenizer, merged)
    return merged


def _show(console: Console, files: dict[str, Path], model: RunModel, target: str) -> None:
    table = Table(title=f"{model.directory} to {target}")
    table.add_column("file")
    table.add_column("MB", justify="right")
    for name, path in sorted(files.items()):
        table.add_row(name, f"{path.stat().st_size / 1e6:.2f}")
    console.print(table)
