"""Options: defaults, contradictions, YAML and command line, and the example script that takes them."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig, TrlParser

from trl_atropos import AtroposConfig


REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "scripts" / "atropos.py"
QUICKSTART = REPOSITORY / "examples" / "configs" / "quickstart.yaml"


def config(**options: Any) -> AtroposConfig:
    return AtroposConfig(**{"output_dir": "out", "use_cpu": True, "report_to": "none", **options})


def declared_options() -> set[str]:
    """The options in the body of the class, as opposed to those of TrainingArguments."""
    (body,) = [node.body for node in ast.walk(ast.parse(inspect.getsource(AtroposConfig))) if hasattr(node, "bases")]
    names = {node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


class TestDefaults:
    def test_they_construct_and_say_what_the_docstring_says(self):
        args = config()
        assert args.learning_rate == 1e-6
        assert args.max_steps == 1000
        assert args.logging_steps == 1
        assert args.lr_scheduler_type == "constant"
        assert args.gradient_checkpointing is True
        assert args.ignore_data_skip is True
        assert args.logging_nan_inf_filter is False

    def test_no_half_precision_on_a_cpu(self):
        assert config().bf16 is False

    def test_batch_size_follows_from_the_three_factors(self):
        # 6 x 3 x 1 process
        args = config(per_device_train_batch_size=6, gradient_accumulation_steps=3)
        assert args.atropos_batch_size == 18

    def test_a_batch_size_that_agrees_is_accepted(self):
        assert config(per_device_train_batch_size=6, atropos_batch_size=6).atropos_batch_size == 6


CONTRADICTIONS = {
    "batch_size": ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "atropos_batch_size": 6},
                   ["atropos_batch_size (6)", "per_device_train_batch_size (4)", "gradient_accumulation_steps (2)", "= 8"]),
    "batch_wait_beyond_the_collective": ({"batch_timeout_s": 1800.0, "ddp_timeout": 1800},
                                         ["batch_timeout_s (1800.0)", "ddp_timeout (1800)", "--ddp_timeout"]),
    "epochs": ({"max_steps": -1, "num_train_epochs": 2}, ["max_steps is -1", "epochs", "--max_steps"]),
    "ignore_data_skip": ({"ignore_data_skip": False}, ["ignore_data_skip"]),
    "logging_nan_inf_filter": ({"logging_nan_inf_filter": True}, ["logging_nan_inf_filter"]),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, ["auto_find_batch_size is True", "at False"]),
    "use_liger_kernel": ({"use_liger_kernel": True}, ["use_liger_kernel is True", "at False"]),
    "label_smoothing": ({"label_smoothing_factor": 0.1}, ["label_smoothing_factor is 0.1", "at 0.0"]),
    "probe_tolerance": ({"logprob_probe_tolerance": float("nan")}, ["logprob_probe_tolerance is nan", "positive"]),
    "publish_deadline": ({"weight_sync_timeout": -1.0}, ["weight_sync_timeout is -1.0", "positive"]),
    "epsilon": ({"epsilon": -1.0}, ["epsilon is -1.0", "0 or more"]),
    "epsilon_high": ({"epsilon_high": float("nan")}, ["epsilon_high is nan", "0 or more"]),
    "bf16_and_fp16": ({"bf16": True, "fp16": True}, ["bf16", "fp16"]),
}  # fmt: skip


class TestContradictions:
    @pytest.mark.parametrize("case", CONTRADICTIONS)
    def test_the_error_names_both_sides(self, case):
        options, words = CONTRADICTIONS[case]
        with pytest.raises(ValueError) as caught:
            config(**options)
        assert [word for word in words if word not in str(caught.value)] == []

    @pytest.mark.parametrize("name", ["loss_type", "scale_rewards", "advantage_normalization", "inference_logprobs"])
    def test_an_unknown_choice_is_refused_with_the_known_ones(self, name):
        choices = next(field for field in fields(AtroposConfig) if field.name == name).metadata["choices"]
        with pytest.raises(ValueError) as caught:
            config(**{name: "sometimes"})
        assert f"{name} is 'sometimes'" in str(caught.value)
        assert all(choice in str(caught.value) for choice in choices)

    @pytest.mark.parametrize("name", ["loss_type", "scale_rewards", "advantage_normalization", "inference_logprobs"])
    def test_every_offered_choice_is_accepted(self, name):
        for choice in next(field for field in fields(AtroposConfig) if field.name == name).metadata["choices"]:
            assert getattr(config(**{name: choice}), name) == choice

    @pytest.mark.parametrize("value", [0, -1])
    @pytest.mark.parametrize(
        "name", ["max_length", "weight_sync_steps", "temperature", "batch_timeout_s", "refresh_interval"]
    )
    def test_what_must_be_positive(self, name, value):
        with pytest.raises(ValueError, match=rf"{name} is {value}, it must be positive\. Set --{name}\."):
            config(**{name: value})

    @pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
    def test_dropped_fraction_is_below_1(self, value):
        with pytest.raises(ValueError, match=r"max_dropped_fraction is .*, it must lie in \[0, 1\)"):
            config(max_dropped_fraction=value)

    @pytest.mark.parametrize("bounds", [[5, -5], [1, 1], [1], [1, 2, 3], [float("-inf"), 0], [float("nan"), 1]])
    def test_clipping_takes_two_finite_ascending_numbers(self, bounds):
        with pytest.raises(ValueError, match=r"advantage_clipping is .*--advantage_clipping -5 5"):
            config(advantage_clipping=bounds)


class TestParser:
    def parse(self, tmp_path: Path, text: str, *arguments: str) -> AtroposConfig:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        (args,) = TrlParser((AtroposConfig,)).parse_args_and_config(
            ["--output_dir", str(tmp_path), "--use_cpu", "true", "--config", str(path), *arguments]
        )
        return args

    def test_yaml(self, tmp_path):
        args = self.parse(
            tmp_path,
            "loss_type: weighted_sft\nadvantage_clipping: [-5, 5]\nper_device_train_batch_size: 4\n"
            "model_init_kwargs: {dtype: float32}\nbatch_timeout_s: 30\n",
        )
        assert args.loss_type == "weighted_sft"
        assert list(args.advantage_clipping) == [-5, 5]
        assert args.atropos_batch_size == 4
        assert args.model_init_kwargs == {"dtype": "float32"}
        assert args.batch_timeout_s == 30

    def test_the_command_line_wins_over_the_yaml(self, tmp_path):
        args = self.parse(tmp_path, "advantage_clipping: [-5, 5]\n", "--advantage_clipping", "-2.5", "2.5")
        assert args.advantage_clipping == [-2.5, 2.5]

    def test_negative_bounds_need_no_quoting(self, tmp_path):
        assert self.parse(tmp_path, "{}\n", "--advantage_clipping", "-5", "5").advantage_clipping == [-5.0, 5.0]

    def test_dictionaries_are_json_on_the_command_line(self, tmp_path):
        args = self.parse(tmp_path, "{}\n", "--model_init_kwargs", '{"attn_implementation": "sdpa"}')
        assert args.model_init_kwargs == {"attn_implementation": "sdpa"}

    def test_an_unknown_key_is_refused_by_name(self, tmp_path):
        with pytest.raises(ValueError, match="atropos_batchsize"):
            self.parse(tmp_path, "atropos_batchsize: 4\n")

    def test_an_unknown_option_of_the_command_line_is_refused_by_name(self, tmp_path):
        with pytest.raises(ValueError, match="--atropos_batchsize"):
            self.parse(tmp_path, "{}\n", "--atropos_batchsize", "4")

    def test_a_wrong_choice_ends_in_the_usage(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            self.parse(tmp_path, "{}\n", "--loss_type", "ppo")
        assert "weighted_sft" in capsys.readouterr().err


def test_every_option_says_what_it_does():
    helps = {field.name: field.metadata.get("help", "") for field in fields(AtroposConfig)}
    declared = declared_options()
    assert {"loss_type", "atropos_api_url", "weight_sync_steps"} <= declared <= helps.keys()
    # A sentence: starts with a capital or an option's name, ends with a full stop.
    assert [name for name in declared if not (len(helps[name]) > 15 and helps[name].endswith("."))] == []


class TestExample:
    def test_help_runs_and_lists_our_options(self, tmp_path):
        # HOME: no cache of this user is read or written.
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=120, env=environment
        )
        assert result.returncode == 0, result.stderr
        assert [name for name in declared_options() if f"--{name}" not in result.stdout] == []

    def test_the_quickstart_config_parses(self, tmp_path):
        args, model_args = TrlParser((AtroposConfig, ModelConfig)).parse_args_and_config(
            ["--config", str(QUICKSTART), "--output_dir", str(tmp_path)]
        )
        written = yaml.safe_load(QUICKSTART.read_text())
        assert list(args.advantage_clipping) == written["advantage_clipping"]
        assert args.max_steps == written["max_steps"]
        assert args.atropos_batch_size == written["per_device_train_batch_size"]
        assert model_args.model_name_or_path == written["model_name_or_path"]
