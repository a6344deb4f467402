"""Open the first task of every name of the ecosystems that are installed here, or sample one group of each from a server.

Usage: python benchmarks/environments.py [ECOSYSTEM | ECOSYSTEM:NAME]... [--base_url URL --model MODEL] [--groups FILE] [--table FILE]

One JSON line for each ecosystem: how many of the names open, or deliver a group with --base_url, and what the others said.
--groups appends the groups, as `--data_path` of the trainer reads them. --table writes what came of each name, and how long it took,
into the section of the ecosystem in docs/environment_names.md, after each name; with --limit_s and --missing it can be done in
several runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_atropos.envs.ecosystems import ECOSYSTEMS, OPEN_FAULTS, find_ecosystem, open_source
from trl_atropos.envs.source import EnvironmentSource
from trl_atropos.errors import EpisodeError, PreflightError


DELIVERED = "yes"
OPENED = "not asked; it opens"
GROUP_SIZE = 2
MAX_TURNS = 2
MAX_TURN_TOKENS = 8
MAX_TOKENS = 8000
TIMEOUT_S = 60.0
"""For one group."""

DISTRIBUTIONS = {"gem": "gem-llm"}
TITLE = """# Names of environments

What came of each name when one group was asked of it, with a model of 135M parameters, {group_size} rollouts of at most {max_turns}
answers, on a machine without network, keys and data of NLTK:

    python benchmarks/environments.py --base_url URL --model MODEL --table docs/environment_names.md

once for each ecosystem, with the interpreter that has it, one name after the other. The seconds are those from the name to the
group. Of a name that was not asked the first task was opened. Tasksets of verifiers are packages that you install; those that it
ships need options, data or a container, and the others stand in tests/verifiers_tasks. [Environments](environments.md) says how
they are run.
"""


@dataclass(frozen=True)
class Answer:
    """What came of a name.

    Args:
        what (`str`):
            `DELIVERED`, `OPENED`, or why nothing came.
        seconds (`float`):
            From the name to the answer.
    """

    what: str
    seconds: float


class Sampler:
    """Samples groups of one name after the other with one environment, whose tokenizers take longer to load than a group."""

    def __init__(self, base_url: str, model: str, groups: Path | None):
        from atroposlib.envs.base import APIServerConfig

        from trl_atropos.envs.environment import SourceEnvConfig

        self.loop = asyncio.new_event_loop()
        self.config = SourceEnvConfig(
            tokenizer_name=model,
            use_wandb=False,
            group_size=GROUP_SIZE,
            max_turns=MAX_TURNS,
            max_turn_tokens=MAX_TURN_TOKENS,
            max_token_length=MAX_TOKENS,
        )
        # The first request would wait for a second for the first check.
        self.server = APIServerConfig(
            server_type="vllm", base_url=base_url, model_name=model, api_key="none", health_check=False
        )
        self.groups = groups
        self.env = None

    async def _sample(self, name: str, source: EnvironmentSource) -> dict[str, Any]:
        from trl_atropos.envs.environment import make_environment

        if self.env is None:
            self.env = make_environment(name, source)(self.config, [self.server])
        self.env.name, self.env.source = name, source
        await self.env.setup()
        group, _ = await asyncio.wait_for(self.env.collect_trajectories(await self.env.get_next_item()), TIMEOUT_S)
        return dict(group)

    def deliver(self, name: str) -> str:
        """Sample a group of a name; return what came of it."""
        try:
            group = self.loop.run_until_complete(self._sample(name, open_source(name, {})))
        except PreflightError as exc:
            return exc.why
        except EpisodeError as exc:
            return exc.what
        except asyncio.TimeoutError:
            return f"No group within {TIMEOUT_S:.0f} s."
        except OPEN_FAULTS as exc:
            return f"It failed: {type(exc).__name__}: {' '.join(str(exc).split())[:100]}"
        lengths = [len(tokens) for tokens in group["tokens"]]
        if len(lengths) != GROUP_SIZE or not all(any(mask != -100 for mask in masks) for masks in group["masks"]):
            return f"{len(lengths)} rollouts, or one without a sampled token."
        if self.groups is not None:
            with self.groups.open("a", encoding="utf-8") as file:
                file.write(json.dumps(group) + "\n")
        return DELIVERED


def open_once(name: str) -> str:
    """Open the first task of a name; return what came of it."""
    try:
        open_source(name, {})
    except PreflightError as exc:
        return exc.why
    return OPENED


def write_table(path: Path, ecosystem: str, came: dict[str, Answer]) -> None:
    """Replace the section of an ecosystem, in the order of `ECOSYSTEMS`."""
    sections = read_tables(path)
    sections[ecosystem] = came
    everything = [answer for rows in sections.values() for answer in rows.values()]
    lines = [TITLE.format(group_size=GROUP_SIZE, max_turns=MAX_TURNS)]
    lines.append(f"{summary(everything)} with one server on {os.cpu_count()} cores.\n")
    for name in ECOSYSTEMS:
        if name in sections:
            rows = sections[name]
            lines.append(f"## {name}\n\n{summary(rows.values())}.\n")
            lines.append("| Name | A group came | Seconds |\n|---|---|---|")
            lines += [f"| `{task}` | {row.what} | {row.seconds:.1f} |" for task, row in sorted(rows.items())]
            lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def summary(answers: Iterable[Answer]) -> str:
    """How many delivered, and how long all took together."""
    answers = list(answers)
    num_delivered = sum(answer.what == DELIVERED for answer in answers)
    minutes = sum(answer.seconds for answer in answers) / 60
    return f"{num_delivered} of {len(answers)} delivered a group, in {minutes:.1f} minutes"


def read_tables(path: Path) -> dict[str, dict[str, Answer]]:
    """What stands in the file: ecosystem -> name -> what came of it."""
    if not path.is_file():
        return {}
    tables: dict[str, dict[str, Answer]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = tables[line.removeprefix("## ")] = {}
        elif match := re.fullmatch(r"\| `(.+?)` \| (.*) \| ([\d.]+) \|", line):
            rows[match[1]] = Answer(match[2], float(match[3]))
    return tables


def measure(ecosystem: str, names: Sequence[str], args: argparse.Namespace) -> dict[str, object]:
    """Ask every name of an ecosystem once."""
    start = time.perf_counter()
    came = read_tables(args.table).get(ecosystem, {}) if args.table else {}
    found = find_ecosystem(ecosystem)
    known = set(found.task_names())
    came = {
        name: row for name, row in came.items() if (task := name.partition(":")[2]) in known or found.is_name(task)
    }
    ask, succeeded = open_once, OPENED
    if args.base_url:
        ask, succeeded = Sampler(args.base_url, args.model, args.groups).deliver, DELIVERED
    for name in names:
        if args.missing and name in came and not (args.base_url and came[name].what == OPENED):
            continue
        if args.limit_s is not None and time.perf_counter() - start > args.limit_s:
            break
        name_start = time.perf_counter()
        # Some games print while they are made.
        with contextlib.redirect_stdout(sys.stderr):
            what = ask(name)
        came[name] = Answer(what, time.perf_counter() - name_start)
        if args.table:
            write_table(args.table, ecosystem, came)
    try:
        version = importlib.metadata.version(DISTRIBUTIONS.get(ecosystem, ecosystem))
    except importlib.metadata.PackageNotFoundError:
        version = None  # a protocol, not a package
    return {
        "ecosystem": ecosystem,
        "version": version,
        "num_names": len(names),
        "num_asked": len(came),
        "num_delivered" if args.base_url else "num_open": sum(answer.what == succeeded for answer in came.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "refused": {name: answer.what for name, answer in came.items() if answer.what != succeeded},
    }


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="ecosystems or names; default: all that is installed")
    parser.add_argument("--base_url", help="of a server with GenerateEndpoint, such as http://127.0.0.1:8001/v1")
    parser.add_argument("--model", help="that it serves, also the tokenizer")
    parser.add_argument("--groups", type=Path, help="file that the groups are appended to")
    parser.add_argument("--table", type=Path, help="file whose section of the ecosystem is written")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="ask only for names that the table lacks, or says of that they were not asked",
    )
    parser.add_argument("--limit_s", type=float, help="ask no further name of an ecosystem after so many seconds")
    args = parser.parse_args()
    if args.base_url and not args.model:
        parser.error("--base_url needs --model")
    asked: dict[str, list[str]] = {}
    for name in args.names or [row.name for row in ECOSYSTEMS.values() if row.is_installed]:
        ecosystem, _, task = name.partition(":")
        names = [name] if task else [f"{ecosystem}:{each}" for each in find_ecosystem(ecosystem).task_names()]
        asked.setdefault(ecosystem, []).extend(names)
    for ecosystem, names in asked.items():
        print(json.dumps(measure(ecosystem, names, args)), flush=True)


if __name__ == "__main__":
    main()
