"""`benchmarks/gpu.py` on a CPU: its first run on a card is not its first run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def section(name: str, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    bench = importlib.import_module("gpu_sections.bench").Bench(name, torch.device("cpu"), is_tiny=True)
    importlib.import_module(f"gpu_sections.{name}").run(bench)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert lines
    assert [line for line in lines if "error" in line] == []
    return lines


def test_every_way_to_attend_gives_the_gradient_of_rollouts_alone(capsys):
    compared = [line for line in section("exactness", capsys) if "variant" in line]
    exact = [line for line in compared if line["precision"] == "float32"]
    assert {line["variant"] for line in exact} == {"alone", "tree, sdpa", "packed, sdpa", "padded, sdpa"}
    assert all(line["grad_rel_diff"] < 1e-5 for line in exact)
    assert all(line["grad_rel_diff"] < 0.05 for line in compared)


def test_runs_agree_on_their_first_loss(capsys):
    runs = {line["run"]: line for line in section("training", capsys)}
    assert len(runs) == 5
    for name, run in runs.items():
        assert run["loss"][0] == pytest.approx(runs["float32"]["loss"][0], abs=1e-4), name
    assert runs["resumes"]["loss"] == pytest.approx(runs["float32"]["loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["train_step", "train_step_trl", "profile", "head", "staging"])
def test_a_section_measures_what_it_says(name, capsys):
    lines = section(name, capsys)
    assert all(line["s"] > 0 for line in lines if "s" in line)


def test_servers_are_published_to(capsys):
    lines = section("server", capsys)
    assert [line["server"] for line in lines if "tokens_s" in line] == ["shm", "gloo"]
    published = {(line["server"], line["publishes"]): line for line in lines if "publishes" in line}
    assert published.keys() == {
        (server, what) for server in ("shm", "gloo") for what in ("full", "lora", "in background")
    }
    assert all(line["mean_abs_logprob_diff"] < 0.05 for line in published.values())
    # The policy is loaded before the pause.
    phases = [line["phase_s"].keys() for line in published.values() if "phase_s" in line]
    assert len(phases) == 4
    assert all(names & {"build", "transfer"} == {"build"} for names in phases)
    assert [line["num_proven"] for line in published.values() if "num_proven" in line] == [5, 5]


def test_what_is_served_is_what_was_published(capsys):
    (line,) = section("served", capsys)
    assert line["same_weights"] == line["back"] == line["meanwhile"] == line["other_to_fresh"] == 0.0
    assert max(line["start_to_trainer"], line["other_to_trainer"]) < 0.1 * line["other_to_start"]


@pytest.mark.parametrize(("name", "reason"), [("nccl", "needs vLLM and a GPU"), ("graphs", "needs a GPU")])
def test_what_needs_a_card_says_so(name, reason, capsys):
    (line,) = section(name, capsys)
    assert reason in line["skipped"]


def test_each_section_is_a_process_that_says_how_it_ended(tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--out", out]
    ended = subprocess.run([*command, "--sections", "streams"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    skipped, end = map(json.loads, out.read_text().splitlines())
    assert "needs a GPU" in skipped["skipped"]
    assert (end["section"], end["exit"]) == ("streams", 0)
