"""Every code block of README.md, CONTRIBUTING.md and docs/: what can be checked without servers is, by the parsers that users meet.

A block that is checked nowhere stands after a comment that says why: `<!-- not checked: REASON -->`. That the example of
docs/losses.md trains: test_docs_losses.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import entry_points, metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from trl import ModelConfig

import trl_atropos
from trl_atropos import AtroposConfig, AtroposParser
from trl_atropos.cli.launch.config import LaunchConfig
from trl_atropos.cli.main import make_parser


ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"(?:<!-- not checked: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
INLINE = re.compile(r"(?<!`)`((?:make|trl-atropos|python) [^`]+)`(?!`)")
MAKE_TARGETS = set(re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
TRAINING_SCRIPT = "examples/scripts/atropos.py"
PROGRAMS = {entry.name for entry in entry_points(group="console_scripts")}


class Block(NamedTuple):
    document: str
    line: int
    language: str
    code: str
    reason: str | None


def blocks(document: str, text: str) -> list[Block]:
    return [
        Block(document, text[: found.start("code")].count("\n"), found["language"], found["code"], found["reason"])
        for found in BLOCK.finditer(text)
    ]


def commands(code: str) -> Iterator[list[str]]:
    """The words of every command, without comments and leading variables."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            yield words


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """As the program does, but an argument that it refuses is an error with its message."""
    try:
        return parser.parse_args(words)
    except SystemExit as exc:
        raise AssertionError(f"{parser.prog} refuses {words}") from exc


def check_trainer_options(words: list[str]) -> None:
    # Values such as MODEL are the reader's, so only names are looked at.
    known = set(AtroposParser((AtroposConfig, ModelConfig))._option_string_actions) | {"--config"}
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known
    assert not unknown, f"{TRAINING_SCRIPT} has no {sorted(unknown)}"


def check_script(script: str, words: list[str]) -> None:
    # `my_...` stands for a file of the reader.
    assert script.startswith("my_") or (ROOT / script).is_file(), f"{script} does not exist"
    if script == TRAINING_SCRIPT:
        check_trainer_options(words)


def check_paths(words: list[str]) -> None:
    for word in words:
        if re.match(r"(examples|benchmarks|packaging)/", word):
            assert (ROOT / word).exists(), f"{word} does not exist"


def check_command(words: list[str]) -> None:
    program, *rest = words
    check_paths(rest)
    if program == "make":
        targets = {word for word in rest if "=" not in word}
        assert targets <= MAKE_TARGETS, f"the Makefile has no {sorted(targets - MAKE_TARGETS)}"
    elif program == "trl-atropos":
        before, _, _ = " ".join(map(shlex.quote, rest)).partition(" -- ")
        parse(make_parser(), shlex.split(before))
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    elif program == "python" and rest[0] == "-c":
        check_python(rest[1])
    elif program == "python":
        check_script(rest[0], rest[1:])
    elif words[:2] == ["accelerate", "launch"]:
        told = parse(launch_command_parser(), words[2:])
        check_script(told.training_script, told.training_script_args)
    elif words[:2] == ["trl", "vllm-serve"]:
        middleware, name = rest[rest.index("--middleware") + 1].rsplit(".", 1)
        assert hasattr(importlib.import_module(middleware), name), f"no {middleware}.{name}"
    elif words[:2] == ["pip", "install"]:
        extras = set(",".join(re.findall(r"\[([\w,]+)\]", " ".join(rest))).split(",")) - {""}
        assert extras <= set(metadata("trl-atropos").get_all("Provides-Extra") or [])
    else:
        assert program in PROGRAMS, f"cannot be checked: {shlex.join(words)}"


def check_inline_command(text: str) -> None:
    """A command inside of a sentence may leave out arguments, but names nothing that does not exist."""
    words = shlex.split(text)
    check_paths(words)
    if words[0] == "make":
        check_command(words)
    elif words[0] == "trl-atropos":
        (choices,) = (action.choices for action in make_parser()._actions if action.dest == "command")
        assert isinstance(choices, dict)
        assert words[1] in choices, f"trl-atropos has no {words[1]}"
        named = {word for word in words[2:] if word.startswith("--") and word != "--"}
        # What follows FILE.py belongs to FILE.py.
        if words[1] != "env":
            unknown = {name.partition("=")[0] for name in named} - set(choices[words[1]]._option_string_actions)
            assert not unknown, f"trl-atropos {words[1]} has no {sorted(unknown)}"
    elif words[1].endswith(".py") and "/" in words[1]:
        check_script(words[1], words[2:])


def check_python(code: str) -> None:
    """It compiles, what it imports from the package exists, and so does every argument of what it calls there."""
    names: dict[str, Any] = {"trainer": trl_atropos.AtroposTrainer, "client": trl_atropos.AtroposVLLMClient}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in names:
                called = names[node.func.id]
                arguments = [object() for _ in node.args]
            elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                if node.func.value.id not in ("trainer", "client"):
                    continue
                called = getattr(names[node.func.value.id], node.func.attr)
                arguments = [object() for _ in range(len(node.args) + 1)]
            else:
                continue
            inspect.signature(called).bind(*arguments, **{word.arg: None for word in node.keywords if word.arg})


def check_yaml(block: Block) -> None:
    documents = [document for document in yaml.safe_load_all(block.code) if document is not None]
    assert documents
    if block.document == "launch.md":
        unknown = set(documents[0]) - {field.name for field in fields(LaunchConfig)}
        assert not unknown, f"a launch file has no {sorted(unknown)}"


def check(block: Block) -> None:
    if block.reason is not None or block.language == "math":
        return
    if block.language == "python":
        check_python(block.code)
    elif block.language == "json":
        for line in block.code.splitlines():
            json.loads(line)
    elif block.language == "yaml":
        check_yaml(block)
    else:
        for words in commands(block.code):
            check_command(words)


BLOCKS = [block for path in DOCUMENTS for block in blocks(path.name, path.read_text())]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.document}:{block.line}")
def test_every_block_is_right(block):
    check(block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_inside_of_a_sentence_exists(document):
    for text in INLINE.findall(BLOCK.sub("", document.read_text())):
        check_inline_command(text)


def test_no_fence_is_overlooked():
    for path in DOCUMENTS:
        # Two fences make a block.
        assert len(re.findall(r"^\s*```", path.read_text(), re.M)) == 2 * len(blocks(path.name, path.read_text())), (
            path
        )
    assert {"bash", "python", "json", "yaml"} <= {block.language for block in BLOCKS}


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("bash", "make bread"),
        ("bash", "trl-atropos lunch -c examples/configs/quickstart_launch.yaml"),
        ("bash", "trl-atropos launch -c examples/configs/no_such_file.yaml"),
        ("bash", "trl-atropos doctor --api-url http://localhost:8000 --vlm-url http://localhost:8001"),
        ("bash", "python examples/scripts/atropos.py --config examples/configs/quickstart.yaml --lerning_rate 1"),
        ("bash", "OMP_NUM_THREADS=1 accelerate launch examples/scripts/atropos.py --output_dirr out"),
        ("bash", "accelerate launch --num_proceses 3 examples/scripts/atropos.py"),
        ("bash", "trl vllm-serve --model M --middleware trl_atropos.serving.generate_endpoint.NoEndpoint"),
        ("bash", "pip install 'trl-atropos[no_extra]'"),
        ("", "Some output of a program"),
        ("python", "from trl_atropos import NoTrainer"),
        ("python", "from trl_atropos import AtroposConfig\nAtroposConfig(lerning_rate=1)"),
        ("python", "trainer.train_a_lot()"),
        ("python", "if:"),
        ("json", "{'a': 1}"),
        ("yaml", "a: [1"),
        ("yaml", "enviroments: {}"),
    ],
)
def test_a_wrong_block_is_found(language, code):
    (block,) = blocks("launch.md", f"Text\n\n```{language}\n{code}\n```\n")
    with pytest.raises(
        (AssertionError, AttributeError, ImportError, SyntaxError, TypeError, ValueError, yaml.YAMLError)
    ):
        check(block)
    # The same after a comment is left alone.
    (block,) = blocks("launch.md", f"Text\n\n<!-- not checked: an example -->\n```{language}\n{code}\n```\n")
    assert block.reason == "an example"
    check(block)


@pytest.mark.parametrize(
    "text", ["make bread", "trl-atropos lunch", "trl-atropos report --pngs plots", "python benchmarks/no_such_file.py"]
)
def test_a_wrong_command_inside_of_a_sentence_is_found(text):
    (found,) = INLINE.findall(f"Then `{text}` does it.")
    with pytest.raises(AssertionError):
        check_inline_command(found)
