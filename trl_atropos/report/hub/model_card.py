"""The model card of a run: TRL's, with what it was trained on, what came of it, and how to do it again."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from trl.trainer.utils import generate_model_card

from ...data.options import DataOptions
from ...errors import PreflightError
from ...loss.loss_types import papers_of
from ...loss.options import StepOptions
from ..plots import PLOTS, save_png, series_of
from ..run_files import LogEntry, RunFiles, read_run_files
from .citations import ATROPOS
from .merged import MERGED_DIR
from .run_model import model_files
from .training_config import TRAINING_CONFIG_FILE


CARD_FILE = "README.md"
REWARD_PLOT = "reward.png"
WINDOW = 4
"""Optimizer steps over which rewards before and after are means, at most half of the run."""

NEXT_SECTION = "### Framework versions"
"""The section of TRL's template before which ours stand."""

NO_BASE_MODEL = "[None](https://huggingface.co/None)"
"""What TRL's template says of a base model that is not on the Hub."""

LOSS_OPTIONS = (
    "loss_type",
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "delta",
    "beta",
    "scale_rewards",
    "advantage_baseline",
    "advantage_normalization",
    "advantage_clipping",
    "vllm_importance_sampling_correction",
    "off_policy_mask_threshold",
    "entropy_coef",
    "distillation_coef",
    "max_staleness",
)


def write_model_card(
    output_dir: Path,
    config: Mapping[str, Any],
    *,
    hub_model_id: str | None = None,
    history: Sequence[LogEntry] | None = None,
    tags: Iterable[str] = (),
    merged_from: str | None = None,
    directory: Path | None = None,
) -> ModelCard:
    """Write `README.md` and the plot of the reward that it shows, and return the card as written.

    `output_dir` is the directory of the trainer, and `directory`, which defaults to it, the place of the card.
    `config` is what [`~report.hub.training_config.training_config`] made. `hub_model_id` is the repository that the
    card is for, and `merged_from` that of the adapter that was merged into this model. `history` is the log history of
    a trainer in memory; if it is not given, that of `trainer_state.json` is read.
    """
    directory = directory or output_dir
    try:
        run = read_run_files(output_dir, history)
    except PreflightError:
        # Before the first logged step there is nothing to tell yet.
        run = None
    name = config.get("model_name_or_path")
    base_model = str(name) if name and not Path(str(name)).exists() else None
    card: ModelCard = generate_model_card(
        base_model=base_model,
        model_name=(hub_model_id or output_dir.resolve().name).rpartition("/")[2],
        hub_model_id=hub_model_id or str(output_dir),
        dataset_name=None,
        tags=sorted({"atropos", "trl", *tags}),
        wandb_url=None,
        trackio_url=None,
        trainer_name="[Atropos](https://github.com/NousResearch/atropos) environments",
        trainer_citation=ATROPOS,
    )
    local = f"`{Path(str(name)).name}`, a model that is not on the Hub" if name else "a model that is not on the Hub"
    text = card.text.replace(NO_BASE_MODEL, local).replace(
        "Cite [Atropos](https://github.com/NousResearch/atropos) environments", "Cite Atropos"
    )
    if merged_from:
        text = text.replace(
            "## Quick start",
            f"The adapter [{merged_from}](https://huggingface.co/{merged_from}) is merged into it.\n\n## Quick start",
            1,
        )
    sections = [*_results(run, directory), *_loss(config), *_reproduce(run, config)]
    before, heading, after = text.partition(NEXT_SECTION)
    card.text = (
        before.rstrip() + "\n\n" + "\n\n".join(sections) + "\n\n" + heading + _with_parts(after, run) + _papers(config)
    )
    card.save(directory / CARD_FILE)
    return card


def described(directory: Path) -> dict[str, Path]:
    """The files of a directory that tell of the model (card, plot, configuration), by their names in the repository."""
    paths = (directory / name for name in (CARD_FILE, REWARD_PLOT, TRAINING_CONFIG_FILE))
    return {path.name: path for path in paths if path.exists()}


def files_to_upload(directory: Path, output_dir: Path) -> dict[str, Path]:
    """The model in a directory with what tells of its run, by name in the repository.

    `directory` is where the model lies: `output_dir`, which is the trainer's, or one of its checkpoints.
    """
    return {**model_files(directory), **described(output_dir)}


def describe_merged(
    output_dir: Path,
    config: Mapping[str, Any],
    hub_model_id: str,
    adapter_id: str,
    history: Sequence[LogEntry] | None = None,
) -> dict[str, Path]:
    """Write the card of the merged model of a run, and return the files that tell of it, by name.

    `output_dir`, `config` and `history` are as for `write_model_card`. `hub_model_id` is the repository of the merged
    model, and `adapter_id` that of the adapter.
    """
    merged = output_dir / MERGED_DIR
    merged.mkdir(parents=True, exist_ok=True)
    write_model_card(
        output_dir, config, hub_model_id=hub_model_id, history=history, merged_from=adapter_id, directory=merged
    )
    return {**described(output_dir), **described(merged)}


def _results(run: RunFiles | None, directory: Path) -> list[str]:
    if run is None:
        return []
    rewards = [value for _, value in run.values("reward")]
    steps = int(run.history[-1].get("step", len(run.history)))
    found = ["### Results", f"{steps} optimizer steps{_counted(run)}."]
    if rewards:
        plot = next(plot for plot in PLOTS if plot.name == "reward")
        save_png(plot, series_of(run, plot), directory / REWARD_PLOT)
        first, last = _first_and_last(rewards)
        found += [
            f"Mean reward of the first {_window(rewards)} logged steps: {first:.3f}; of the last {_window(rewards)}: **{last:.3f}**.",
            f"![Reward over the optimizer steps]({REWARD_PLOT})",
        ]
    rows = [_environment_row(run, name) for name in run.environments()]
    if rows:
        found += [
            "### Environments",
            "\n".join(
                [
                    "| Environment | Share of the rollouts | Reward, first steps | Reward, last steps |",
                    "|---|---|---|---|",
                    *rows,
                ]
            ),
        ]
    return found


def _counted(run: RunFiles) -> str:
    sentences = (
        ("num_rollouts_trained", "{:.0f} rollouts trained"),
        ("num_rollouts_dropped", "{:.0f} dropped"),
        ("policy_version", "policy version {:.0f}"),
    )
    values = [(run.values(key), sentence) for key, sentence in sentences]
    return "".join(f", {sentence.format(of_run[-1][1])}" for of_run, sentence in values if of_run)


def _environment_row(run: RunFiles, name: str) -> str:
    shares = [value for _, value in run.values(f"env/{name}/batch_frac")]
    rewards = [value for _, value in run.values(f"env/{name}/reward")]
    share = f"{statistics.fmean(shares):.0%}" if shares else "?"
    first, last = (f"{value:.3f}" for value in _first_and_last(rewards)) if rewards else ("?", "?")
    return f"| {_escaped(name)} | {share} | {first} | {last} |"


def _first_and_last(values: Sequence[float]) -> tuple[float, float]:
    window = _window(values)
    return statistics.fmean(values[:window]), statistics.fmean(values[-window:])


def _window(values: Sequence[float]) -> int:
    return min(WINDOW, max(1, len(values) // 2))


def _loss(config: Mapping[str, Any]) -> list[str]:
    options = options_of(config)
    named = [f"`{name}` {options[name]}" for name in LOSS_OPTIONS if options[name] not in (None, False)]
    return ["### Loss", "; ".join(named) + "."]


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of loss and data: what a configuration says, and defaults for the rest."""
    options = (*fields(DataOptions), *fields(StepOptions))
    return {field.name: config.get(field.name, field.default) for field in options}


def _reproduce(run: RunFiles | None, config: Mapping[str, Any]) -> list[str]:
    facts = {} if run is None else run.facts.get("run", {})
    found = []
    if config:
        found += [
            f"[`{TRAINING_CONFIG_FILE}`]({TRAINING_CONFIG_FILE}) holds every option that differs from its default, for the "
            "training script's `--config`."
        ]
    if facts:
        # A command can hold backticks itself.
        fence = "```" + "`" * max((len(ticks) for ticks in re.findall(r"`+", facts["command"])), default=0)
        found += [
            f"Number of processes: {facts['num_processes']}; device: {_escaped(facts['device'])}. It was started as",
            f"{fence}bash\n{facts['command']}\n{fence}",
        ]
    return ["### Reproduce", *found] if found else []


def _with_parts(section: str, run: RunFiles | None) -> str:
    """TRL's list of versions, with the parts that it does not know."""
    versions = {} if run is None else run.facts.get("versions", {})
    own = "".join(
        f"- {name}: {versions[name]}\n"
        for name in ("trl-atropos", "atroposlib", "vllm", "accelerate", "peft")
        if name in versions
    )
    head, heading, rest = section.partition("## Citations")
    return f"{head.rstrip()}\n{own}\n{heading}{rest}"


def _papers(config: Mapping[str, Any]) -> str:
    papers = papers_of(options_of(config))
    if not papers:
        return ""
    entries = "\n\n".join(paper.bibtex() for paper in papers)
    return f"\n\nCite the papers of the loss as:\n\n```bibtex\n{entries}\n```\n"


def _escaped(text: str) -> str:
    """What an environment calls itself, as text and nothing else."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~!])", r"\\\1", " ".join(text.split()))
