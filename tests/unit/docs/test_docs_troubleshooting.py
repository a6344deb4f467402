"""docs/troubleshooting.md against the code: a row for every diagnosis, and no message or option that nobody has."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

import trl_atropos
from trl_atropos.checks.api import API_CHECKS
from trl_atropos.checks.gateway import GATEWAY_CHECKS
from trl_atropos.checks.machine import MACHINE_CHECKS
from trl_atropos.checks.server import SERVER_CHECKS
from trl_atropos.checks.tokenizers import ENVIRONMENT_CHECKS
from trl_atropos.checks.vllm import VLLM_CHECKS
from trl_atropos.cli.main import main
from trl_atropos.data.history import TRAINER_CHECKS
from trl_atropos.trainer.atropos_config import AtroposConfig


PACKAGE = Path(trl_atropos.__file__).parent
TEXT = (PACKAGE.parent / "docs" / "troubleshooting.md").read_text()
ROWS = [re.split(r" \| ", line.strip("| ")) for line in re.findall(r"^\|[^-].+\|$", TEXT, re.MULTILINE)]
PREFLIGHT_CHECKS = (*SERVER_CHECKS, *ENVIRONMENT_CHECKS, *MACHINE_CHECKS)
VALUE = "\0"
# Of programs that are not ours: environments (`--env.x`, `--openai.x`), run-api, vLLM, SGLang.
FOREIGN_OPTIONS = {
    *("env", "openai", "port", "model", "max_model_len", "middleware"),
    *("enable_scale_out", "weight_transfer_config", "enable_lora", "logprobs_mode", "chat_template"),
    *("skip_tokenizer_init", "model_name_or_path", "context_length"),
}


def messages() -> set[str]:
    """All strings of the package, with `VALUE` for what an f-string fills in."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


MESSAGES = messages()


def is_in_code(quoted: str) -> bool:
    pattern = re.compile(".*".join(re.escape(part) for part in quoted.split("...")), re.DOTALL)
    return any(pattern.search(message) for message in MESSAGES)


def quotes() -> list[str]:
    prose = re.sub(r"```.*?```|'\{.*?\}'", "", TEXT, flags=re.DOTALL)
    return re.findall(r'"([^"]+)"', prose)


@pytest.mark.parametrize(
    "checks",
    [API_CHECKS, TRAINER_CHECKS, VLLM_CHECKS, GATEWAY_CHECKS, PREFLIGHT_CHECKS],
    ids=["api", "trainer", "vllm", "gateway", "preflight"],
)
def test_each_kind_of_diagnosis_has_a_table_in_the_order_of_its_checks(checks):
    names = [name for row in ROWS for name in re.findall(r"^`(\w+)`$", row[0])]
    first = names.index(checks[0].name)

    assert names[first : first + len(checks)] == [check.name for check in checks]


def test_every_diagnosis_has_exactly_one_row_and_every_row_a_diagnosis():
    names = [name for row in ROWS for name in re.findall(r"^`(\w+)`$", row[0])]

    assert sorted(names) == sorted(
        check.name for check in [*API_CHECKS, *TRAINER_CHECKS, *VLLM_CHECKS, *GATEWAY_CHECKS, *PREFLIGHT_CHECKS]
    )


def test_every_row_is_as_wide_as_its_table():
    widths = {len(row) for row in ROWS}
    assert widths == {3, 4}
    assert all(len(row) == 4 for row in ROWS if re.fullmatch(r"`\w+`", row[0]))
    assert all(cell.strip() for row in ROWS for cell in row)


@pytest.mark.parametrize("quoted", quotes())
def test_every_quoted_message_is_one_of_the_code(quoted):
    assert is_in_code(quoted)


def test_a_message_that_nobody_has_would_be_found():
    assert not is_in_code("The flux capacitor of ... is empty")
    assert not is_in_code("rollouts are queued Up to ...")
    assert is_in_code("Up to ... rollouts are queued")
    assert len(quotes()) > 40


def test_every_option_is_one_of_the_trainer_the_doctor_or_another_program(capsys):
    for command in ("doctor", "preflight", "gateway"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    known = {field.name for field in fields(AtroposConfig)} | FOREIGN_OPTIONS
    known |= {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", capsys.readouterr().out)}

    named = {name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", TEXT)}

    assert named - known == set()
