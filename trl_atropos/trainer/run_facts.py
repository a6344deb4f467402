"""The facts of a preflight that do not come from a server: tokenizers, packages, disk, ports."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checks.finding import Unread
from ..checks.machine import MachineFacts, PackageVersion, port_obstacle
from ..checks.tokenizers import TokenizerFacts


if TYPE_CHECKING:
    from .atropos_config import AtroposConfig


DISTRIBUTION = "trl-atropos"
WEIGHT_BYTES = 4
"""Bytes of a saved weight: the trainer loads float32 unless told otherwise."""
OPTIMIZER_BYTES = 8
"""Bytes of AdamW's two moments of a weight."""
CONVERSATION = [{"role": "user", "content": "What is the capital of Peru?"}]
"""Server and trainer render it, so that their chat templates can be compared."""


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
    """Return the facts by which tokenizers are compared."""
    template = tokenizer.chat_template
    return TokenizerFacts(
        name=str(tokenizer.name_or_path),
        vocabulary=_hash(sorted(tokenizer.get_vocab().items())),
        special_ids=(tokenizer.bos_token_id, tokenizer.eos_token_id),
        chat_template=None if template is None else _hash(template),
    )


def read_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase | Unread:
    """Load a tokenizer from a directory, the cache or the Hub; `revision` is that of the repository."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, ImportError) as exc:
        reason = " ".join(str(exc).split())[:200].rstrip(".")
        return Unread(f"The tokenizer of {name} cannot be read here ({type(exc).__name__}: {reason}).")


def chat_ids(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> tuple[int, ...] | Unread | None:
    """Return the tokens of `CONVERSATION`, by `template` or else the tokenizer's own; None without a chat template."""
    if template is None and tokenizer.chat_template is None:
        return None
    from jinja2 import TemplateError

    try:
        # transformers 5 returns a dictionary otherwise.
        return tuple(
            tokenizer.apply_chat_template(
                CONVERSATION, chat_template=template, add_generation_prompt=True, return_dict=False
            )
        )
    except (TemplateError, ValueError) as exc:
        return Unread(f"The chat template of {tokenizer.name_or_path} cannot be rendered: {exc}.")


def package_versions(required_extras: Collection[str] = ()) -> tuple[PackageVersion, ...] | Unread:
    """Compare the installed packages with the versions that this one declares.

    `required_extras` are those extras of this package that the run needs on this machine, such as `"vllm"`.
    """
    try:
        declared = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return Unread(f"The package {DISTRIBUTION} is not installed, so its requirements are not known.")
    found: dict[str, PackageVersion] = {}
    for requirement in declared:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
        if extra and extra[1] in ("dev", "docs"):
            continue
        installed = _installed(requirement.name)
        found[requirement.name] = PackageVersion(
            requirement.name,
            str(requirement.specifier) or "any",
            installed,
            is_supported=installed is not None and requirement.specifier.contains(installed, prereleases=True),
            is_required=extra is None or extra[1] in required_extras,
        )
    return tuple(found.values())


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts(
    args: AtroposConfig | None,
    num_saved_parameters: int | Unread,
    *,
    required_extras: Collection[str] = (),
    ports: Mapping[str, int] | None = None,
    **gpus: Any,
) -> MachineFacts:
    """Look at this machine.

    `args` is None if the options of the trainer are not known. `num_saved_parameters` counts the weights in a
    checkpoint: all, or those of the adapter. `required_extras` are those of [`package_versions`]. `ports` maps options
    to the loopback ports that they ask for. `gpus` are `num_gpus` and `gpu_split` of [`~checks.machine.MachineFacts`].
    """
    told = tuple((option, port, port_obstacle(port)) for option, port in (ports or {}).items() if port)
    versions = package_versions(required_extras)
    if args is None or args.output_dir is None:
        return MachineFacts(versions, ports=told, **gpus)
    model_bytes: int | Unread = num_saved_parameters
    checkpoint_bytes: int | Unread = num_saved_parameters
    if not isinstance(num_saved_parameters, Unread):
        model_bytes = num_saved_parameters * WEIGHT_BYTES
        each = model_bytes + (0 if args.save_only_model else num_saved_parameters * OPTIMIZER_BYTES)
        checkpoint_bytes = model_bytes + each * _num_kept_checkpoints(args) + (args.journal_max_bytes or 0)
    return MachineFacts(
        versions,
        output_dir=args.output_dir,
        free_disk_bytes=free_bytes(args.output_dir),
        model_bytes=model_bytes,
        checkpoint_bytes=checkpoint_bytes,
        ports=told,
        **gpus,
    )


def _num_kept_checkpoints(args: AtroposConfig) -> int:
    if args.save_strategy == "no":
        return 0
    if args.save_total_limit is not None:
        # The next one is written before the oldest goes.
        return args.save_total_limit + 1
    steps = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps
    return math.ceil(args.max_steps / steps) if args.save_strategy == "steps" else 1


def free_bytes(path: str) -> int | Unread:
    """Return what the file system of a directory has left; the directory itself may not exist yet."""
    directory = Path(path).absolute()
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    try:
        status = os.statvfs(directory)
    except OSError as exc:
        return Unread(f"The file system of {path} cannot be looked at: {exc.strerror}.")
    return status.f_bavail * status.f_frsize


def num_parameters(model: nn.Module, only_trained: bool = False) -> int:
    """Count the weights of a model, those that DeepSpeed keeps elsewhere included; with `only_trained`, without frozen
    ones.
    """
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for parameter in model.parameters()
        if parameter.requires_grad or not only_trained
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()
