"""The options of a verl configuration as those of the parts that are used here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..data.options import DataOptions
from ..errors import PreflightError, did_you_mean
from ..loss.options import StepOptions
from ..trainer.atropos_config import AtroposConfig
from ..trainer.seed_options import translate_seed_options
from ..weight_sync.options import WeightSyncOptions


SEED_KEYS = ("use_advantage_weighting", "advantage_normalization", "advantage_clipping")
"""Keys of the seed's configuration that stand at the top; the others are those of `data.atropos`."""

SET_ELSEWHERE = {
    "atropos_api_url": "data.atropos.api_url",
    "data_path": "data.atropos.data_path",
    "atropos_batch_size": "data.train_batch_size",
    "refresh_interval": "data.atropos.refresh_interval",
    "max_length": "data.max_length",
    "max_tokens_per_micro_batch": "data.use_dynamic_bsz and data.max_token_len_per_gpu",
}
"""Options that have a place in the configuration already, and where."""

NOT_HERE = {
    "log_completions": "verl's trackers have no table of completions",
    "num_completions_to_print": "verl's trackers have no table of completions",
    "eval_path": "verl's trainer evaluates on data files, not on a server",
    "eval_max_tokens": "verl's trainer evaluates on data files, not on a server",
    "eval_log_dir": "verl's trainer evaluates on data files, not on a server",
    "top_entropy_quantile": "a step would need a forward pass before verl's own",
    "distillation_coef": "verl's engine gives the loss the logprobs of the sampled tokens only",
    "weight_sync_adapter_dir": "verl publishes whole weights (model.lora.merge)",
}
"""Options that do nothing under verl, and why."""


@dataclass(frozen=True)
class Restriction:
    """What of a key of verl is accepted, why nothing else is, and what to do instead."""

    accepted: tuple[Any, ...]
    why: str
    instead: str


RESTRICTIONS = {
    "data.train_files": Restriction(
        (None,), "Rollouts come from `data.atropos`.", "Set data.atropos.data_path or data.atropos.api_url."
    ),
    "data.val_files": Restriction(
        (None,),
        "Environments evaluate the policy; a loss on recorded rollouts says little of it.",
        "Leave it at null.",
    ),
    "data.custom_cls.path": Restriction((None,), "Rollouts come from `data.atropos`.", "Leave it at null."),
    "data.pad_mode": Restriction(
        ("no_padding",), "Rows are nested tensors, as verl's engines want them.", "Set data.pad_mode=no_padding."
    ),
    "trainer.test_freq": Restriction((-1,), "There is no validation data.", "Set trainer.test_freq=-1."),
    "engine.strategy": Restriction(
        ("fsdp2",), "Losses and publishes are tested with this engine only.", "Set engine.strategy=fsdp2."
    ),
    "engine.ulysses_sequence_parallel_size": Restriction(
        (1,), "Ranks that share a sequence would be dealt different rollouts.", "Leave it at 1."
    ),
    "model.use_fused_kernels": Restriction(
        (None, False), "The proof of a publish needs the logits of the model.", "Leave it at false."
    ),
}
"""Keys of verl's configuration that cannot have every value here."""


def atropos_config(config: Mapping[str, Any], *, num_ranks: int, device: str) -> AtroposConfig:
    """Make the options of data, loss and publishes from a verl configuration.

    `config` is `trl_atropos/verl/config/atropos_sft_trainer.yaml` with what the user changed, as plain dictionaries.
    `num_ranks` ranks share a step, and `device` is the type of theirs. What concerns the model and the optimizer is read by
    verl.

    `max_steps` is 1 where the configuration names no `trainer.total_training_steps`: recorded data decide.

    Raises:
        [`PreflightError`]: a key has a value that cannot act here, or two keys contradict each other.
        `ValueError`: an option has a value that it cannot have.
    """
    _check_restrictions(config)
    data, trainer = config["data"], config["trainer"]
    named = dict(config.get("atropos") or {})
    seed = {key: config[key] for key in SEED_KEYS if config.get(key) is not None}
    _check_names(named, seed)
    section = {name: value for name, value in (data.get("atropos") or {}).items() if value is not None}
    batch_size = data["train_batch_size"]
    if batch_size % num_ranks:
        raise PreflightError(
            f"data.train_batch_size is {batch_size} and there are {num_ranks} ranks.",
            "Every rank trains as many rows of a step.",
            f"Set data.train_batch_size to a multiple of {num_ranks}.",
        )
    translated, _ = translate_seed_options(
        {**named, **seed, "data": {"atropos": section, "train_batch_size": batch_size}}
    )
    if "data_path" not in translated and trainer["total_training_steps"] is None:
        raise PreflightError(
            "trainer.total_training_steps is not set.",
            "A live API has no end, and verl plans the learning rate for all steps.",
            "Set trainer.total_training_steps, or data.atropos.data_path to train recorded rollouts.",
        )
    ref_logprobs = translated.setdefault("ref_logprobs", "recompute")
    if translated.get("beta") and ref_logprobs == "recompute":
        raise PreflightError(
            f"beta is {translated['beta']} and ref_logprobs is recompute.",
            "verl's SFT trainer has no second model that could be the reference.",
            "Let the environment send them and set +atropos.ref_logprobs=require, or leave beta at 0.",
        )
    if translated.setdefault("weight_sync_mode", "merged") not in ("full", "merged"):
        raise PreflightError(
            f"weight_sync_mode is {translated['weight_sync_mode']}.",
            "verl's engine gives whole weights, with LoRA merged.",
            "Leave +atropos.weight_sync_mode out.",
        )
    save_freq = trainer["save_freq"]
    return AtroposConfig(
        **translated,
        output_dir=trainer["default_local_dir"],
        max_steps=trainer["total_training_steps"] or 1,
        num_train_epochs=trainer["total_epochs"],
        max_length=data["max_length"],
        run_name=trainer["experiment_name"],
        seed=trainer["seed"],
        save_strategy="steps" if isinstance(save_freq, int) and save_freq > 0 else "no",
        save_steps=save_freq if isinstance(save_freq, int) and save_freq > 0 else 500,
        use_cpu=device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )


def check_lora(config: Mapping[str, Any]) -> None:
    """Refuse to publish a LoRA adapter that is not merged.

    Raises:
        [`PreflightError`]: names the option of verl that merges it.
    """
    model = config["model"]
    if model["lora_rank"] > 0 and not model["lora"].get("merge", False):
        raise PreflightError(
            f"model.lora_rank is {model['lora_rank']} and model.lora.merge is off.",
            "verl would give the adapter alone, and a publish takes whole weights.",
            "Set +model.lora.merge=true.",
        )


def _check_restrictions(config: Mapping[str, Any]) -> None:
    for key, restriction in RESTRICTIONS.items():
        value: Any = config
        for name in key.split("."):
            value = None if value is None else value.get(name)
        if value not in restriction.accepted:
            raise PreflightError(f"{key} is {value!r}.", restriction.why, restriction.instead)


def _check_names(named: Mapping[str, Any], seed: Mapping[str, Any]) -> None:
    """Refuse names in the section `atropos` that would do nothing, or that stand at the top of the file, too."""
    known = {field.name for part in (DataOptions, StepOptions, WeightSyncOptions) for field in fields(part)}
    places = {**SET_ELSEWHERE, **{name: f"{name}, at the top," for name in seed}}
    for name in named:
        if name == "vllm_api_key":
            raise PreflightError(
                "The section `atropos` has `vllm_api_key`.",
                "verl prints its configuration and gives it to trackers.",
                "Set VLLM_API_KEY in the environment instead.",
            )
        if name in places:
            raise PreflightError(
                f"The section `atropos` has `{name}`.",
                "Two places for one thing could contradict each other.",
                f"Set {places[name]} instead.",
            )
        if name in NOT_HERE:
            raise PreflightError(
                f"The section `atropos` has `{name}`.",
                f"It would do nothing: {NOT_HERE[name]}.",
                "Leave it out, or train with AtroposTrainer.",
            )
        if name not in known | {"temperature"}:
            raise PreflightError(
                f"The section `atropos` has `{name}`.",
                "It takes the options of data, loss and publishes; what concerns the model, the optimizer and the run is verl's.",
                f"{did_you_mean(name, known)} docs/verl.md says where the others are.",
            )
