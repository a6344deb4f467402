"""The launch files of examples/accelerate_configs, as `accelerate launch` reads them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


DIRECTORY = Path(__file__).parents[3] / "examples" / "accelerate_configs"
MEANT = {
    "zero2": {"use_deepspeed": True, "use_fsdp": False, "zero_stage": 2},
    "zero3": {"use_deepspeed": True, "use_fsdp": False, "zero_stage": 3},
    "fsdp2": {"use_deepspeed": False, "use_fsdp": True, "fsdp_version": 2},
    "ulysses": {
        "use_deepspeed": True,
        "use_parallelism_config": True,
        "zero_stage": 3,
        "parallelism_config_sp_size": 2,
    },
}


def launched(name: str) -> Namespace:
    arguments = launch_command_parser().parse_args(["--config_file", str(DIRECTORY / f"{name}.yaml"), "script.py"])
    return _validate_launch_command(arguments)[0]


def test_every_file_is_tried():
    assert {path.stem for path in DIRECTORY.iterdir()} == set(MEANT)


@pytest.mark.parametrize("name", MEANT)
def test_accelerate_knows_every_key(name):
    # It raises for the first that it does not know.
    load_config_from_file(str(DIRECTORY / f"{name}.yaml"))


@pytest.mark.parametrize("name", MEANT)
def test_the_launcher_starts_what_the_name_says(name):
    arguments = vars(launched(name))
    assert {option: arguments[option] for option in MEANT[name]} == MEANT[name]


def test_the_ranks_that_share_a_sequence_fit_the_number_of_processes():
    arguments = launched("ulysses")
    num_ranks = arguments.parallelism_config_dp_shard_size * arguments.parallelism_config_sp_size
    assert num_ranks == arguments.num_processes
