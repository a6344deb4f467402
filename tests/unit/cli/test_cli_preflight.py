"""`trl-atropos preflight` and its checks: facts made by hand, real tokenizers, files and options; no server.

With real servers: tests/e2e/test_vllm_doctor.py.
"""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import byte_tokenizer, tiny_llama
from token_server import TokenServer

from trl_atropos.checks.finding import NOT_ASKED, Check, Unread, examine
from trl_atropos.checks.machine import MACHINE_CHECKS, MachineFacts, PackageVersion
from trl_atropos.checks.server import SERVER_CHECKS, ServerConfigFacts
from trl_atropos.checks.tokenizers import ENVIRONMENT_CHECKS, EnvironmentFacts, TokenizerFacts
from trl_atropos.cli.main import main
from trl_atropos.trainer.atropos_config import AtroposConfig
from trl_atropos.trainer.run_facts import (
    chat_ids,
    free_bytes,
    machine_facts,
    num_parameters,
    package_versions,
    read_tokenizer,
    tokenizer_facts,
)


ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = TokenizerFacts("here", vocabulary="a" * 64, special_ids=(1, 2), chat_template="c")
MODEL = {"model_type": "llama", "vocab_size": 32}

GOOD = ServerConfigFacts(
    url="http://server",
    backend="trl_atropos_shm",
    dtype="bfloat16",
    has_tokenizer=True,
    logprobs_mode="processed_logprobs",
    max_model_len=64,
    max_length=64,
    device="cpu",
    weight_sync_mode="auto",
    vllm_enable_sleep_mode=False,
    knows_policy_versions=True,
    has_lora=False,
    loads_adapters=False,
    served_name="m",
    model=MODEL,
    served_model=MODEL,
    tokenizer=TOKENIZER,
    served_tokenizer=TOKENIZER,
    chat_ids=(5, 6),
    served_chat_ids=(5, 6),
    num_parameters=1000,
    longrope_boundary=None,
    segment_bytes=2000,
    free_shared_memory_bytes=2000,
)
VERSIONS = (
    PackageVersion("trl", ">=1.16", "1.16.0", is_supported=True, is_required=True),
    PackageVersion("vllm", ">=0.32", None, is_supported=False, is_required=False),
)
MACHINE = MachineFacts(VERSIONS, "out", 100, 100, 100, (("api_port", 8000, None),), 0, {})


def found(facts: Any, checks: tuple[Check[Any], ...]) -> dict[str, str]:
    """Name -> level of what is not well."""
    return {finding.name: finding.level for finding in examine(facts, checks) if finding.level != "ok"}


def test_what_fits_has_an_ok_line_for_every_check() -> None:
    for facts, checks in (
        (GOOD, SERVER_CHECKS),
        (MACHINE, MACHINE_CHECKS),
        (EnvironmentFacts("e", TOKENIZER, TOKENIZER), ENVIRONMENT_CHECKS),
    ):
        findings = examine(facts, checks)
        assert [finding.name for finding in findings] == [check.name for check in checks]
        assert {finding.level for finding in findings} == {"ok"}
        assert all(finding.what.endswith(".") for finding in findings)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"backend": None}, {"weight_transfer_backend": "error"}),
        ({"backend": "nccl"}, {"weight_transport": "error"}),
        ({"backend": "nccl", "device": "cuda"}, {}),
        ({"backend": "ipc", "device": "cuda"}, {"weight_transport": "error"}),
        ({"has_tokenizer": False}, {"server_tokenizer": "error"}),
        ({"served_model": {**MODEL, "vocab_size": 33}}, {"model_config": "error"}),
        ({"served_tokenizer": replace(TOKENIZER, vocabulary="b" * 64)}, {"tokenizer": "error"}),
        ({"served_tokenizer": replace(TOKENIZER, special_ids=(1, 3))}, {"special_ids": "warning"}),
        ({"served_chat_ids": (5, 7)}, {"chat_template": "warning"}),
        ({"served_chat_ids": None}, {"chat_template": "warning"}),
        ({"served_chat_ids": None, "chat_ids": None}, {}),
        ({"logprobs_mode": "raw_logprobs"}, {"logprobs_mode": "warning"}),
        ({"knows_policy_versions": False}, {"policy_versions": "warning"}),
        ({"knows_policy_versions": False, "kind": "SGLang"}, {}),
        ({"max_model_len": 65}, {"max_model_len": "warning"}),
        ({"longrope_boundary": 64}, {}),
        ({"longrope_boundary": 63}, {}),
        # 65 tokens of the server are longer than the 64 of the trainer, in any case.
        (
            {"longrope_boundary": 64, "max_model_len": 65},
            {"longrope_frequencies": "error", "max_model_len": "warning"},
        ),
        ({"weight_sync_mode": "adapter"}, {"runtime_lora": "error"}),
        ({"vllm_enable_sleep_mode": True}, {}),
        ({"vllm_enable_sleep_mode": True, "backend": "nccl", "device": "cuda"}, {"sleep_mode_transport": "error"}),
        ({"vllm_enable_sleep_mode": True, "kind": "SGLang"}, {"sleep_mode_server": "error"}),
        ({"weight_sync_mode": "adapter", "has_lora": True}, {"runtime_lora": "error"}),
        ({"weight_sync_mode": "adapter", "has_lora": True, "loads_adapters": True}, {}),
        ({"free_shared_memory_bytes": 1999}, {"shared_memory": "error"}),
        ({"free_shared_memory_bytes": 0, "backend": "trl_atropos_gloo"}, {}),
    ],
    ids=str,
)
def test_each_trap_of_a_server_is_found_and_nothing_else(change: dict[str, Any], expected: dict[str, str]) -> None:
    assert found(replace(GOOD, **change), SERVER_CHECKS) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"versions": (replace(VERSIONS[0], is_supported=False),)}, {"versions": "error"}),
        ({"versions": (replace(VERSIONS[1], is_required=True),)}, {"versions": "error"}),
        ({"versions": (replace(VERSIONS[1], installed="0.1"),)}, {"optional_versions": "warning"}),
        ({"ports": (("api_port", 8000, "Address already in use"),)}, {"ports": "error"}),
        ({"num_gpus": 2}, {"gpu_separation": "warning"}),
        ({"num_gpus": 2, "gpu_split": {"vllm": "0", "trainer": "1"}}, {}),
        ({"free_disk_bytes": 99}, {"disk": "error", "checkpoint_disk": "warning"}),
        ({"checkpoint_bytes": 101}, {"checkpoint_disk": "warning"}),
    ],
    ids=str,
)
def test_each_trap_of_a_machine_is_found_and_nothing_else(change: dict[str, Any], expected: dict[str, str]) -> None:
    assert found(replace(MACHINE, **change), MACHINE_CHECKS) == expected


def test_tokenizer_of_an_environment_is_compared_with_the_trainers() -> None:
    other = EnvironmentFacts("e", replace(TOKENIZER, vocabulary="b" * 64), TOKENIZER)
    assert found(other, ENVIRONMENT_CHECKS) == {"environment_tokenizer": "error"}
    other = EnvironmentFacts("e", replace(TOKENIZER, chat_template=None), TOKENIZER)
    assert found(other, ENVIRONMENT_CHECKS) == {"environment_chat_template": "warning"}


@pytest.mark.parametrize(
    "checks", [SERVER_CHECKS, MACHINE_CHECKS, ENVIRONMENT_CHECKS], ids=["server", "machine", "env"]
)
def test_what_cannot_be_read_is_said_and_never_guessed(checks: tuple[Check[Any], ...]) -> None:
    facts = {id(SERVER_CHECKS): GOOD, id(MACHINE_CHECKS): MACHINE}.get(
        id(checks), EnvironmentFacts("e", TOKENIZER, TOKENIZER)
    )
    for check in checks:
        assert check.needs
        for name in check.needs:
            (finding,) = examine(replace(facts, **{name: Unread("The dog ate it.")}), [check])
            assert (finding.level, finding.what) == ("unknown", "Not checked: The dog ate it.")


# Facts


def test_tokenizers_with_the_same_content_are_equal_wherever_they_lie(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "a")
    changed = byte_tokenizer()
    changed.add_tokens(["<new>"])
    changed.chat_template = "{{ messages[0]['content'] }}"
    changed.save_pretrained(tmp_path / "b")
    ours, theirs = (tokenizer_facts(read_tokenizer(str(tmp_path / name))) for name in "ab")
    assert replace(tokenizer_facts(byte_tokenizer()), name=ours.name) == ours
    assert ours.vocabulary != theirs.vocabulary and ours.chat_template != theirs.chat_template


def test_conversation_is_rendered_by_the_template_or_not_at_all() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert chat_ids(tokenizer) is None
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert chat_ids(tokenizer) == tuple(
        tokenizer("What is the capital of Peru?", add_special_tokens=False)["input_ids"]
    )
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert isinstance(chat_ids(tokenizer), Unread)


def test_tokenizer_that_is_not_there_is_unread_with_its_name(tmp_path: Path) -> None:
    read = read_tokenizer(str(tmp_path / "absent"))
    assert isinstance(read, Unread) and str(tmp_path / "absent") in read.why


def test_versions_are_those_of_the_requirements_and_extras_count_where_they_are_needed() -> None:
    versions = package_versions()
    assert not isinstance(versions, Unread)
    by_name = {package.name: package for package in versions}
    assert by_name["trl"].is_required and by_name["trl"].is_supported and by_name["trl"].supported == ">=1.16"
    assert not by_name["atroposlib"].is_required
    needed = package_versions({"atropos"})
    assert not isinstance(needed, Unread)
    assert {package.name: package for package in needed}["atroposlib"].is_required
    assert "pytest" not in by_name


def options(tmp_path: Path, **values: Any) -> AtroposConfig:
    return AtroposConfig(output_dir=str(tmp_path / "not" / "there" / "yet"), use_cpu=True, **values)


def test_disk_is_that_of_the_nearest_directory_that_exists(tmp_path: Path) -> None:
    assert free_bytes(str(tmp_path / "not" / "there")) == pytest.approx(free_bytes(str(tmp_path)), rel=0.1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # 4 bytes per weight at the end, 4 + 8 per checkpoint with the optimizer.
        ({"save_strategy": "no"}, 400),
        ({"save_steps": 10, "max_steps": 25}, 400 + 3 * 1200),
        ({"save_steps": 10, "max_steps": 100, "save_total_limit": 2}, 400 + 3 * 1200),
        ({"save_steps": 10, "max_steps": 20, "save_only_model": True}, 400 + 2 * 400),
        ({"save_strategy": "no", "journal_max_bytes": 5000, "journal_segment_bytes": 1000}, 5400),
    ],
    ids=str,
)
def test_size_of_what_is_kept_follows_from_the_options(tmp_path: Path, values: dict[str, Any], expected: int) -> None:
    facts = machine_facts(options(tmp_path, **values), 100)
    assert (facts.model_bytes, facts.checkpoint_bytes) == (400, expected)


def test_port_that_somebody_listens_on_is_named_and_port_0_is_none(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        facts = machine_facts(None, NOT_ASKED, ports={"api_port": port, "vllm_port": 0})
    assert facts.ports == (("api_port", port, "Address already in use"),)


def test_frozen_weights_are_left_out_if_told() -> None:
    model = tiny_llama()
    everything = num_parameters(model)
    model.get_input_embeddings().weight.requires_grad_(False)
    assert num_parameters(model) == everything
    assert num_parameters(model, only_trained=True) == everything - model.get_input_embeddings().weight.numel()


# The command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def launch_file(tmp_path: Path, model: Path, **changes: Any) -> Path:
    content = {
        "model_name_or_path": str(model),
        "run_dir": str(tmp_path / "run"),
        "environments": {"capitals": {"command": "python env.py serve"}},
        "trainer_command": "python examples/scripts/atropos.py --use_cpu true --max_length 64",
        "vllm_args": {"max_model_len": 64},
        **changes,
    }
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def preflight(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    capsys.readouterr()
    code = main(["preflight", *arguments, "--json"])
    return code, {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_launch_file_is_checked_before_anything_is_started(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = preflight(capsys, "-c", str(launch_file(tmp_path, model)))
    levels = {name: finding["level"] for name, finding in found.items()}
    assert code == 0
    assert {name for name, level in levels.items() if level == "unknown"} == {"api"}
    assert {level for name, level in levels.items() if name != "api"} == {"ok"}
    assert not (tmp_path / "run").exists()


def test_the_template_that_the_server_will_be_told_is_compared_with_the_trainers(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(model)
    (tmp_path / "same.jinja").write_text(tokenizer.chat_template)
    (tmp_path / "other.jinja").write_text("user: {{ messages[0]['content'] }}")
    for name, level in {"same": "ok", "other": "warning", "absent": "unknown"}.items():
        told = {"max_model_len": 64, "chat-template": str(tmp_path / f"{name}.jinja")}
        _, found = preflight(capsys, "-c", str(launch_file(tmp_path, model, vllm_args=told)))
        assert found["chat_template"]["level"] == level
    assert "absent.jinja` is no file here." in found["chat_template"]["what"]


def test_every_trap_of_a_launch_file_is_found_at_once(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = byte_tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "other")
    path = launch_file(
        tmp_path,
        model,
        environments={"capitals": {"command": f"python env.py serve --env.tokenizer_name {tmp_path / 'other'}"}},
        trainer_args="--weight_sync_mode adapter",
        vllm_args={
            "max_model_len": 65,
            "weight-transfer-config": {"backend": "nccl"},
            "logprobs-mode": "raw_logprobs",
        },
    )
    code, found = preflight(capsys, "-c", str(path))
    assert code == 1
    assert {name: finding["level"] for name, finding in found.items() if finding["level"] in ("error", "warning")} == {
        "environment_tokenizer": "error",
        "weight_transport": "error",
        "runtime_lora": "error",
        "max_model_len": "warning",
        "logprobs_mode": "warning",
    }
    assert all(finding["fix"] for finding in found.values() if finding["level"] == "error")


def test_a_gateway_of_a_launch_file_is_checked_against_the_trainer_and_its_servers(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agents = {"agent": {"command": "python agent.py"}}
    names = ("gateway_token_routes", "gateway_temperature", "gateway_lengths")
    _, found = preflight(capsys, "-c", str(launch_file(tmp_path, model, agents=agents)))
    assert [found[name]["level"] for name in names] == ["ok", "ok", "ok"]

    different = {"temperature": 0.5, "max_rollout_tokens": "1K"}
    with TokenServer() as server:
        path = launch_file(tmp_path, model, agents=agents, gateway_args=different, vllm_url=server.url, vllm_args={})
        _, found = preflight(capsys, "-c", str(path))
    assert [found[name]["level"] for name in names] == ["unknown", "error", "warning"]

    path = launch_file(tmp_path, model, agents=agents, gateway_args={"grammer": "lift"})
    code, found = preflight(capsys, "-c", str(path))
    assert code == 1 and "--grammer" in found["gateway_options"]["what"]
    assert "gateway_options" not in preflight(capsys, "-c", str(launch_file(tmp_path, model)))[1]


def fake_python(tmp_path: Path, version: str | None) -> str:
    """An interpreter that has this version of SGLang."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\necho 'No package sglang' >&2; exit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("version", "level", "text"),
    [
        ("0.5.23", "ok", "has SGLang 0.5.23."),
        ("0.5.3", "error", "has SGLang 0.5.3."),
        (None, "error", "has no SGLang: No package sglang."),
        ("what", "unknown", "does not say which SGLang it has"),
    ],
)
def test_launch_of_sglang_is_checked_like_one_of_vllm(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    level: str,
    text: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    changes = {"server": "sglang", "sglang_python": fake_python(tmp_path, version)}
    path = launch_file(tmp_path, model, **changes, vllm_args={}, sglang_args={"context-length": 64})
    code, found = preflight(capsys, "-c", str(path))
    assert (code, found["sglang_version"]["level"]) == (int(level == "error"), level)
    assert text in found["sglang_version"]["what"]
    others = {name: finding["level"] for name, finding in found.items() if name != "sglang_version"}
    assert {name for name, other in others.items() if other != "ok"} == {"api"}
    # Which policy sampled a rollout comes with it, from the environment.
    assert "`trl-atropos env`" in found["policy_versions"]["what"]
    assert "sglang_gloo" in found["weight_transfer_backend"]["what"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device": "cuda"}, {"weight_transport": "error"}),
        ({"context-length": 65}, {"max_model_len": "warning"}),
        ({}, {"max_model_len": "unknown", "longrope_frequencies": "unknown"}),
        ({"skip-tokenizer-init": None}, {"server_tokenizer": "error"}),
    ],
    ids=str,
)
def test_traps_of_a_launch_of_sglang_are_found(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    expected: dict[str, str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    args = {"context-length": 64, **change} if change else {}
    changes = {"server": "sglang", "sglang_python": fake_python(tmp_path, "0.5.23"), "sglang_args": args}
    _, found = preflight(capsys, "-c", str(launch_file(tmp_path, model, **changes, vllm_args={})))
    seen = {name: finding["level"] for name, finding in found.items() if finding["level"] != "ok"}
    assert seen == {"api": "unknown", **expected}


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        ({"trainer_arg": "x"}, "launch_file", "unknown key `trainer_arg`"),
        ({"trainer_args": "--max_steps 0"}, "trainer_options", "max_steps is 0"),
        ({"trainer_args": "--learning_rate fast"}, "trainer_options", "learning_rate"),
        ({"vllm_gpus": "0", "trainer_gpus": "1"}, "gpu_separation", "can be seen here"),
    ],
    ids=["launch file", "options that contradict", "option of another type", "gpus"],
)
def test_bad_options_are_findings_and_do_not_end_the_preflight(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    name: str,
    text: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, found = preflight(capsys, "-c", str(launch_file(tmp_path, model, **change)))
    assert code == 1
    assert found[name]["level"] == "error" and text in found[name]["what"]
    assert "versions" in found


def test_option_that_only_another_script_may_know_is_a_warning(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = launch_file(tmp_path, model, trainer_args="--max_lenght 3")
    assert preflight(capsys, "-c", str(path))[1]["trainer_options"]["level"] == "warning"


def test_servers_that_are_away_are_errors_with_what_starts_them(capsys: pytest.CaptureFixture[str]) -> None:
    # Nobody listens on port 1.
    code, found = preflight(capsys, "--api_url", "http://127.0.0.1:1", "--vllm_url", "http://127.0.0.1:1")
    assert code == 1
    assert found["api_unreachable"]["level"] == found["vllm_unreachable"]["level"] == "error"


def test_table_names_every_check(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "-c", str(launch_file(tmp_path, model))]) == 0
    printed = capsys.readouterr().out
    assert all(check.name in printed for check in (*SERVER_CHECKS, *MACHINE_CHECKS, *ENVIRONMENT_CHECKS))
