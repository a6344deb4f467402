"""Options: defaults, contradictions, YAML and command line, and the example script that takes them."""

from __future__ import annotations

import ast
import inspect
import json
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from accelerate.parallelism_config import ParallelismConfig
from transformers.integrations import HfDeepSpeedConfig
from trl import ModelConfig, TrlParser

from trl_atropos import AtroposConfig
from trl_atropos.data.options import DataOptions
from trl_atropos.loss.options import LossOptions, StepOptions
from trl_atropos.policy.options import PolicyOptions
from trl_atropos.report.options import ReportOptions
from trl_atropos.weight_sync.options import WeightSyncOptions


REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "examples" / "scripts" / "atropos.py"
CONFIG_CLASSES = (
    AtroposConfig,
    DataOptions,
    PolicyOptions,
    LossOptions,
    StepOptions,
    WeightSyncOptions,
    ReportOptions,
)
QUICKSTART = REPOSITORY / "examples" / "configs" / "quickstart.yaml"


def config(**options: Any) -> AtroposConfig:
    return AtroposConfig(**{"output_dir": "out", "use_cpu": True, "report_to": "none", **options})


def declared_options() -> set[str]:
    """The options in the bodies of our classes, as opposed to those of TrainingArguments."""
    trees = [ast.parse(inspect.getsource(config_class)) for config_class in CONFIG_CLASSES]
    body = [
        statement for tree in trees for node in ast.walk(tree) if hasattr(node, "bases") for statement in node.body
    ]
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

    def test_of_the_loss_are_plain_dapo_against_the_policy_that_sampled(self):
        args = config()
        assert {option.name: getattr(args, option.name) for option in fields(StepOptions)} == asdict(StepOptions())
        assert (args.loss_type, args.importance_sampling_level) == ("dapo", "token")
        assert (args.epsilon, args.epsilon_high, args.delta) == (0.2, None, None)
        assert (args.beta, args.ref_logprobs, args.entropy_coef, args.distillation_coef) == (
            0.0,
            "recompute",
            0.0,
            0.0,
        )
        assert (args.vllm_importance_sampling_correction, args.off_policy_mask_threshold) == (False, None)
        assert (args.mask_truncated_completions, args.max_completion_length) == (False, None)
        assert (args.scale_rewards, args.advantage_normalization, args.advantage_clipping) == ("group", "none", None)
        assert (args.inference_logprobs, args.required_logprobs) == ("require", ("inference_logprobs",))

    def test_of_the_forward_pass_find_the_best_layout_and_form_no_batches_by_tokens(self):
        args = config()
        assert (args.sequence_layout, args.max_tokens_per_micro_batch, args.activation_offloading) == (
            "auto",
            None,
            False,
        )

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
    "batch_wait_beyond_the_collective": ({"batch_timeout_s": 86400.0},
                                         ["batch_timeout_s (86400.0)", "86400 s", "--batch_timeout_s"]),
    "epochs": ({"max_steps": -1, "num_train_epochs": 2}, ["max_steps is -1", "epochs", "--max_steps"]),
    "probe_tolerance": ({"logprob_probe_tolerance": float("nan")}, ["logprob_probe_tolerance is nan", "positive"]),
    "publish_deadline": ({"weight_sync_timeout": -1.0}, ["weight_sync_timeout is -1.0", "positive"]),
    "epsilon": ({"epsilon": -1.0}, ["epsilon is -1.0", "0 or more", "--epsilon"]),
    "epsilon_high": ({"epsilon_high": float("nan")}, ["epsilon_high is nan", "0 or more", "--epsilon_high"]),
    "cap_of_cispo": ({"loss_type": "cispo"}, ["loss_type is cispo", "epsilon_high is None", "--epsilon_high 5.0"]),
    "delta_without_clipping": ({"loss_type": "sapo", "delta": 2.0}, ["delta is 2.0", "loss_type is sapo", "--loss_type"]),
    "delta_of_cispo": ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 9.0}, ["delta is 9.0", "loss_type is cispo"]),
    "delta_inside_of_the_interval": ({"epsilon_high": 0.5, "delta": 1.5}, ["delta is 1.5", "1 + epsilon_high is 1.5"]),
    "sequence_level_without_ratio": ({"loss_type": "weighted_sft", "importance_sampling_level": "sequence"},
                                     ["importance_sampling_level is sequence", "loss_type is weighted_sft"]),
    "beta": ({"beta": -0.1}, ["beta is -0.1", "0 or more", "--beta"]),
    "beta_nan": ({"beta": float("nan")}, ["beta is nan", "--beta"]),
    "sapo_temperatures": ({"loss_type": "sapo", "sapo_temperature_neg": 0.0},
                          ["sapo_temperature_pos is 1.0", "sapo_temperature_neg is 0.0", "above 0"]),
    "correction_bounds": ({"vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_min": 4.0},
                          ["vllm_importance_sampling_clip_min is 4.0", "vllm_importance_sampling_clip_max is 3.0"]),
    "mask_without_bounds": ({"vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_max": None},
                            ["vllm_importance_sampling_mode is sequence_mask", "clip bounds are unset",
                             "--vllm_importance_sampling_clip_max 3.0"]),
    "correction_without_logprobs": (
        {"vllm_importance_sampling_correction": True, "inference_logprobs": "recompute"},
        ["vllm_importance_sampling_correction is on", "inference_logprobs is recompute", "--inference_logprobs require"]),
    "off_policy_mask_without_logprobs": (
        {"off_policy_mask_threshold": 0.1, "inference_logprobs": "recompute"},
        ["off_policy_mask_threshold is 0.1", "inference_logprobs is recompute", "--off_policy_mask_threshold"]),
    "reference_without_kl": ({"ref_logprobs": "require"}, ["ref_logprobs is require", "beta is 0", "--beta"]),
    "baseline_of_the_batch_in_the_spread_of_a_group": (
        {"advantage_baseline": "batch"}, ["advantage_baseline is batch", "scale_rewards is group", "--scale_rewards batch"]),
    "top_entropy_quantile": ({"top_entropy_quantile": 20.0}, ["top_entropy_quantile is 20.0", "between 0 and 1"]),
    "entropy_coef": ({"entropy_coef": float("inf")}, ["entropy_coef is inf", "--entropy_coef"]),
    "distillation_coef": ({"distillation_coef": -1.0}, ["distillation_coef is -1.0", "--distillation_coef"]),
    "distillation_coef_nan": ({"distillation_coef": float("nan")}, ["distillation_coef is nan"]),
    "constant_that_is_not_used": ({"max_completion_length": 512},
                                  ["max_completion_length is 512", "loss_type is dapo", "--loss_type dr_grpo"]),
    "constant_of_0": ({"loss_type": "dr_grpo", "max_completion_length": 0}, ["max_completion_length is 0", "above 0"]),
    "budget_below_a_rollout": ({"max_length": 4096, "max_tokens_per_micro_batch": 4095},
                               ["max_tokens_per_micro_batch is 4095", "max_length is 4096", "--max_length"]),
    "budget_and_accumulation": ({"max_tokens_per_micro_batch": 8192, "gradient_accumulation_steps": 2},
                                ["max_tokens_per_micro_batch is 8192", "gradient_accumulation_steps is 2",
                                 "--per_device_train_batch_size"]),
    "bf16_and_fp16": ({"bf16": True, "fp16": True}, ["bf16", "fp16"]),
}  # fmt: skip


CHOICES = (
    "loss_type", "importance_sampling_level", "vllm_importance_sampling_mode", "scale_rewards", "advantage_baseline", "advantage_normalization",
    "inference_logprobs", "ref_logprobs", "sequence_layout",
)  # fmt: skip


def choices_of(name: str) -> list[str]:
    return next(field for field in fields(AtroposConfig) if field.name == name).metadata["choices"]


class TestContradictions:
    @pytest.mark.parametrize("case", CONTRADICTIONS)
    def test_the_error_names_both_sides(self, case):
        options, words = CONTRADICTIONS[case]
        with pytest.raises(ValueError) as caught:
            config(**options)
        assert [word for word in words if word not in str(caught.value)] == []

    @pytest.mark.parametrize("name", CHOICES)
    def test_an_unknown_choice_is_refused_with_the_known_ones(self, name):
        with pytest.raises(ValueError) as caught:
            config(**{name: "sometimes"})
        assert name in str(caught.value)
        assert "'sometimes'" in str(caught.value)
        assert all(choice in str(caught.value) for choice in choices_of(name))

    @pytest.mark.parametrize("name", CHOICES)
    def test_every_offered_choice_is_accepted(self, name):
        # What some of the choices need.
        needed = {"cispo": {"epsilon_high": 5.0}, "downweight": {"max_staleness": 1}}
        for choice in choices_of(name):
            of_option = {"ref_logprobs": {"beta": 0.1}, "advantage_baseline": {"scale_rewards": "batch"}}
            options = {**of_option.get(name, {}), **needed.get(choice, {})}
            assert getattr(config(**{name: choice, **options}), name) == choice

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

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"atropos_api_url": "http://a:1", "data_path": "b.jsonl"},
                "atropos_api_url is http://a:1 and data_path is b.jsonl",
            ),
            ({"max_staleness": -1}, "max_staleness is -1, it must be 0 or more"),
            ({"stale_rollouts": "downweight"}, "stale_rollouts is downweight and max_staleness is not set"),
            ({"num_prefetched_batches": 2}, "num_prefetched_batches is 2"),
            (
                {"journal_max_bytes": 10, "journal_segment_bytes": 6},
                "journal_max_bytes is 10 and journal_segment_bytes 6",
            ),
            ({"batch_timeout_s": 86400}, r"batch_timeout_s \(86400\) is not below 86400 s"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_options_of_the_data_that_contradict_each_other(self, options, message):
        with pytest.raises(ValueError, match=message):
            config(**options)

    @pytest.mark.parametrize("bounds", [[5, -5], [1, 1], [1], [1, 2, 3], [float("-inf"), 0], [float("nan"), 1]])
    def test_clipping_takes_two_finite_ascending_numbers(self, bounds):
        with pytest.raises(ValueError, match=r"advantage_clipping is .*--advantage_clipping -5 5"):
            config(advantage_clipping=bounds)


class TestAccepted:
    """Neighbours of the contradictions, which are none."""

    @pytest.mark.parametrize(
        "options",
        [
            {"loss_type": "dr_grpo", "max_completion_length": 1},
            {"epsilon_high": 0.28, "delta": 1.3},
            {"beta": 0.1, "ref_logprobs": "require"},
            {"entropy_coef": -0.01},
            {"max_length": 4096, "max_tokens_per_micro_batch": 4096},
            {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_truncate",
             "vllm_importance_sampling_clip_max": None},
            {"vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_min": 0.5},
            {"off_policy_mask_threshold": 0.1, "inference_logprobs": "use"},
        ],
        ids=lambda options: "-".join(options),
    )  # fmt: skip
    def test_it_is_taken_as_it_is(self, options):
        args = config(**options)
        assert {name: getattr(args, name) for name in options} == options

    @pytest.mark.parametrize(
        ("options", "needs"),
        [
            ({}, True),
            ({"loss_type": "weighted_sft"}, False),
            ({"loss_type": "weighted_sft", "off_policy_mask_threshold": 0.1}, True),
            ({"loss_type": "weighted_sft", "vllm_importance_sampling_correction": True}, True),
            ({"inference_logprobs": "use"}, False),
            ({"inference_logprobs": "recompute"}, False),
        ],
    )
    def test_which_losses_stop_at_a_rollout_without_logprobs(self, options, needs):
        assert ("inference_logprobs" in config(**options).required_logprobs) is needs

    @pytest.mark.parametrize(
        ("spelling", "meaning"),
        [(True, "group"), (False, "none"), ("True", "group"), ("False", "none"), ("batch", "batch")],
    )
    def test_scale_rewards_takes_the_booleans_of_trl(self, spelling, meaning):
        assert config(scale_rewards=spelling).scale_rewards == meaning

    @pytest.mark.parametrize("bounds", [[0.5, 5.0], [-5.0, -0.5]])
    def test_clipping_that_leaves_out_0_is_taken_with_a_warning(self, bounds):
        with pytest.warns(UserWarning, match=r"advantage_clipping is \[.*\], which leaves out 0") as caught:
            assert config(advantage_clipping=bounds).advantage_clipping == bounds
        assert any("such as -5 5" in str(warning.message) for warning in caught)

    @pytest.mark.parametrize("bounds", [[-5.0, 5.0], [0.0, 5.0], [-5.0, 0.0]])
    def test_clipping_that_holds_0_warns_of_nothing(self, bounds):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            config(advantage_clipping=bounds)


class TestRoundTrip:
    OPTIONS: ClassVar[dict[str, Any]] = {
        "loss_type": "grpo", "epsilon_high": 0.28, "delta": 4.0, "importance_sampling_level": "sequence", "beta": 0.04,
        "ref_logprobs": "require", "entropy_coef": 0.01, "distillation_coef": 0.5, "scale_rewards": "batch",
        "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": 2.0, "vllm_importance_sampling_clip_min": 0.5,
        "off_policy_mask_threshold": 0.2, "mask_truncated_completions": True, "advantage_clipping": [-5.0, 5.0],
        "max_tokens_per_micro_batch": 4096, "sequence_layout": "packed",
    }  # fmt: skip

    def test_what_goes_into_a_dictionary_comes_out_of_it(self):
        args = config(**self.OPTIONS)
        saved = args.to_dict()
        assert {name: saved[name] for name in self.OPTIONS} == self.OPTIONS
        names = {field.name for field in fields(AtroposConfig) if field.init}
        again = AtroposConfig(**{name: value for name, value in saved.items() if name in names})
        assert {name: getattr(again, name) for name in declared_options()} == {
            name: getattr(args, name) for name in declared_options()
        }
        assert again.required_logprobs == args.required_logprobs

    def test_the_dictionary_is_json(self):
        assert json.loads(config(**self.OPTIONS).to_json_string())["advantage_clipping"] == [-5.0, 5.0]

    def test_the_api_key_does_not_leave(self):
        args = config(vllm_api_key="secret")
        assert args.to_dict()["vllm_api_key"] == "<VLLM_API_KEY>"
        assert "secret" not in args.to_json_string()
        assert args.vllm_api_key == "secret"


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

    def test_options_of_the_loss_and_of_the_forward_pass(self, tmp_path):
        args = self.parse(
            tmp_path,
            "loss_type: cispo\nepsilon_high: 5.0\nscale_rewards: batch\nsequence_layout: tree\n",
            "--max_tokens_per_micro_batch", "4096", "--entropy_coef", "-0.01", "--vllm_importance_sampling_clip_min", "0.5",
        )  # fmt: skip
        assert (args.loss_type, args.epsilon_high, args.scale_rewards) == ("cispo", 5.0, "batch")
        assert (args.sequence_layout, args.max_tokens_per_micro_batch) == ("tree", 4096)
        assert (args.entropy_coef, args.vllm_importance_sampling_clip_min) == (-0.01, 0.5)

    def test_a_bare_boolean_in_yaml_is_trls_other_spelling(self, tmp_path):
        assert self.parse(tmp_path, "scale_rewards: false\n").scale_rewards == "none"

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
    def test_the_quickstart_config_parses(self, tmp_path):
        args, model_args = TrlParser((AtroposConfig, ModelConfig)).parse_args_and_config(
            ["--config", str(QUICKSTART), "--output_dir", str(tmp_path)]
        )
        written = yaml.safe_load(QUICKSTART.read_text())
        assert list(args.advantage_clipping) == written["advantage_clipping"]
        assert args.max_steps == written["max_steps"]
        assert args.atropos_batch_size == written["per_device_train_batch_size"]
        assert model_args.model_name_or_path == written["model_name_or_path"]


def test_offloading_activations_of_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"activation_offloading is on.*on a CPU.*--gradient_checkpointing true"):
        AtroposConfig(output_dir=str(tmp_path), use_cpu=True, activation_offloading=True)


class TestSelectiveRecomputation:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"gradient_checkpointing": False}, r"gradient_checkpointing is off.*--gradient_checkpointing true"),
            ({"torch_compile": True}, "torch_compile is on.*--recompute_granularity full"),
            ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "sets use_reentrant.*every_n_layers acts"),
            (
                {"gradient_checkpointing_kwargs": {"preserve_rng_state": False, "offload": True, "every_n_layers": 2}},
                r"sets offload, preserve_rng_state\.",
            ),
        ],
    )
    def test_what_it_does_not_go_with_is_refused_by_name(self, tmp_path, options, named):
        with pytest.raises(ValueError, match=f"recompute_granularity is selective and .*{named}"):
            AtroposConfig(
                output_dir=str(tmp_path), use_cpu=True, report_to="none", recompute_granularity="selective", **options
            )

    def test_under_zero_3_it_is_refused(self, tmp_path):
        # transformers knows of ZeRO-3 for as long as the object lives.
        config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
        assert config.is_zero3()
        with pytest.raises(ValueError, match=r"deepspeed \(ZeRO-3\) is on.*--recompute_granularity full"):
            AtroposConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", recompute_granularity="selective")

    def test_every_nth_layer_goes_with_it_and_an_unknown_granularity_is_refused(self, tmp_path):
        kwargs = {"every_n_layers": 2, "use_reentrant": False}
        options = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "report_to": "none",
            "gradient_checkpointing_kwargs": kwargs,
        }
        assert AtroposConfig(recompute_granularity="selective", **options).gradient_checkpointing
        with pytest.raises(ValueError, match=r"recompute_granularity is 'some'\. Choose one of: full, selective"):
            AtroposConfig(recompute_granularity="some", **options)


class TestParallelism:
    """Built, not launched: there is one process."""

    def make(self, tmp_path: Path, parallelism: ParallelismConfig | None = None, **options: Any) -> AtroposConfig:
        return AtroposConfig(output_dir=str(tmp_path), use_cpu=True, parallelism_config=parallelism, **options)

    def test_tensor_parallel_ranks_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"has 2 tensor-parallel and 1 context-parallel .*counted several times"):
            self.make(tmp_path, ParallelismConfig(tp_size=2))

    def test_so_are_those_that_only_the_launcher_names(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
        with pytest.raises(ValueError, match=r"has 2 tensor-parallel"):
            self.make(tmp_path)

    def test_sequence_parallel_ranks_must_fill_the_processes(self, tmp_path):
        with pytest.raises(ValueError, match=r"sp_size is 2 .*there are 1 processes"):
            self.make(tmp_path, ParallelismConfig(sp_size=2, sp_backend="deepspeed"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size is 2 and 2 ranks share .*--per_device_train_batch_size 1"),
            ({"max_tokens_per_micro_batch": 4096}, r"max_tokens_per_micro_batch is 4096 and 2 ranks share"),
            ({"sequence_layout": "tree"}, r"sequence_layout is tree and 2 ranks share .*--sequence_layout padded"),
        ],
    )  # fmt: skip
    def test_a_micro_batch_of_sequence_parallel_ranks_is_one_row(self, tmp_path, monkeypatch, options, message):
        monkeypatch.setattr(AtroposConfig, "world_size", 4)
        options = {"per_device_train_batch_size": 1, **options}
        with pytest.raises(ValueError, match=message):
            self.make(tmp_path, ParallelismConfig(sp_size=2, dp_shard_size=2, sp_backend="deepspeed"), **options)

    def test_sequence_parallel_ranks_train_one_share_of_the_batch(self, tmp_path, monkeypatch):
        monkeypatch.setattr(AtroposConfig, "world_size", 4)
        parallelism = ParallelismConfig(sp_size=2, dp_shard_size=2, sp_backend="deepspeed")
        args = self.make(tmp_path, parallelism, per_device_train_batch_size=1, gradient_accumulation_steps=8)
        assert args.atropos_batch_size == 16
