"""AtroposSFTTrainer under verl, on one and two ranks, against AtroposTrainer on the same groups.

verl lives in an environment of its own: these run where `TRL_ATROPOS_VERL_PYTHON` names its Python (`make test-verl`), and are
skipped by that name elsewhere.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from launching import case, launch, needs_verl
from tiny_models import byte_tokenizer, tiny_llama

from trl_atropos import AtroposConfig, AtroposTrainer
from trl_atropos.cli.launch.summary import read_training_log


pytestmark = needs_verl

BATCH_SIZE = 16
VOCAB_SIZE = 320

# Options of either trainer, by name. Every loss, and what changes advantages, logprobs and denominators.
OPTIONS: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "luspo": {"loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "sequence-ratio": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "correction": {"loss_type": "dapo", "vllm_importance_sampling_correction": True},
    "seed": {"loss_type": "weighted_sft", "advantage_normalization": "global", "advantage_clipping": [-1.0, 1.0]},
    "leave-one-out": {"loss_type": "dapo", "advantage_baseline": "leave_one_out", "scale_rewards": "batch"},
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
    "entropy": {"loss_type": "dapo", "entropy_coef": 0.1},
    "reference": {"loss_type": "dapo", "beta": 0.5, "ref_logprobs": "require"},
}

# How verl cuts the rows of a rank.
CUTS = {
    "micro-batches of 2": ["data.micro_batch_size_per_gpu=2"],
    "micro-batches of 8": ["data.micro_batch_size_per_gpu=8"],
    "packed by tokens": [
        *("model.use_remove_padding=true", "data.use_dynamic_bsz=true", "data.max_token_len_per_gpu=24"),
    ],
}
CUT = ("seed", "grpo")


def write_groups(path: Path, sizes: list[int], seed: int) -> Path:
    """Groups of a few short rollouts with all that a loss may read."""
    rng = random.Random(seed)
    lines = []
    for size in sizes:
        prompt = [rng.randrange(256) for _ in range(rng.randint(2, 5))]
        completions = [[rng.randrange(256) for _ in range(rng.randint(1, 9))] for _ in range(size)]

        def column(completions=completions, prompt=prompt) -> list[list[float]]:
            return [[1.0] * len(prompt) + [-rng.uniform(5, 6.5) for _ in ids] for ids in completions]

        group = {
            "tokens": [prompt + ids for ids in completions],
            "masks": [[-100] * len(prompt) + ids for ids in completions],
            "scores": [rng.uniform(-1, 1) for _ in completions],
            "inference_logprobs": column(),
            "ref_logprobs": column(),
        }
        lines.append(json.dumps(group) + "\n")
    path.write_text("".join(lines))
    return path


class Inputs:
    """A checkpoint, and recorded groups: `two_steps`, and one step that leaves the second of two ranks without any."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.model = directory / "model"
        model = tiny_llama(seed=0, tied=True, vocab_size=VOCAB_SIZE, initializer_range=0.1, max_position_embeddings=64)
        model.save_pretrained(self.model)
        byte_tokenizer().save_pretrained(self.model)
        self.two_steps = write_groups(directory / "two_steps.jsonl", [4] * 8, seed=0)
        self.small_step = write_groups(directory / "small_step.jsonl", [4, 4], seed=1)

    def case(self, name: str, action: str, data: Path, *overrides: str, **options: Any) -> dict[str, Any]:
        """A run of launched_trainer.py on recorded groups."""
        output_dir = self.directory / "runs" / name.replace(" ", "-").replace(",", "")
        recorded = (f"data.atropos.data_path={data}", f"data.train_batch_size={BATCH_SIZE}")
        return case(name, action, self.model, output_dir, *recorded, *overrides, **options)

    def expected(self, data: Path, **options: Any) -> list[dict[str, float]]:
        """What AtroposTrainer logs of its steps."""
        args = AtroposConfig(
            output_dir=str(self.directory / "expected"),
            data_path=str(data),
            per_device_train_batch_size=BATCH_SIZE,
            max_length=32,
            learning_rate=1e-3,
            max_grad_norm=1e9,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        trainer = AtroposTrainer(str(self.model), args)
        trainer.train()
        return [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("verl"))


@pytest.fixture(scope="module")
def one_rank(inputs: Inputs) -> dict[str, Any]:
    cases = [inputs.case(name, "train", inputs.two_steps, **options) for name, options in OPTIONS.items()]
    cases += [
        inputs.case(f"{name}, {cut}", "train", inputs.two_steps, *overrides, **OPTIONS[name])
        for name in CUT
        for cut, overrides in CUTS.items()
    ]
    cases += [
        inputs.case("small step", "train", inputs.small_step, loss_type="grpo"),
        inputs.case("seed loss", "seed_loss", inputs.two_steps, loss_type="weighted_sft"),
        inputs.case("seed keys", "train", inputs.two_steps, "use_advantage_weighting=true"),
        inputs.case("diverge", "diverge", inputs.two_steps, loss_type="grpo"),
        inputs.case("resume", "resume", inputs.two_steps, "trainer.save_freq=1", loss_type="grpo"),
    ]
    return launch(1, cases, inputs.directory)


@pytest.fixture(scope="module")
def two_ranks(inputs: Inputs) -> dict[str, Any]:
    cases = [
        inputs.case(f"{name}, {cut}", "train", inputs.two_steps, *overrides, **OPTIONS[name])
        for name in CUT
        for cut, overrides in CUTS.items()
    ]
    cases += [
        inputs.case("small step", "train", inputs.small_step, loss_type="grpo"),
        inputs.case("entropy", "train", inputs.two_steps, **OPTIONS["entropy"]),
        inputs.case("seed loss", "seed_loss", inputs.two_steps, loss_type="weighted_sft"),
        inputs.case("diverge", "diverge", inputs.two_steps, loss_type="grpo"),
        inputs.case("resume", "resume", inputs.two_steps, "trainer.save_freq=1", loss_type="grpo"),
    ]
    return launch(2, cases, inputs.directory)


def assert_same_steps(result: dict[str, Any], expected: list[dict[str, float]]) -> None:
    assert len(result["steps"]) == len(expected)
    # After the first step of Adam, a gradient that is 0 but for rounding has moved a weight.
    for step, other, tolerance in zip(result["steps"], expected, (1e-6, 1e-5), strict=False):
        assert step["loss"] == pytest.approx(other["loss"], rel=tolerance, abs=tolerance)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=tolerance)
        assert step["num_trained_tokens"] == other["num_trained_tokens"] > 0
        assert step["reward"] == pytest.approx(other["reward"])


@pytest.mark.parametrize("name", list(OPTIONS))
def test_steps_are_those_of_atropos_trainer(name: str, inputs: Inputs, one_rank: dict[str, Any]):
    assert_same_steps(one_rank[name], inputs.expected(inputs.two_steps, **OPTIONS[name]))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("cut", list(CUTS))
@pytest.mark.parametrize("name", CUT)
def test_any_cut_gives_the_same_step(name: str, cut: str, num_ranks: int, request: pytest.FixtureRequest):
    results = request.getfixturevalue("one_rank" if num_ranks == 1 else "two_ranks")
    assert_same_steps(results[f"{name}, {cut}"], request.getfixturevalue("one_rank")[name]["steps"])


def test_the_log_is_where_a_launch_reads_it(one_rank: dict[str, Any], inputs: Inputs):
    entries = read_training_log(inputs.directory / "runs" / "grpo")
    assert [entry["step"] for entry in entries] == [1, 2]
    assert [entry["loss"] for entry in entries] == [step["loss"] for step in one_rank["grpo"]["steps"]]


def test_a_rank_without_rollouts_takes_part(one_rank: dict[str, Any], two_ranks: dict[str, Any], inputs: Inputs):
    expected = inputs.expected(inputs.small_step, loss_type="grpo")
    assert_same_steps(one_rank["small step"], expected)
    assert_same_steps(two_ranks["small step"], expected)


def test_the_entropy_bonus_counts_the_tokens_of_all_ranks(one_rank: dict[str, Any], two_ranks: dict[str, Any]):
    assert_same_steps(two_ranks["entropy"], one_rank["entropy"]["steps"])
    assert two_ranks["entropy"]["steps"][0]["entropy"] == pytest.approx(one_rank["entropy"]["steps"][0]["entropy"])


def test_keys_of_the_seed_choose_its_loss(one_rank: dict[str, Any], inputs: Inputs):
    assert_same_steps(one_rank["seed keys"], inputs.expected(inputs.two_steps, loss_type="weighted_sft"))


@pytest.mark.parametrize("num_ranks", ["one_rank", "two_ranks"])
def test_the_seeds_interface_is_its_closed_form(num_ranks: str, request: pytest.FixtureRequest):
    result = request.getfixturevalue(num_ranks)["seed loss"]
    for name in ("loss", "grad_norm"):
        found, expected = result[name]
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_ranks", ["one_rank", "two_ranks"])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(num_ranks: str, request: pytest.FixtureRequest):
    result = request.getfixturevalue(num_ranks)["diverge"]
    assert result["error"].startswith("The loss of step 1 is not finite, because of")
    assert result["change"] == 0


@pytest.mark.parametrize("num_ranks", ["one_rank", "two_ranks"])
def test_a_resumed_run_goes_on_where_the_checkpoint_was(num_ranks: str, request: pytest.FixtureRequest):
    result = request.getfixturevalue(num_ranks)["resume"]
    assert len(result["straight"]) == 2
    assert_same_steps({"steps": result["resumed"]}, result["straight"][1:])
    assert result["resumed"][0]["num_rollouts_trained"] == 2 * BATCH_SIZE
