"""The configuration of a run as a file that `--config` of the training script takes again."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from ..secrets import is_secret, without_logins


TRAINING_CONFIG_FILE = "training_config.yaml"

OF_THIS_MACHINE = {
    "output_dir",
    "logging_dir",
    "run_name",
    "resume_from_checkpoint",
    "local_rank",
    "push_to_hub",
    "push_merged",
}
"""Options that say where a run was, and nothing about the training itself."""

WATCHING = {"disable_tqdm", "report_to", "debug", "include_for_metrics"}
DERIVED = {"atropos_batch_size", "dataloader_pin_memory"}
"""What `__post_init__` works out from the other options and the machine."""

LEFT_OUT = OF_THIS_MACHINE | WATCHING | DERIVED


def training_config(args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
    """The options that differ from their defaults, with those of TRL's `ModelConfig` that describe the unwrapped
    policy.

    The values are plain: numbers, text, lists and dictionaries. Tokens, keys and passwords are left out, and so is
    what belongs to one machine.
    """
    options = {}
    for field in fields(args):
        if not field.init or field.name in LEFT_OUT or field.name.startswith(("_", "hub_")) or is_secret(field.name):
            continue
        value, default = _plain(getattr(args, field.name)), _plain(field.default)
        if isinstance(value, dict) and field.name == "accelerator_config":
            default, usual = {}, _plain(AcceleratorConfig())
            value = {name: chosen for name, chosen in value.items() if chosen != usual.get(name)}
        if value is not None and value != default:
            options[field.name] = value
    return {**_model_options(model), **options}


def write_training_config(config: Mapping[str, Any], directory: Path) -> None:
    """Write what `training_config` made to `training_config.yaml` in a directory."""
    path = directory / TRAINING_CONFIG_FILE
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    path.write_text(f"# python examples/scripts/atropos.py --config {path.name} --output_dir ...\n{text}", "utf-8")


def base_model_name(model: nn.Module) -> str | None:
    """The Hub id or directory that the base model was loaded from, if it was."""
    config = getattr(model, "config", None)
    adapters = getattr(model, "peft_config", {})
    names = [config.base_model_name_or_path for config in adapters.values()]
    return next((str(name) for name in [*names, getattr(config, "_name_or_path", None)] if name), None)


def _model_options(model: nn.Module) -> dict[str, Any]:
    name = base_model_name(model)
    options: dict[str, Any] = {} if name is None else {"model_name_or_path": name}
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    for option in ("load_in_4bit", "load_in_8bit"):
        if getattr(quantization, option, False):
            options[option] = True
    adapters = list(getattr(model, "peft_config", {}).values())
    if adapters:
        adapter = adapters[0]
        named = {
            "lora_r": "r",
            "lora_alpha": "lora_alpha",
            "lora_dropout": "lora_dropout",
            "lora_target_modules": "target_modules",
            "lora_modules_to_save": "modules_to_save",
            "use_rslora": "use_rslora",
            "use_dora": "use_dora",
        }
        lora = {option: _plain(getattr(adapter, attribute, None)) for option, attribute in named.items()}
        options |= {"use_peft": True, **{option: value for option, value in lora.items() if value}}
    return options


def _plain(value: Any) -> Any:
    """The value as YAML knows it; None for what a file cannot hold."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, str):
        return without_logins(str(value))
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    to_dict = getattr(value, "to_dict", None)
    return _plain(to_dict()) if callable(to_dict) else None
