"""Options from files and the command line: what seed files become, and what is refused with which words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig

from trl_atropos import AtroposConfig, AtroposParser
from trl_atropos.errors import PreflightError
from trl_atropos.trainer.seed_options import SEED_OPTIONS, translate_seed_options


ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "examples" / "configs"
TRAINING_FILES = sorted(path for path in CONFIGS.glob("*.yaml") if "launch" not in path.name)
ON_CPU = ["--use_cpu", "true", "--bf16", "false"]
API = ["--atropos_api_url", "http://localhost:8000"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def parse(tmp_path: Path, config: Any, *arguments: str) -> tuple[AtroposConfig, ModelConfig]:
    path = config
    if not isinstance(config, Path):
        path = tmp_path / "file.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    parser = AtroposParser((AtroposConfig, ModelConfig))
    return parser.parse_args_and_config(
        ["--config", str(path), "--output_dir", str(tmp_path), *ON_CPU, *API, *arguments]
    )


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Parse what must end with status 2 and a message."""

    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(SystemExit) as caught:
            parse(*arguments)
        assert caught.value.code == 2
        assert re.search(message, capsys.readouterr().err, re.DOTALL)

    return refused


class TestReadyConfigurations:
    @pytest.mark.parametrize("path", TRAINING_FILES, ids=lambda path: path.stem)
    def test_every_option_is_known_and_they_fit_together(self, tmp_path, path):
        args, _ = parse(tmp_path, path)
        assert args.output_dir == str(tmp_path)

    @pytest.mark.parametrize("path", TRAINING_FILES, ids=lambda path: path.stem)
    def test_every_value_arrives(self, tmp_path, path):
        args, model_args = parse(tmp_path, path)
        options = {
            name: value for name, value in yaml.safe_load(path.read_text()).items() if name not in ("data", "bf16")
        }
        options.pop("use_advantage_weighting", None)
        for name, value in options.items():
            parsed = getattr(args, name) if hasattr(args, name) else getattr(model_args, name)
            # transformers turns strings into enumerations, some values into lists, and "none" into an empty one.
            is_same = parsed in (value, [value]) or getattr(parsed, "value", None) == value
            assert is_same or (name, value, parsed) == ("report_to", "none", []), name

    def test_the_seeds_file_is_this_run(self, tmp_path, capsys):
        args, _ = parse(tmp_path, CONFIGS / "atropos_sft_trainer.yaml")
        assert (args.loss_type, args.advantage_normalization, args.advantage_clipping) == (
            "weighted_sft",
            "batch",
            [-5.0, 5.0],
        )
        assert (args.atropos_api_url, args.data_path) == ("http://localhost:8000", None)
        assert (args.atropos_batch_size, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (
            32,
            32,
            1,
        )
        assert (args.refresh_interval, args.api_timeout_s) == (10.0, 4 * 30.0)
        printed = capsys.readouterr().err
        assert "use_advantage_weighting: True -> loss_type: 'weighted_sft'" in printed
        assert "data.atropos.max_retries: 3, data.atropos.timeout: 30 -> api_timeout_s: 120.0" in printed


class TestSeedKeys:
    def test_keys_of_this_trainer_stay_as_they_are(self):
        config = {"loss_type": "dapo", "max_steps": 3, "advantage_normalization": "global"}
        assert translate_seed_options(config) == (config, [])

    def test_each_key_is_translated(self):
        values = {
            "model": {
                "partial_pretrain": "m", "enable_gradient_checkpointing": False, "trust_remote_code": True,
                "lora_rank": 8, "lora_alpha": 16, "target_modules": "all-linear",
            },
            "optim": {
                "lr": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0.01, "warmup_steps_ratio": 0.1, "clip_grad": 1.0,
                "lr_scheduler": "cosine",
            },
            "data": {"train_batch_size": 64, "micro_batch_size_per_gpu": 4, "max_length": 1024},
            "trainer": {
                "default_local_dir": "out", "experiment_name": "e", "total_training_steps": 7, "seed": 1,
                "logger": ["console", "wandb"],
            },
            "ulysses_sequence_parallel_size": 1,
            "use_remove_padding": True,
        }  # fmt: skip
        options, lines = translate_seed_options(values)
        assert options == {
            "model_name_or_path": "m", "gradient_checkpointing": False, "trust_remote_code": True,
            "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": "all-linear",
            "learning_rate": 1e-5, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.01, "warmup_steps": 0.1,
            "max_grad_norm": 1.0, "lr_scheduler_type": "cosine",
            "atropos_batch_size": 64, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 16, "max_length": 1024,
            "output_dir": "out", "run_name": "e", "max_steps": 7, "seed": 1, "report_to": ["wandb"], "sequence_layout": "packed",
        }  # fmt: skip
        # One for each key, and one for how the batch is cut.
        num_keys = sum(len(value) if isinstance(value, dict) else 1 for value in values.values())
        assert len(lines) == num_keys + 1

    @pytest.mark.parametrize(
        ("world_size", "options", "split"),
        [
            (4, {}, (8, 1)),
            (4, {"gradient_accumulation_steps": 2}, (4, 2)),
            (2, {"per_device_train_batch_size": 4}, (4, 4)),
        ],
    )
    def test_the_batch_is_cut_for_the_number_of_processes(self, monkeypatch, world_size, options, split):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        made, _ = translate_seed_options({"data": {"atropos": {"batch_size": 32}}, **options})
        assert (made["per_device_train_batch_size"], made["gradient_accumulation_steps"]) == split

    @pytest.mark.parametrize(
        ("config", "what", "fix"),
        [
            ({"use_advantage_weighting": False}, "`use_advantage_weighting`: False", "use TRL's SFTTrainer"),
            ({"data": {"atropos": {"api_ur": "x"}}}, "`data.atropos.api_ur`: 'x'", "Did you mean `data.atropos.api_url`?"),
            ({"data": {"train_files": "x"}}, "`data.train_files`", "Did you mean `data.train_batch_size`?"),
            ({"ulysses_sequence_parallel_size": 2}, "`ulysses_sequence_parallel_size`: 2", "ulysses.yaml"),
            ({"optim": {"betas": 0.9}}, "`optim.betas`: 0.9", "cannot unpack"),
            ({"loss_type": "dapo", "use_advantage_weighting": True}, "`loss_type` twice: 'dapo', and 'weighted_sft'", "Remove"),
            ({"data": {"atropos": {"batch_size": 32}}, "gradient_accumulation_steps": 5}, "32 rollouts a step", "multiple of 5"),
        ],
        ids=["no_weighting", "misspelled", "of_sft", "ulysses", "wrong_type", "twice", "indivisible"],
    )  # fmt: skip
    def test_what_cannot_be_translated_is_refused(self, config, what, fix):
        with pytest.raises(PreflightError) as caught:
            translate_seed_options(config)
        assert what in caught.value.what
        assert fix in caught.value.fix

    @pytest.mark.parametrize(
        ("key", "value"),
        [("batch_size", value) for value in (None, "many", 0, 1.5, True)]
        + [("max_retries", -1), ("max_retries", [1]), ("timeout", "soon"), ("timeout", float("nan"))],
    )
    def test_a_value_that_is_no_number_is_refused(self, key, value):
        with pytest.raises(PreflightError, match=rf"`data\.atropos\.{key}`.*number of [01] or more"):
            translate_seed_options({"data": {"atropos": {key: value}}})

    @pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
    def test_a_batch_cannot_be_cut_into_nothing(self, name):
        with pytest.raises(PreflightError, match=rf"`{name}`: 0.*whole number of 1 or more"):
            translate_seed_options({"data": {"train_batch_size": 32}, name: 0})

    def test_every_option_that_a_key_names_exists(self):
        known = {field.name for cls in (AtroposConfig, ModelConfig) for field in fields(cls)}
        assert {name for option in SEED_OPTIONS.values() for name in option.options} <= known


class TestFilesAndCommandLine:
    def test_the_command_line_wins(self, tmp_path):
        args, _ = parse(tmp_path, {"max_steps": 3, "learning_rate": "1e-5"}, "--max_steps", "4")
        assert (args.max_steps, args.learning_rate) == (4, 1e-5)

    def test_the_file_may_be_joined_by_an_equals_sign(self, tmp_path):
        (tmp_path / "f.yaml").write_text("max_steps: 3\n")
        parser = AtroposParser((AtroposConfig, ModelConfig))
        args, _ = parser.parse_args_and_config(
            [f"--config={tmp_path / 'f.yaml'}", "--output_dir", str(tmp_path), *ON_CPU, *API]
        )
        assert args.max_steps == 3

    @pytest.mark.parametrize("name", ["save_strategy", "logging_strategy", "eval_strategy"])
    def test_a_strategy_may_be_a_plain_no(self, tmp_path, name):
        path = tmp_path / "plain.yaml"
        path.write_text(f"{name}: no\n")
        assert yaml.safe_load(path.read_text()) == {name: False}
        args, _ = parse(tmp_path, path)
        assert getattr(args, name) == "no"

    def test_env_sets_environment_variables(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ATROPOS_TEST_VARIABLE", "before")
        parse(tmp_path, {"env": {"ATROPOS_TEST_VARIABLE": 1}})
        assert os.environ["ATROPOS_TEST_VARIABLE"] == "1"

    def test_a_misspelled_name_in_the_file_is_refused_with_the_nearest(self, tmp_path, refused):
        refused(r"file\.yaml has `max_stpes`.*Did you mean `max_steps`\?", tmp_path, {"max_stpes": 3})

    @pytest.mark.parametrize("arguments", [["--max_stalenes_", "3"], ["--max_stalenes_=3"]])
    def test_a_misspelled_name_on_the_command_line_is_refused_with_the_nearest(self, tmp_path, arguments, refused):
        refused(r"`--max_stalenes_`.*Did you mean `--max_staleness`\?", tmp_path, {}, *arguments)

    def test_a_value_without_a_name_is_refused(self, tmp_path, refused):
        refused(r"The command line has `stray`", tmp_path, {}, "stray")

    def test_names_that_are_no_option_can_be_returned(self, tmp_path):
        (tmp_path / "f.yaml").write_text("max_steps: 3\nmine: 1\n")
        arguments = ["--config", str(tmp_path / "f.yaml"), "--output_dir", str(tmp_path), *ON_CPU, "--ours", "2"]
        parser = AtroposParser((AtroposConfig, ModelConfig))
        args, _, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
        assert (args.max_steps, unknown) == (3, ["--mine", "1", "--ours", "2"])

    def test_options_that_contradict_each_other_are_refused(self, tmp_path, refused):
        refused(
            r"^ValueError: batch_timeout_s .* is not below 86400 s",
            tmp_path,
            {"batch_timeout_s": 90000},
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [("- 1\n", "holds a list"), ("a: [", "cannot be read"), ("env: 3\n", "`env` .* is a int"), ("1: 2\n", "not a mapping of names")],
    )  # fmt: skip
    def test_a_file_that_holds_no_options_is_refused(self, tmp_path, content, message, refused):
        refused(message, tmp_path, content)

    def test_a_file_that_is_not_there_is_refused(self, tmp_path, refused):
        refused(r"absent\.yaml cannot be read", tmp_path, tmp_path / "absent.yaml")

    def test_a_run_without_rollouts_is_refused_before_a_model_is_loaded(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            AtroposParser((AtroposConfig, ModelConfig)).parse_args_and_config(["--output_dir", str(tmp_path), *ON_CPU])
        assert "Neither atropos_api_url nor data_path is given." in capsys.readouterr().err
