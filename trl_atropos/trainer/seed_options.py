"""The keys of an AtroposSFTTrainer file (`atropos_sft_trainer.yaml` of the VERL integration) as options of this trainer.

Every key either becomes an option, or is refused with what to use instead: none is ignored.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PreflightError, did_you_mean


@dataclass(frozen=True)
class SeedOption:
    """What becomes of one key.

    `options` are the names of the options that it sets; where `make` computes them, they are for the documentation.
    `meaning` is one sentence for the documentation. `make` turns the value into the options, and raises `ValueError`
    with a reason; without it, the value is taken as it is.
    """

    options: tuple[str, ...]
    meaning: str
    make: Callable[[Any], dict[str, Any]] | None = None

    def __call__(self, value: Any) -> dict[str, Any]:
        """Return the options for a value."""
        return {self.options[0]: value} if self.make is None else self.make(value)


def _weighting(value: Any) -> dict[str, Any]:
    if value is not True:
        raise ValueError("without advantages this is plain supervised fine-tuning: use TRL's SFTTrainer")
    return {"loss_type": "weighted_sft"}


def _lora_rank(value: Any) -> dict[str, Any]:
    return {"use_peft": True, "lora_r": value} if value else {}


def _loggers(value: Any) -> dict[str, Any]:
    names = [value] if isinstance(value, str) else list(value or ())
    return {"report_to": [name for name in names if name != "console"] or "none"}


def _betas(value: Any) -> dict[str, Any]:
    first, second = value
    return {"adam_beta1": first, "adam_beta2": second}


def _only(accepted: Any, instead: str) -> Callable[[Any], dict[str, Any]]:
    def check(value: Any) -> dict[str, Any]:
        if value != accepted:
            raise ValueError(instead)
        return {}

    return check


SEED_OPTIONS: dict[str, SeedOption] = {
    "use_advantage_weighting": SeedOption(
        ("loss_type",), "`true` is `weighted_sft`, the advantage-weighted cross entropy; `false` is refused.", _weighting
    ),
    "data.atropos.api_url": SeedOption(("atropos_api_url",), "Root URL of `run-api`."),
    "data.atropos.data_path": SeedOption(("data_path",), "Recorded rollouts instead of an API."),
    "data.atropos.batch_size": SeedOption(
        ("atropos_batch_size", "per_device_train_batch_size"),
        "Rollouts of one optimizer step over all processes: cut into `gradient_accumulation_steps`, or into micro-batches of "
        "`data.micro_batch_size_per_gpu` if that is given.",
    ),
    "data.atropos.refresh_interval": SeedOption(("refresh_interval",), "Cap of the poll interval, in seconds."),
    "data.atropos.max_retries": SeedOption(
        ("api_timeout_s",), "Together with `timeout`: (max_retries + 1) x timeout seconds until an API that is away is given up."
    ),
    "data.atropos.timeout": SeedOption(("api_timeout_s",), "See `max_retries`. In seconds."),
    "data.train_batch_size": SeedOption(("atropos_batch_size",), "As `data.atropos.batch_size`."),
    "data.micro_batch_size_per_gpu": SeedOption(("per_device_train_batch_size",), "Rollouts of one forward pass."),
    "data.max_length": SeedOption(("max_length",), "Longest rollout in tokens."),
    "model.partial_pretrain": SeedOption(("model_name_or_path",), "Checkpoint of the policy."),
    "model.enable_gradient_checkpointing": SeedOption(("gradient_checkpointing",), "Recompute activations."),
    "model.trust_remote_code": SeedOption(("trust_remote_code",), "Allow custom code of models."),
    "model.lora_rank": SeedOption(("use_peft", "lora_r"), "Above 0: train a LoRA adapter of this rank.", _lora_rank),
    "model.lora_alpha": SeedOption(("lora_alpha",), "Its scale."),
    "model.target_modules": SeedOption(("lora_target_modules",), "The modules that it changes."),
    "optim.lr": SeedOption(("learning_rate",), "Learning rate."),
    "optim.betas": SeedOption(("adam_beta1", "adam_beta2"), "Of AdamW.", _betas),
    "optim.weight_decay": SeedOption(("weight_decay",), "Of AdamW."),
    "optim.warmup_steps_ratio": SeedOption(("warmup_steps",), "Share of the steps, in [0, 1), in which the learning rate grows."),
    "optim.clip_grad": SeedOption(("max_grad_norm",), "Largest norm of the gradient."),
    "optim.lr_scheduler": SeedOption(("lr_scheduler_type",), "Schedule of the learning rate."),
    "trainer.default_local_dir": SeedOption(("output_dir",), "Where everything is written."),
    "trainer.experiment_name": SeedOption(("run_name",), "Name of the run in trackers."),
    "trainer.total_training_steps": SeedOption(("max_steps",), "Number of optimizer steps."),
    "trainer.seed": SeedOption(("seed",), "Seed of the run."),
    "trainer.logger": SeedOption(("report_to",), "Trackers; `console` is always there.", _loggers),
    "ulysses_sequence_parallel_size": SeedOption(
        (), "1; more ranks per sequence are the launcher's business.",
        _only(1, "launch with --config_file examples/accelerate_configs/ulysses.yaml instead"),
    ),
    "use_remove_padding": SeedOption(
        ("sequence_layout",), "`true` is `packed`, `false` is `auto`.", lambda value: {"sequence_layout": "packed"} if value else {}
    ),
}  # fmt: skip
"""What becomes of each key of the file, written with dots between its sections."""

SECTIONS = {key.split(".")[0] for key in SEED_OPTIONS if "." in key}


def translate_seed_options(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replace the keys of an AtroposSFTTrainer file, given as YAML gives it. Keys of this trainer stay as they are.

    Returns the options, and a line for each key that was replaced.

    Raises:
        [`PreflightError`]: a key in one of the sections is unknown, a value has no counterpart, or two keys contradict each
            other.
    """
    found: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in config.items():
        if key in SECTIONS and isinstance(value, Mapping):
            found.update(_flat(key, value))
        elif key in SEED_OPTIONS:
            found[key] = value
        else:
            options[key] = value
    timeouts = {name: found.pop(f"data.atropos.{name}", None) for name in ("max_retries", "timeout")}
    lines: list[str] = []
    for key, value in found.items():
        made = _translate(key, value)
        _merge(options, made, key)
        lines.append(f"{key}: {value!r} -> {_describe(made)}")
    if any(value is not None for value in timeouts.values()):
        retries = 3 if timeouts["max_retries"] is None else timeouts["max_retries"]
        timeout = 30 if timeouts["timeout"] is None else timeouts["timeout"]
        _check_number("data.atropos.max_retries", retries, minimum=0)
        _check_number("data.atropos.timeout", timeout, minimum=0, kind=float)
        made = {"api_timeout_s": (retries + 1) * float(timeout)}
        _merge(options, made, "data.atropos.timeout")
        given = ", ".join(f"data.atropos.{name}: {value!r}" for name, value in timeouts.items() if value is not None)
        lines.append(f"{given} -> {_describe(made)}")
    batch_keys = [key for key in ("data.atropos.batch_size", "data.train_batch_size") if key in found]
    if batch_keys:
        made = _split_batch(options, batch_keys[0])
        _merge(options, made, batch_keys[0])
        lines.append(f"atropos_batch_size: {options['atropos_batch_size']} -> {_describe(made)}")
    return options, lines


def _flat(prefix: str, section: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in section.items():
        key = f"{prefix}.{name}"
        values.update(_flat(key, value) if isinstance(value, Mapping) else {key: value})
    return values


def _translate(key: str, value: Any) -> dict[str, Any]:
    if key not in SEED_OPTIONS:
        raise PreflightError(
            f"The configuration file has `{key}`: {value!r}, which has no counterpart here.",
            "A key that is ignored would make another run than the file describes.",
            f"{did_you_mean(key, SEED_OPTIONS)} Otherwise remove it; docs/config.md lists all known keys and every option.",
        )
    try:
        return SEED_OPTIONS[key](value)
    except (TypeError, ValueError) as exc:
        raise PreflightError(
            f"The configuration file has `{key}`: {value!r}.",
            f"This cannot be translated ({SEED_OPTIONS[key].meaning.rstrip('.')}).",
            f"Change it: {exc}.",
        ) from exc


def _merge(options: dict[str, Any], made: Mapping[str, Any], key: str) -> None:
    for name, value in made.items():
        if options.get(name, value) != value:
            raise PreflightError(
                f"The configuration file says `{name}` twice: {options[name]!r}, and {value!r} through `{key}`.",
                "Which one is meant cannot be known.",
                f"Remove `{name}` or `{key}`.",
            )
        options[name] = value


def _split_batch(options: Mapping[str, Any], key: str) -> dict[str, Any]:
    """How the rollouts of a step, which `key` gives, are cut for this number of processes."""
    batch_size, world_size = options["atropos_batch_size"], int(os.environ.get("WORLD_SIZE", "1"))
    given = (
        "per_device_train_batch_size" if "per_device_train_batch_size" in options else "gradient_accumulation_steps"
    )
    other = "gradient_accumulation_steps" if given.startswith("per_device") else "per_device_train_batch_size"
    size = options.get(given, 1)
    _check_number(key, batch_size, minimum=1)
    _check_number(given, size, minimum=1)
    factor = size * world_size
    if batch_size % factor:
        raise PreflightError(
            f"{batch_size} rollouts a step cannot be cut into {world_size} processes x {given} {size}.",
            "One optimizer step trains one batch of the API.",
            f"Set {key} to a multiple of {factor}, or change {given} or the number of processes.",
        )
    return {given: size, other: batch_size // factor}


def _check_number(key: str, value: Any, *, minimum: int, kind: type[int] | type[float] = int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | kind) or not value >= minimum:
        raise PreflightError(
            f"The configuration file has `{key}`: {value!r}.",
            "Other options are computed from it.",
            f"Set it to a {'whole ' if kind is int else ''}number of {minimum} or more.",
        )


def _describe(made: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value!r}" for name, value in made.items()) or "nothing to set"
