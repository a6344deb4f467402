"""docs/upstream_environments.md: what came of every file of upstream that defines an environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes import CANNOT_RUN, NEEDS_MORE, RECIPES


COMMIT = "296a0bc5"
TITLE = f"""# Upstream's environments

What came of every file of [NousResearch/atropos](https://github.com/NousResearch/atropos) at commit `{COMMIT}` that defines an
environment, unmodified, with atroposlib 0.4.0 and transformers 5.19. Written by

    packaging/install_beside.sh .venv .venv-upstream requirements/upstream.txt
    export PYTHONPATH=$PWD:$PWD/tests
    .venv-upstream/bin/python tests/upstream/run.py CHECKOUT --probe
    .venv-upstream/bin/python tests/upstream/run.py CHECKOUT --table docs/upstream_environments.md

which runs each file on data of our own with the schema of its data set, beside `trl-atropos api` and an *oracle*: a server that
answers from the data set, wrong at a rate of one half, in tokens of SmolLM2-135M-Instruct with the logprobs that this model gives
them. So it says that a file registers, samples, scores and sends, and that a step can be trained on what came; not that a model
learns. The command is

<!-- not checked: a command for any file -->
```bash
trl-atropos env environments/FILE serve --env.rollout_server_url URL --env.tokenizer_name MODEL \\
    --openai.base_url URL/v1 --openai.model_name MODEL --env.total_steps 1000 --env.steps_per_eval 0 \\
    --env.ensure_scores_are_not_same false --env.max_batches_offpolicy 2 --env.max_num_workers 2 OPTIONS
```

with the options of the file's row. "Data" names what was replaced: a directory of the same name with our own rows, where
the command runs (see [environments.md](environments.md)). Packages are those of `requirements/upstream.txt`. `ORACLE` is the
URL of a judge.
"""


def _section(name: str, text: str, *columns: str) -> tuple[str, str, tuple[str, ...]]:
    return name, text, columns


SECTIONS = (
    _section(
        "Trained on",
        "A group came, and a step was trained on it: its gradient was not zero. Of the logprobs that came with it the largest "
        "difference from the trainer's own is given, in nats, at the temperature with which the file samples: give the trainer "
        "the same `--temperature`.",
        *("File", "Needs", "Options", "Shims that acted", "Rewards", "Logprobs"),
    ),
    _section(
        "Delivered",
        "A group came, and no step could be trained on it.",
        *("File", "Needs", "Options", "Shims that acted", "Why not"),
    ),
    _section(
        "Needs more",
        "Not tried with what it needs: a key, a service, a simulator, a model that sees, a sandbox. It was run without.",
        *("File", "Needs", "It said"),
    ),
    _section("Cannot run", "", "File", "Why", "It said"),
    _section(
        "Evaluates only",
        "Its `collect_trajectories` returns nothing: `trl-atropos env environments/FILE evaluate ...` is what it is for. Not run.",
        "File",
    ),
)
TRAINED, DELIVERED, NEEDS, CANNOT, EVALUATES = (name for name, _, _ in SECTIONS)
Page = dict[str, dict[str, tuple[str, ...]]]
"""Section -> file -> the other cells of its row."""


def make_page(files: Mapping[str, bool], results: Mapping[str, Mapping[str, Any]]) -> Page:
    """The rows, of results of `run.py`. `files` says of each whether it only evaluates.

    Raises:
        ValueError: a file has neither a recipe nor a reason, or was not run.
    """
    page: Page = {name: {} for name, _, _ in SECTIONS}
    for file, only_evaluates in sorted(files.items()):
        if only_evaluates:
            page[EVALUATES][file] = ()
            continue
        result = results.get(file)
        if result is None:
            raise ValueError(f"{file} was not run: its row would be a guess. Run it with --files, or with --probe.")
        said = _cell(" ".join(result.get("said", [])))
        if result["outcome"] == "nothing":
            reasons, section = (NEEDS_MORE, NEEDS) if file in NEEDS_MORE else (CANNOT_RUN, CANNOT)
            if file not in reasons:
                raise ValueError(f"No group came from {file}, and recipes.py does not say why. It said: {said}")
            page[section][file] = (_cell(reasons[file]), said)
            continue
        recipe = RECIPES[file]
        cells = (_cell(recipe.needs) or "nothing", f"`{' '.join(result['options'])}`", ", ".join(result["shims"]))
        step = result.get("step", {})
        if result["outcome"] == "delivered":
            page[DELIVERED][file] = (*cells, _cell(step.get("refused", "all rewards were equal")))
            continue
        difference = step.get("sampling/sampling_logp_difference/max")
        rewards = ", ".join(f"{reward:g}" for reward in result["rewards"])
        logprobs = "not sent" if difference is None else f"{difference:.0e} at {result['temperature']:g}"
        page[TRAINED][file] = (*cells, rewards, logprobs)
    return page


def render_page(page: Page) -> str:
    """The page as it stands in the file."""
    num_files = sum(map(len, page.values()))
    lines = [TITLE, f"Of {num_files} files {len(page[TRAINED])} were trained on.\n"]
    for name, text, columns in SECTIONS:
        lines.append(f"## {name}\n\n{len(page[name])} files. {text}".rstrip() + "\n")
        lines.append(_row(columns))
        lines.append(_row(["---"] * len(columns), gap=""))
        lines += [_row((f"`{file}`", *cells)) for file, cells in sorted(page[name].items())]
        lines.append("")
    return "\n".join(lines)


def read_page(path: Path) -> Page:
    """What stands in the file."""
    page: Page = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = page[line.removeprefix("## ")] = {}
        elif match := re.fullmatch(r"\| `(\S+\.py)` (?:\| (.*) )?\|", line):
            rows[match[1]] = tuple(match[2].split(" | ")) if match[2] else ()
    return page


def _row(cells: Sequence[str], gap: str = " ") -> str:
    return "|" + "|".join(f"{gap}{cell}{gap}" for cell in cells) + "|"


def _cell(text: str) -> str:
    """Text in one line without what would end a cell or begin a tag, and not longer than one reads. Of a file it has no
    directory of the machine that it came from.
    """
    text = re.sub(r"\S*/(?=environments/)", "", " ".join(text.split()))
    text = re.sub(r"(?<![\w:/.`])/(?:[^\s'\"()]*/site-packages/|(?:[\w.-]+/)+)", "", text)
    text = text.replace("|", "/").replace("<", "&lt;")
    return text if len(text) <= 240 else text[:237] + "..."
