"""The Slurm script, with stand-ins for `srun` and for everything that it starts: what runs where, with which arguments."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser


ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "slurm" / "atropos.sbatch"

# As srun: a step takes the job's number of tasks unless it says otherwise, and the tasks of each know their number.
SRUN = """#!/bin/bash
tasks=$SLURM_NTASKS
line="srun"
while [[ $1 == --* ]]; do
    line+=$'\\t'"$1"
    case $1 in --ntasks=*) tasks=${1#*=} ;; esac
    shift
done
echo "$line" >> "$CALLS"
for ((task = 0; task < tasks; task++)); do SLURM_PROCID=$task "$@"; done
"""
RECORDS = """#!/bin/bash
line=$(basename "$0")
for argument in "$@"; do line+=$'\\t'"$argument"; done
echo "$line" >> "$CALLS"
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory) -> list[list[str]]:
    directory = tmp_path_factory.mktemp("slurm")
    stand_ins = {"srun": SRUN, "scontrol": '#!/bin/bash\nprintf "node-a\\nnode-b\\nnode-c\\n"\n'}
    for name in ("accelerate", "run-api", "trl", "curl", "environment"):
        stand_ins[name] = RECORDS
    for name, text in stand_ins.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    recorded = directory / "calls"
    job = {
        "SLURM_JOB_NODELIST": "node-[a-c]",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "3",
        "SLURM_CPUS_ON_NODE": "96",
        "CALLS": str(recorded),
        "PATH": f"{directory}:{os.environ['PATH']}",
    }
    subprocess.run(
        ["bash", SCRIPT, "org/model", "environment serve"],
        cwd=ROOT,
        env={**os.environ, **job},
        check=True,
        timeout=60,
    )
    # The server's step runs beside the trainer's, which the script ends with.
    deadline = time.monotonic() + 10
    while "environment" not in recorded.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    lines = recorded.read_text().splitlines()
    return [line.split("\t") for line in lines]


def of(calls: list[list[str]], name: str) -> list[list[str]]:
    return [arguments for command, *arguments in calls if command == name]


def test_the_server_is_one_task_on_one_node_and_the_trainer_one_on_each_of_two(calls):
    server, trainer = sorted(of(calls, "srun"), key=lambda arguments: "--nodes=2" in arguments)
    whole_nodes = ["--ntasks-per-node=1", "--cpus-per-task=96"]
    assert server == ["--nodes=1", "--ntasks=1", *whole_nodes, "--nodelist=node-a"]
    assert trainer == ["--nodes=2", "--ntasks=2", *whole_nodes, "--nodelist=node-b,node-c"]
    for name, number in (("run-api", 1), ("trl", 1), ("environment", 1), ("accelerate", 2)):
        assert len(of(calls, name)) == number, name


def test_each_machine_has_its_rank_and_the_same_meeting_point(calls):
    parsed = [launch_command_parser().parse_args(arguments[1:]) for arguments in of(calls, "accelerate")]
    assert sorted(args.machine_rank for args in parsed) == [0, 1]
    for args in parsed:
        assert (args.num_machines, args.num_processes) == (2, 16)
        assert (args.main_process_ip, args.main_process_port) == ("node-b", 29500)
        assert args.training_script == "examples/scripts/atropos.py"
        options = dict(zip(args.training_script_args[::2], args.training_script_args[1::2], strict=True))
        assert options["--vllm_server_base_url"] == "http://node-a:8001"
        # Its name may stand for 127.0.1.1 there.
        assert "--vllm_group_host" not in options


def test_the_environment_asks_the_server_beside_it(calls):
    (environment,) = of(calls, "environment")
    assert environment[:1] == ["serve"]
    assert environment[environment.index("--openai.base_url") + 1] == "http://localhost:8001/v1"
