from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import trl_atropos
from trl_atropos import AtroposConfig
from trl_atropos.errors import PreflightError
from trl_atropos.verl.options import NOT_HERE, RESTRICTIONS, SET_ELSEWHERE, atropos_config, check_lora


CONFIG = Path(trl_atropos.__file__).parent / "verl" / "config" / "atropos.yaml"


def verl_config(tmp_path: Path) -> dict[str, Any]:
    """What verl's configuration has of the keys that are read, as Hydra resolves it, for a run on recorded data."""
    ours = yaml.safe_load(CONFIG.read_text())
    ours["data"]["atropos"] |= {"batch_size": 8, "data_path": "groups.jsonl"}
    return {
        **{name: ours[name] for name in ("use_advantage_weighting", "advantage_normalization", "advantage_clipping")},
        "atropos": {},
        "data": {
            **ours["data"],
            "train_batch_size": 8,
            "max_length": 64,
            "val_files": None,
            "custom_cls": {"path": None},
            "pad_mode": "no_padding",
        },
        "trainer": {
            "default_local_dir": str(tmp_path),
            "experiment_name": "name",
            "total_training_steps": None,
            "total_epochs": 3,
            "save_freq": -1,
            "test_freq": -1,
            "seed": 1,
        },
        "engine": {"strategy": "fsdp2", "ulysses_sequence_parallel_size": 1},
        "model": {"use_fused_kernels": False, "lora_rank": 0, "lora": {}},
    }


def make(config: dict[str, Any], num_ranks: int = 1) -> AtroposConfig:
    return atropos_config(config, num_ranks=num_ranks, device="cpu")


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    config[name] = value


def test_keys_of_verl_and_of_the_seed_become_options(tmp_path):
    config = verl_config(tmp_path)
    config |= {
        "use_advantage_weighting": True,
        "advantage_normalization": "global",
        "advantage_clipping": [-5.0, 5.0],
        "atropos": {"max_dropped_fraction": 0.0, "temperature": 0.5},
    }
    config["trainer"] |= {"total_training_steps": 7, "save_freq": 2}
    args = make(config)
    assert (args.loss_type, args.advantage_normalization, args.advantage_clipping) == (
        "weighted_sft",
        "global",
        [-5.0, 5.0],
    )
    assert (args.data_path, args.atropos_batch_size, args.refresh_interval) == ("groups.jsonl", 8, 5.0)
    assert (args.max_dropped_fraction, args.temperature, args.max_length) == (0.0, 0.5, 64)
    assert (args.max_steps, args.num_train_epochs, args.save_steps, args.run_name) == (7, 3, 2, "name")
    assert args.output_dir == str(tmp_path)


def test_what_is_not_given_is_as_in_atropos_trainer(tmp_path):
    args, default = make(verl_config(tmp_path)), AtroposConfig(output_dir=str(tmp_path), use_cpu=True)
    names = ("loss_type", "advantage_normalization", "advantage_clipping", "weight_sync_steps", "max_staleness")
    assert {name: getattr(args, name) for name in names} == {name: getattr(default, name) for name in names}


@pytest.mark.parametrize("key", list(RESTRICTIONS))
def test_a_key_of_verl_that_cannot_act_is_refused_by_name(key, tmp_path):
    config = verl_config(tmp_path)
    set_key(config, key, "something else")
    with pytest.raises(PreflightError, match=rf"^{key} is 'something else'\."):
        make(config)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        *((name, key) for name, key in SET_ELSEWHERE.items()),
        *((name, "train with AtroposTrainer") for name in NOT_HERE),
        ("vllm_api_key", "VLLM_API_KEY in the environment"),
        ("learning_rate", "docs/verl.md says where the others are"),
        ("loss_typ", "loss_type"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(name, fix, tmp_path):
    config = {**verl_config(tmp_path), "atropos": {name: 1}}
    with pytest.raises(PreflightError, match=f"`{name}`") as caught:
        make(config)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atropos": {"advantage_clipping": [-1.0, 1.0]}, "advantage_clipping": [-2.0, 2.0]}, "advantage_clipping"),
        ({"use_advantage_weighting": True, "atropos": {"loss_type": "grpo"}}, "says `loss_type` twice"),
        ({"use_advantage_weighting": False}, "plain supervised fine-tuning"),
        ({"atropos": {"beta": 0.1}}, "no second model"),
        ({"atropos": {"weight_sync_mode": "adapter"}}, "weight_sync_mode is adapter"),
    ],
)
def test_contradictions_are_refused(change, message, tmp_path):
    with pytest.raises(PreflightError, match=message):
        make({**verl_config(tmp_path), **change})


def test_ranks_share_a_step_equally(tmp_path):
    with pytest.raises(PreflightError, match="train_batch_size is 8 and there are 3 ranks"):
        make(verl_config(tmp_path), num_ranks=3)


def test_a_live_run_needs_a_number_of_steps(tmp_path):
    config = verl_config(tmp_path)
    config["data"]["atropos"] |= {"data_path": None, "api_url": "http://localhost:8000"}
    with pytest.raises(PreflightError, match="total_training_steps is not set"):
        make(config)
    config["trainer"]["total_training_steps"] = 3
    assert make(config).atropos_api_url == "http://localhost:8000"


def test_an_adapter_is_published_merged_only(tmp_path):
    config = verl_config(tmp_path)
    config["model"]["lora_rank"] = 8
    with pytest.raises(PreflightError, match=r"lora.merge is off"):
        check_lora(config)
    config["model"]["lora"] = {"merge": True}
    check_lora(config)
