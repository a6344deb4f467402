"""Our losses against TRL's own: loss, gradient and metrics of `GRPOTrainer._compute_loss` on the same rollouts.

The rollouts go through TRL's public `rollout_func` and its real `_generate_and_score_completions`, which makes the
advantages, the reference logprobs and the weights of the importance sampling correction. `GRPOConfig` gets the fields of
[`LossOptions`] under their own names.

Compared at one split: all rollouts in one micro-batch of one process. Several of TRL's denominators (bnpo: trained
tokens of the micro-batch) depend on the split; ours do not, see test_split_invariance.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_atropos.loss.loss_types import AGGREGATIONS, CLIPPED_LOSS_TYPES
from trl_atropos.loss.losses import LossInputs, policy_loss, token_weights
from trl_atropos.loss.metrics import MetricAccumulator
from trl_atropos.loss.options import LossOptions


VOCAB_SIZE = 32
MAX_COMPLETION_LENGTH = 16
NUM_GENERATIONS = 4
PROMPT_LENGTHS = [3, 3, 3, 3, 5, 5, 5, 5]
COMPLETION_LENGTHS = [3, 2, 6, 3, 4, 4, 3, 5]
REWARDS = [1.0, 0.0, 0.5, 0.0, -1.0, 2.0, 0.25, 0.0]
# Tokens of an environment inside a completion (rollout 2: tokens 2 and 3), and a rollout with nothing to train.
ENVIRONMENT_TOKENS = {2: range(2, 4), 6: range(3)}
# The server gave no logprob for this token of a rollout.
UNKNOWN_LOGPROBS = {0: 2, 5: 0}


def corrected(mode: str, loss_type: str, **options: Any) -> LossOptions:
    """With bounds that some of the weights of [`sample`] exceed."""
    bounds = {"vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": 1.4}
    return LossOptions(
        loss_type=loss_type,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        **{**bounds, **options},
    )


# The ratio of a rollout is a mean over tokens and nearer to 1.
SEQUENCE_RATIO = {"importance_sampling_level": "sequence", "epsilon": 0.05}
CASES = {
    "grpo": LossOptions(loss_type="grpo"),
    "dr_grpo": LossOptions(loss_type="dr_grpo"),
    "bnpo": LossOptions(loss_type="bnpo"),
    "dapo": LossOptions(loss_type="dapo"),
    "dapo-epsilon": LossOptions(loss_type="dapo", epsilon=0.1, epsilon_high=0.4),
    "cispo": LossOptions(loss_type="cispo", epsilon_high=1.2),
    "sapo": LossOptions(loss_type="sapo"),
    "sapo-temperatures": LossOptions(loss_type="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=3.0),
    "luspo": LossOptions(loss_type="luspo"),
    "vespo": LossOptions(loss_type="vespo"),
    "vespo-weights-beta": LossOptions(
        loss_type="vespo", vespo_k_pos=1.0, vespo_lambda_pos=0.5, vespo_k_neg=0.5, vespo_lambda_neg=4.0, beta=0.3
    ),
    "vespo-off_policy_mask": LossOptions(loss_type="vespo", off_policy_mask_threshold=0.02),
    "grpo-sequence": LossOptions(loss_type="grpo", **SEQUENCE_RATIO),
    "luspo-sequence": LossOptions(loss_type="luspo", **SEQUENCE_RATIO),
    "dapo-sequence": LossOptions(loss_type="dapo", **SEQUENCE_RATIO),
    "cispo-sequence": LossOptions(loss_type="cispo", epsilon_high=1.02, importance_sampling_level="sequence"),
    "sapo-sequence": LossOptions(loss_type="sapo", importance_sampling_level="sequence"),
    "grpo-delta": LossOptions(loss_type="grpo", delta=1.3),
    "luspo-delta": LossOptions(loss_type="luspo", delta=1.3),
    "dapo-beta": LossOptions(loss_type="dapo", beta=0.3),
    "dapo-beta-plain": LossOptions(loss_type="dapo", beta=0.3, use_bias_correction_kl=False),
    "dr_grpo-beta": LossOptions(loss_type="dr_grpo", beta=0.3),
    "cispo-beta": LossOptions(loss_type="cispo", epsilon_high=1.2, beta=0.3),
    "luspo-sequence-beta": LossOptions(loss_type="luspo", **SEQUENCE_RATIO, beta=0.3),
    "grpo-off_policy_mask": LossOptions(loss_type="grpo", off_policy_mask_threshold=0.02),
    "dapo-off_policy_mask-beta": LossOptions(loss_type="dapo", off_policy_mask_threshold=0.02, beta=0.3),
}
CORRECTED_CASES = {
    "dapo-token_truncate": corrected("token_truncate", "dapo"),
    "dapo-token_mask": corrected("token_mask", "dapo"),
    "dapo-sequence_truncate": corrected("sequence_truncate", "dapo"),
    "dapo-sequence_mask": corrected("sequence_mask", "dapo"),
    "grpo-token_truncate-upper": corrected("token_truncate", "grpo", vllm_importance_sampling_clip_min=None),
    "grpo-sequence-token_mask": corrected("token_mask", "grpo", importance_sampling_level="sequence"),
    "dr_grpo-sequence_mask": corrected("sequence_mask", "dr_grpo"),
    "luspo-token_mask": corrected("token_mask", "luspo"),
    "vespo-token_truncate": corrected("token_truncate", "vespo"),
    "vespo-token_mask": corrected("token_mask", "vespo"),
    "cispo-token_truncate": corrected("token_truncate", "cispo", epsilon_high=5.0),
    "sapo-sequence_truncate": corrected("sequence_truncate", "sapo"),
    "bnpo-token_mask-off_policy_mask-beta": corrected("token_mask", "bnpo", off_policy_mask_threshold=0.02, beta=0.3),
}
ALL_CASES = {**CASES, **CORRECTED_CASES}

# The model is in float64; TRL takes the log-softmax in float32 nevertheless.
RELATIVE_ERROR = 1e-6
# The weight of a rollout is the exponential of a sum over its tokens, which makes that rounding larger, on some processors.
VESPO_RELATIVE_ERROR = 4e-6


@dataclass(frozen=True)
class Result:
    """Loss, gradient of all parameters as one vector, and metrics."""

    loss: float
    gradient: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class SampledRollouts:
    """What TRL's `rollout_func` returns, a list entry for each rollout."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float | None]]
    env_mask: list[list[int]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference policy. TRL loads it by its path when beta is not 0."""
    # Logits that differ between tokens, where the default range leaves all tokens nearly equally likely.
    model = tiny_llama(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("reference")
    model.save_pretrained(path)
    return path


@pytest.fixture
def model(checkpoint: Path) -> LlamaForCausalLM:
    """The policy: the reference, moved."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, VOCAB_SIZE)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )


def padded_logprobs_and_entropy(model: LlamaForCausalLM, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of the completions, (B, C), with the plain formulas."""
    input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    first = inputs["prompt_ids"].shape[1] - 1
    log_softmax = logits[:, first:-1].log_softmax(dim=-1)
    logprobs = log_softmax.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return logprobs, -(log_softmax.exp() * log_softmax).sum(dim=-1)


@torch.no_grad()
def sample(model: LlamaForCausalLM) -> SampledRollouts:
    """Random tokens, as if sampled by a policy whose logprobs differ from the current one's by some tenths."""
    generator = torch.Generator().manual_seed(2)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, VOCAB_SIZE, (count,), generator=generator).tolist()

    group_prompts = [tokens(length) for length in PROMPT_LENGTHS[::NUM_GENERATIONS]]
    prompt_ids = [group_prompts[index // NUM_GENERATIONS] for index in range(len(PROMPT_LENGTHS))]
    completion_ids = [tokens(length) for length in COMPLETION_LENGTHS]
    logprobs: list[list[float | None]] = []
    env_mask = []
    for index, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        log_softmax = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(dim=-1)
        trainer_logprobs = log_softmax[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        noise = 0.35 * torch.randn(len(completion), generator=generator)
        logprobs.append((trainer_logprobs + noise).clamp(max=0.0).tolist())
        if index in UNKNOWN_LOGPROBS:
            logprobs[-1][UNKNOWN_LOGPROBS[index]] = None
        outside = ENVIRONMENT_TOKENS.get(index, range(0))
        env_mask.append([int(position not in outside) for position in range(len(completion))])
    return SampledRollouts(prompt_ids, completion_ids, logprobs, env_mask)


@pytest.fixture
def make_trainer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[LossOptions], GRPOTrainer]:
    """Builds TRL's trainer with the policy and the options, on rollouts of [`sample`]."""
    # rollout_func is marked as experimental.
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    rollouts = sample(model)

    def make(options: LossOptions) -> GRPOTrainer:
        args = GRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=len(PROMPT_LENGTHS),
            num_generations=NUM_GENERATIONS,
            max_completion_length=MAX_COMPLETION_LENGTH,
            temperature=1.0,
            **asdict(options),
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda prompts, completions, **columns: REWARDS,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["w2"] * len(PROMPT_LENGTHS)}),
            processing_class=tokenizer,
            rollout_func=lambda prompts, trainer: asdict(rollouts),
        )
        model.train()
        # transformers' training loop sets it.
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        # Of the correction, only these two need to know of a server: the flag, and whether it has the weights of step 0.
        trainer.use_vllm = options.vllm_importance_sampling_correction
        trainer._last_loaded_step = trainer.state.global_step
        return trainer

    return make


def generate(trainer: GRPOTrainer) -> dict[str, Tensor]:
    """TRL's training batch. Without the correction, the surrogate's ratio is given the policy that sampled."""
    inputs = trainer._generate_and_score_completions([{"prompt": "w2"} for _ in PROMPT_LENGTHS])
    if not trainer.use_vllm:
        with torch.no_grad():
            trainer_logprobs, _ = padded_logprobs_and_entropy(trainer.model, inputs)
        sampling_logprobs = inputs["sampling_per_token_logps"]
        # TRL does not expect unknown logprobs here. Ours counts such a token as sampled by the current policy.
        inputs["old_per_token_logps"] = torch.where(sampling_logprobs.isnan(), trainer_logprobs, sampling_logprobs)
    return inputs


def trained_mask(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["completion_mask"] * inputs["tool_mask"]).bool()


def flat_gradient(model: LlamaForCausalLM) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def result_of_trl(trainer: GRPOTrainer, inputs: dict[str, Tensor]) -> Result:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Result(loss.item(), flat_gradient(trainer.model), metrics)


def result_of_ours(model: LlamaForCausalLM, inputs: dict[str, Tensor], options: LossOptions) -> Result:
    model.zero_grad()
    is_trained = trained_mask(inputs)
    rollout_index, _ = is_trained.nonzero(as_tuple=True)
    trainer_logprobs, entropy = padded_logprobs_and_entropy(model, inputs)
    outputs = policy_loss(
        LossInputs(
            trainer_logprobs=trainer_logprobs[is_trained],
            advantages=inputs["advantages"][rollout_index],
            entropy=entropy[is_trained],
            rollout_index=rollout_index,
            num_rollouts=len(is_trained),
            inference_logprobs=inputs["sampling_per_token_logps"][is_trained],
            ref_logprobs=inputs["ref_per_token_logps"][is_trained] if options.beta else None,
        ),
        options,
    )
    weights = token_weights(
        rollout_index,
        is_trained.sum(dim=1),
        AGGREGATIONS[options.loss_type],
        num_trained_tokens=int(is_trained.sum()),
        num_rollouts=len(is_trained),
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    loss = (outputs.token_losses * weights).sum()
    loss.backward()
    metrics = MetricAccumulator()
    metrics.update(outputs.metrics)
    return Result(loss.item(), flat_gradient(model), metrics.reduce())


def same_metrics(options: LossOptions) -> set[str]:
    """What both report and mean alike.

    Of a sequence ratio, TRL counts clipped rollouts, we count tokens. TRL's importance_sampling_ratio is the one after
    truncation and masking, ours the one before.
    """
    names = {"entropy"}
    if options.beta:
        names.add("kl")
    if options.vllm_importance_sampling_correction:
        names |= {"sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}
    if options.loss_type in CLIPPED_LOSS_TYPES:
        names |= {"clip_ratio/low_min", "clip_ratio/high_max"}
    if options.importance_sampling_level == "token":
        if options.loss_type in CLIPPED_LOSS_TYPES:
            names |= {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
        if options.loss_type == "cispo":
            names.add("cispo_clip_ratio")
    return names


def relative_difference(left: Tensor, right: Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.parametrize("name", ALL_CASES)
def test_loss_gradient_and_metrics_are_those_of_trl(name, make_trainer):
    options = ALL_CASES[name]
    trainer = make_trainer(options)
    inputs = generate(trainer)
    theirs = result_of_trl(trainer, inputs)
    ours = result_of_ours(trainer.model, inputs, options)

    error = VESPO_RELATIVE_ERROR if options.loss_type == "vespo" else RELATIVE_ERROR
    assert ours.loss == pytest.approx(theirs.loss, rel=error, abs=error)
    assert relative_difference(ours.gradient, theirs.gradient) < error
    names = same_metrics(options)
    assert {name: ours.metrics[name] for name in names} == pytest.approx(
        {name: theirs.metrics[name] for name in names}, rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("name", CORRECTED_CASES)
def test_correction_weights_are_those_of_trl_and_some_exceed_the_bounds(name, make_trainer):
    options = CORRECTED_CASES[name]
    trainer = make_trainer(options)
    inputs = generate(trainer)
    is_trained = trained_mask(inputs)
    weights = inputs["importance_sampling_ratio"].expand(is_trained.shape)[is_trained]
    bounds = {options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max} - {None}
    if options.vllm_importance_sampling_mode.endswith("mask"):
        is_outside = weights == 0
    else:
        # Every bound is reached.
        assert all((weights == bound).any() for bound in bounds)
        is_outside = torch.stack([weights == bound for bound in bounds]).any(dim=0)
    assert 0 < is_outside.sum() < len(weights)

    metrics = result_of_ours(trainer.model, inputs, options).metrics
    assert metrics["sampling/correction_weight/mean"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert metrics["sampling/correction_weight/zero_frac"] == pytest.approx((weights == 0).float().mean().item())


def options_of_cases() -> list[tuple[str, str]]:
    """Every option of every case that is not at its default."""
    return [
        (name, field.name)
        for name, options in ALL_CASES.items()
        for field in fields(options)
        # cispo has no default for epsilon_high.
        if getattr(options, field.name) != field.default
        and field.name != "loss_type"
        and (options.loss_type, field.name) != ("cispo", "epsilon_high")
        # vespo refuses the default mode of the correction.
        and (options.loss_type, field.name) != ("vespo", "vllm_importance_sampling_mode")
    ]


@pytest.mark.parametrize(("name", "option"), options_of_cases())
def test_each_option_of_a_case_moves_the_gradient(name, option, make_trainer):
    # Otherwise the comparison above would pass without it.
    options = ALL_CASES[name]
    trainer = make_trainer(options)
    inputs = generate(trainer)
    default = next(field.default for field in fields(options) if field.name == option)
    with_option = result_of_ours(trainer.model, inputs, options)
    without = result_of_ours(trainer.model, inputs, replace(options, **{option: default}))
    assert relative_difference(without.gradient, with_option.gradient) > 1000 * RELATIVE_ERROR


def test_names_and_defaults_of_the_options_are_those_of_trl():
    theirs = {field.name: field.default for field in fields(GRPOConfig)}
    ours = {field.name: field.default for field in fields(LossOptions)}
    assert ours.keys() <= theirs.keys()
    # TRL acts on it only with use_vllm, which is off by default.
    assert {name for name in ours if ours[name] != theirs[name]} == {"vllm_importance_sampling_correction"}
