"""Write docs/config.md from the fields of `AtroposConfig` and from the table of seed keys.

Usage: python packaging/config_doc.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from trl_atropos.data.options import DataOptions
from trl_atropos.loss.options import LossOptions, StepOptions
from trl_atropos.policy.options import PolicyOptions
from trl_atropos.report.options import ReportOptions
from trl_atropos.trainer.atropos_config import AtroposConfig
from trl_atropos.trainer.seed_options import SEED_OPTIONS
from trl_atropos.trainer.training_arguments import ACCELERATOR_CONFIG, HARMLESS, RESTRICTED, SUPPORTED
from trl_atropos.weight_sync.options import WeightSyncOptions


TARGET = Path(__file__).resolve().parent.parent / "docs" / "config.md"
HEADER = """\
# Options

Every option of `AtroposConfig` that is not one of transformers' `TrainingArguments`, or differs from it. Made from the fields by
`python packaging/config_doc.py`; do not edit. Each is a flag of `examples/scripts/atropos.py` (`--max_steps 500`), a key of the
file that `--config` names (`max_steps: 500`), and an argument of `AtroposConfig(max_steps=500)`. The command line wins over the
file. A name that is no option is refused with the nearest one. The model's options (`model_name_or_path`, `dtype`,
`attn_implementation`, `use_peft`, `lora_r`, ...) are those of TRL's `ModelConfig`.

A block `env:` in the file sets environment variables.
"""
TRAINING_ARGUMENTS = """\
## Options of TrainingArguments

Every option of transformers' `TrainingArguments` acts as it says there, accepts only what describes this trainer, or is refused by
name with the reason. So is an option of a newer transformers that nobody has looked at. These act:

"""
SEED = """\
## Files of AtroposSFTTrainer

`--config` takes the file of the VERL integration as it is (`examples/configs/atropos_sft_trainer.yaml`). At start it is printed
what each key became. A key without a counterpart is refused. `advantage_normalization` and `advantage_clipping` have kept their
names.

| Key | Becomes | |
|---|---|---|
"""


ABOVE_0 = {"PositiveFloat": "float > 0", "PositiveInt": "int > 0"}


def render() -> str:
    """The page: a section for each class, then the seed's keys."""
    sections = {
        "Data": own_fields(DataOptions),
        "Inference servers and publishing": own_fields(WeightSyncOptions),
        "Watching and sharing": own_fields(ReportOptions),
        "Model and forward pass": own_fields(PolicyOptions),
        "Loss": [*own_fields(LossOptions), *own_fields(StepOptions)],
        "Other defaults than in TrainingArguments": own_fields(AtroposConfig),
    }
    own = {field.name for fields in sections.values() for field in fields}
    parts = [HEADER]
    for title, fields in sections.items():
        rows = [row(field) for field in fields]
        parts.append("\n".join([f"## {title}", "", "| Option | Type | Default | |", "|---|---|---|---|", *rows, ""]))
    keys = [
        f"| `{key}` | {', '.join(f'`{name}`' for name in option.options) or '-'} | {option.meaning} |"
        for key, option in SEED_OPTIONS.items()
    ]
    return "\n".join([*parts, *training_arguments(own), SEED + "\n".join(keys), ""])


def training_arguments(own: set[str]) -> list[str]:
    """What of `TrainingArguments` acts, and what does not; `own` are the options that are described already."""
    names = ", ".join(f"`{name}`" for name in sorted(SUPPORTED - own))
    rows = [
        f"| `{name}` | {' or '.join(f'`{value}`' for value in restriction.accepted)} | {restriction.why} |"
        for name, restriction in {**RESTRICTED, "accelerator_config": ACCELERATOR_CONFIG}.items()
        if name not in own
    ]
    harmless = [f"| `{name}` | any | {why} |" for name, why in HARMLESS.items()]
    return [
        TRAINING_ARGUMENTS + names + ".",
        "",
        "| Option | Accepted | Why |",
        "|---|---|---|",
        *harmless,
        *rows,
        "",
    ]


def own_fields(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields that a class itself declares."""
    return [field for field in dataclasses.fields(cls) if field.name in cls.__annotations__]


def row(field: dataclasses.Field[Any]) -> str:
    """One line of a table."""
    # Not `field.type`, which transformers' parser replaces.
    annotation = next(
        cls.__annotations__[field.name] for cls in AtroposConfig.__mro__ if field.name in cls.__annotations__
    )
    kind = ABOVE_0.get(annotation, annotation).replace("|", "\\|")
    text = field.metadata["help"].replace("|", "\\|")
    return f"| `{field.name}` | `{kind}` | `{field.default}` | {text} |"


if __name__ == "__main__":
    TARGET.write_text(render())
