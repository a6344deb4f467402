"""How a launch splits GPUs. What exists is told by CUDA_VISIBLE_DEVICES, or by a program in the place of `nvidia-smi`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trl_atropos.cli.launch.config import EnvironmentConfig, LaunchConfig
from trl_atropos.cli.launch.gpus import split_gpus, visible_gpus
from trl_atropos.errors import PreflightError


SLEEPING = {"vllm_args": {"enable-sleep-mode": None}, "trainer_args": "--vllm_enable_sleep_mode true"}


def config(vllm_gpus: str | None = None, trainer_gpus: str | None = None, **options: Any) -> LaunchConfig:
    required = {"model_name_or_path": "m", "run_dir": "r", "environments": {"e": EnvironmentConfig("e")}}
    values = {**required, "trainer_command": "train", "vllm_gpus": vllm_gpus, "trainer_gpus": trainer_gpus, **options}
    return LaunchConfig(**values)


def write_nvidia_smi(directory: Path, script: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")


def test_numbers_count_what_the_launch_itself_may_see() -> None:
    assert split_gpus(config("0,1", "2, 3")) == {
        "vllm": {"CUDA_VISIBLE_DEVICES": "4,5"},
        "trainer": {"CUDA_VISIBLE_DEVICES": "6,7"},
    }


def test_several_servers_get_equal_shares_in_their_order() -> None:
    assert split_gpus(config("0,2,1", "3", num_servers=3)) == {
        "trainer": {"CUDA_VISIBLE_DEVICES": "7"},
        "vllm-1": {"CUDA_VISIBLE_DEVICES": "4"},
        "vllm-2": {"CUDA_VISIBLE_DEVICES": "6"},
        "vllm-3": {"CUDA_VISIBLE_DEVICES": "5"},
    }


def test_nothing_is_split_if_nothing_is_told() -> None:
    assert split_gpus(config()) == {}


def test_external_part_needs_no_gpus_here() -> None:
    assert split_gpus(config(trainer_gpus="0", vllm_url="http://host:1")) == {"trainer": {"CUDA_VISIBLE_DEVICES": "4"}}
    assert split_gpus(config("1", trainer_command="external")) == {"vllm": {"CUDA_VISIBLE_DEVICES": "5"}}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (config("0"), "`vllm_gpus` is given and `trainer_gpus` is not"),
        (config(None, "0"), "`trainer_gpus` is given and `vllm_gpus` is not"),
        (config("0,1", "1,2"), "both name GPU 1"),
        (config("0,1,2", "3", num_servers=2), "names 3 GPUs for 2 servers"),
        (config("0", "3", num_servers=2), "names 1 GPUs for 2 servers"),
        (config("0", "4"), "`trainer_gpus` names GPU 4, and 4 can be seen"),
        (config("0,0", "1"), "each once"),
        (config("all", "1"), "`vllm_gpus` is 'all'"),
        (config("", "1"), "`vllm_gpus` is ''"),
        (config("-1", "1"), "`vllm_gpus` is '-1'"),
        (config("0", "0", vllm_args={"enable-sleep-mode": None}), "both name GPU 0"),
        (config("0", "0", trainer_args="--vllm_enable_sleep_mode true"), "both name GPU 0"),
        (
            config("0", "0", vllm_args={"enable-sleep-mode": None}, trainer_args="--vllm_enable_sleep_mode false"),
            "both",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused(told: LaunchConfig, message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        split_gpus(told)


def test_server_and_trainer_share_a_gpu_if_the_server_sleeps() -> None:
    expected = {"vllm": {"CUDA_VISIBLE_DEVICES": "4"}, "trainer": {"CUDA_VISIBLE_DEVICES": "4"}}
    assert split_gpus(config("0", "0", **SLEEPING)) == expected


def test_gpus_of_the_machine_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    write_nvidia_smi(tmp_path, "echo 0; echo 1")
    assert visible_gpus() == ["0", "1"]
    write_nvidia_smi(tmp_path, "exit 9")
    with pytest.raises(PreflightError, match="cannot be listed"):
        visible_gpus()
