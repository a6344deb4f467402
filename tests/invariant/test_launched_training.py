"""`Trainer.train` takes the same optimizer step in one process and in the processes of each launcher.

With plain gradient descent the weights before minus the weights after are the gradient, whatever holds it in between:
DDP, or the partitions of ZeRO. What runs in the processes is launched_step.py.

On a CPU, `accelerate launch --cpu --num_processes 2` starts one process. The forms below really start two: torchrun, and
`accelerate launch` with `--multi_gpu` (a machine without GPU then trains on the CPU if ACCELERATE_USE_CPU says so) or with
`--use_deepspeed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
import yaml
from launched_step import CASES, TOKEN_BUDGET, run_case
from launcher import run_launcher
from scripted_server import ScriptedServer
from test_split_invariance import RELATIVE_ERROR, VOCAB_SIZE, assert_same_gradient, policy
from tiny_models import tiny_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("launched_step.py")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    *("accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
# Several times what a launch takes on one busy core.
LAUNCH_TIMEOUT_S = 240

NON_FINITE = ["diverging-loss", "infinite-loss"]
FINITE = [name for name in CASES if name not in NON_FINITE]
COMMON = ["dapo-accumulated", "grpo", "clipped", "reference", "rank-without-data", "token-budget"]

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Launch:
    """How two processes are started, and what they run.

    Args:
        command (`tuple[str, ...]`):
            Module and arguments of the launcher.
        parallelism (`str`):
            See `launched_step.run_case`.
        environment (`dict[str, str]`):
            More environment variables.
        cases (`list[str]`):
            Of `launched_step.CASES`.
    """

    command: tuple[str, ...]
    parallelism: str
    environment: dict[str, str]
    cases: list[str]


def with_deepspeed(config: str) -> tuple[str, ...]:
    return (*ACCELERATE, "--use_deepspeed", "--deepspeed_config_file", config)


def with_ulysses(config: str) -> tuple[str, ...]:
    # A config file: accelerate's flags for it insist on FSDP.
    return (
        *("accelerate.commands.launch", "--num_machines", "1", "--num_processes", "4", "--main_process_port", "0"),
        *("--dynamo_backend", "no", "--config_file", config),
    )


ON_CPU = {"ACCELERATE_USE_CPU": "true"}
DEEPSPEED_ON_CPU = {"DS_ACCELERATOR": "cpu"}
LAUNCHES = {
    "torchrun-ddp": Launch(TORCHRUN, "ddp", ON_CPU, [*COMMON, *NON_FINITE]),
    "accelerate-ddp": Launch((*ACCELERATE, "--multi_gpu"), "ddp", ON_CPU, ["dapo", "grpo-accumulated"]),
    "accelerate-zero2": Launch(with_deepspeed("zero2.json"), "zero2", DEEPSPEED_ON_CPU, [*COMMON, *NON_FINITE]),
    "accelerate-zero3": Launch(with_deepspeed("zero3.json"), "zero3", DEEPSPEED_ON_CPU, [*COMMON, *NON_FINITE]),
    # DeepSpeed makes the groups of a process once, so one run is all there is.
    "ulysses-zero2": Launch(with_ulysses("ulysses2.yaml"), "ulysses2", DEEPSPEED_ON_CPU, ["dapo-two-steps"]),
    "ulysses-zero3": Launch(with_ulysses("ulysses3.yaml"), "ulysses3", DEEPSPEED_ON_CPU, ["grpo"]),
}


def deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        # Left out, accelerate clips at 1.
        "gradient_clipping": "auto",
        "bf16": {"enabled": False},
        # Every parameter is sharded, however small.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """The model as a checkpoint, and the configurations of DeepSpeed."""
    directory = tmp_path_factory.mktemp("launched")
    policy().save_pretrained(directory / "model")
    tokenizer = Tokenizer(models.WordLevel({str(token_id): token_id for token_id in range(VOCAB_SIZE)}, "0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1").save_pretrained(
        directory / "model"
    )
    for stage in (2, 3):
        (directory / f"zero{stage}.json").write_text(json.dumps(deepspeed_config(stage)))
        ulysses = yaml.safe_load((ROOT / "examples" / "accelerate_configs" / "ulysses.yaml").read_text())
        ulysses["deepspeed_config"] = {"deepspeed_config_file": f"zero{stage}.json"}
        ulysses["parallelism_config"]["parallelism_config_sp_attn_implementation"] = "sdpa"
        # Said by the configuration of DeepSpeed.
        del ulysses["mixed_precision"]
        (directory / f"ulysses{stage}.yaml").write_text(yaml.safe_dump(ulysses))
    return directory


@pytest.fixture(scope="module")
def results_of(directory) -> Callable[[str], list[Results]]:
    """Results of each rank of a launch, which is made once, also if it fails."""
    outcomes: dict[str, tuple[int, str]] = {}
    served: dict[str, dict[str, torch.Tensor]] = {}

    def results_of(name: str) -> list[Results]:
        if name not in outcomes:
            # Starts with other weights than the trainer, and without any engine.
            with ScriptedServer(tiny_llama(seed=1, vocab_size=VOCAB_SIZE)) as server:
                outcomes[name] = run_launch(LAUNCHES[name], directory, directory / name, server.base_url)
                served[name] = {key: value.clone() for key, value in server.model.named_parameters()}
        exit_status, log = outcomes[name]
        assert exit_status == 0, log
        results = [torch.load(path) for path in sorted((directory / name).glob("rank*.pt"))]
        assert len(results) == (4 if "ulysses" in name else 2)
        return [{**result, "served": served[name]} for result in results]

    return results_of


def run_launch(launch: Launch, directory: Path, output: Path, publish_url: str) -> tuple[int, str]:
    """Exit status of the launcher, and what it and its processes printed."""
    output.mkdir()
    return run_launcher(
        [
            "-m",
            *launch.command,
            fork_server.PROGRAM,
            SCRIPT,
            directory / "model",
            output,
            launch.parallelism,
            *launch.cases,
        ],
        timeout_s=LAUNCH_TIMEOUT_S,
        environment={"PUBLISH_URL": publish_url, **launch.environment},
        cwd=directory,
    )


@pytest.fixture(scope="module")
def in_one_process(directory, tmp_path_factory) -> Results:
    """Each case with all rollouts in one micro-batch."""
    output = tmp_path_factory.mktemp("one_process")
    results = {}
    for name in FINITE:
        options = {key: value for key, value in CASES[name].options.items() if key not in TOKEN_BUDGET}
        whole = replace(CASES[name], split=(1, 1, 8), options=options)
        results[name] = run_case(whole, directory / "model", output)
    return results


def launched_cases(names: list[str]) -> list[tuple[str, str]]:
    return [(launch, case) for launch in LAUNCHES for case in LAUNCHES[launch].cases if case in names]


@pytest.mark.parametrize(("launch", "case"), launched_cases(FINITE))
def test_every_rank_makes_the_step_of_one_process(results_of, in_one_process, launch, case):
    expected = in_one_process[case]
    for result in results_of(launch):
        assert result[case]["error"] is None
        # What the steps differ by adds up: after two, 0.99e-6 of the norm under DDP, 1.08e-6 under ZeRO-3.
        assert_same_gradient(result[case]["change"], expected["change"], CASES[case].num_steps * RELATIVE_ERROR)
        assert result[case]["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_the_cases_make_different_steps(in_one_process):
    # Guards the guard: an option without effect would pass every comparison above.
    for case, other in (
        ("dapo", "grpo"),
        ("dapo", "rank-without-data"),
        ("dapo-two-steps", "dapo"),
        ("dapo-two-steps", "reference"),
        ("clipped", "grpo"),
    ):
        with pytest.raises(AssertionError):
            assert_same_gradient(in_one_process[case]["change"], in_one_process[other]["change"], 1e-2)
    clipped = torch.cat([change.flatten() for change in in_one_process["clipped"]["change"].values()])
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("launch", ["torchrun-ddp", "accelerate-zero2", "accelerate-zero3"])
def test_the_rollouts_were_dealt_as_the_cases_say(results_of, launch):
    first, second = results_of(launch)
    assert (first["grpo"]["items"], second["grpo"]["items"]) == ([[4]], [[4]])
    assert (first["dapo-accumulated"]["items"], second["dapo-accumulated"]["items"]) == ([[2], [2]], [[2], [2]])
    assert (first["rank-without-data"]["items"], second["rank-without-data"]["items"]) == ([[4]], [[0]])
    for result in (first, second):
        (micro_batches,) = result["token-budget"]["items"]
        assert len(micro_batches) > 1


@pytest.mark.parametrize(("launch", "case"), launched_cases(NON_FINITE))
def test_a_loss_that_is_not_finite_stops_every_rank_before_any_weight_changes(results_of, launch, case):
    ranks = results_of(launch)
    for result in ranks:
        assert all(not change.any() for change in result[case]["change"].values())
    assert sorted(result[case]["error"] for result in ranks) == [
        "The loss of step 1 is not finite, because of a rollout of another rank.",
        "The loss of step 1 is not finite, because of environment 0, group 0, rollout 2.",
    ]


@pytest.mark.parametrize("launch", ["ulysses-zero2", "ulysses-zero3"])
def test_models_that_pieces_of_a_sequence_would_change_are_refused(results_of, launch):
    case = LAUNCHES[launch].cases[0]
    for result in results_of(launch):
        refusals = result[case]["refusals"]
        refused = [name for name, why in refusals.items() if why is not None]
        assert refused == ["a window", "a state"]
        assert refusals["a window"].startswith(
            "The model's sliding window of 8 tokens is shorter than max_length (20)"
        )
        assert refusals["a state"].startswith(
            "A sequence whose pieces lie on 2 ranks gets other logprobs than the whole"
        )


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_trained_policy_is_published_whole_and_proven(results_of, launch):
    """From DDP, ZeRO-2 and ZeRO-3 after real optimizer steps. In float32, so that equal means every bit."""
    for result in results_of(launch):
        first = LAUNCHES[launch].cases[0]
        weights = result[first]["weights"]
        assert result["served"].keys() == weights.keys()
        assert all(torch.equal(result["served"][name], weight) for name, weight in weights.items())
        # Logprobs of the trainer against those of the served copy of it.
        assert result[first]["published"]["logprob_probe/mean_abs_diff"] < 1e-5
