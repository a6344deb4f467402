"""docs/losses.md against the code: it names every loss and option, its table is true, and its example runs."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import loss_inputs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_atropos.loss.loss_types import AGGREGATIONS, LOSS_TYPES
from trl_atropos.loss.losses import LossInputs, policy_loss, token_weights
from trl_atropos.loss.options import CORRECTION_MODES, LossOptions, StepOptions
from trl_atropos.trainer.atropos_config import AtroposConfig
from trl_atropos.types import Rollout, RolloutOrigin


PAGE = Path(__file__).resolve().parents[3] / "docs" / "losses.md"
TEXT = PAGE.read_text()
CONFIG_FIELDS = [field.name for field in fields(AtroposConfig)]
LOSS_FIELDS = [
    *(field.name for field in fields(StepOptions)),
    *("temperature", "max_tokens_per_micro_batch", "sequence_layout", "activation_offloading"),
]
VOCAB_SIZE = 16


def section(title: str) -> str:
    """What stands under a heading of the second level."""
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def anchors() -> set[str]:
    """As GitHub makes them from headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def options_table() -> dict[str, dict[str, str]]:
    """Option -> loss_type -> what the page says."""
    lines = re.findall(r"^\| (.+) \|$", section("Which option acts with which loss"), re.MULTILINE)
    header, *rows = [line.replace("`", "").split(" | ") for line in lines]
    return {row[0].lstrip("-").split()[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_has_a_screen(loss_type):
    text = section(loss_type)
    assert "```math" in text
    for part in ("Deviations:", "Acts:", "Choose it"):
        assert part in text, part
    # TRL's bnpo has no paper, and the page says so.
    assert re.search(r"\]\(https://(huggingface\.co/papers|doi\.org)/", text) or "there is no paper" in text
    assert text.count("\n") < 40


@pytest.mark.parametrize("name", [*LOSS_FIELDS, *CORRECTION_MODES, *LOSS_TYPES])
def test_every_option_and_choice_is_named(name):
    assert re.search(rf"`(--)?{name}\b", TEXT)


def test_every_option_of_the_losses_is_one_of_the_config():
    assert {field.name for field in fields(LossOptions)} <= set(LOSS_FIELDS)


def test_every_option_that_the_page_names_exists():
    named = set(re.findall(r"--(\w+)", TEXT))
    assert named
    assert named <= set(CONFIG_FIELDS)


def test_every_link_inside_of_the_repository_leads_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", TEXT)
    assert links
    known = anchors()
    for link in links:
        path, _, anchor = link.partition("#")
        assert (PAGE.parent / path).exists(), link
        assert not anchor or anchor in known, link


def off_policy_inputs() -> LossInputs:
    """Two rollouts with ratios of 0.5 to 2 and advantages of both signs, different in each token."""
    ratios = [0.5, 0.9, 1.15, 1.9, 2.0, 0.7, 1.25, 1.05]
    return loss_inputs(
        [-1.0] * 8,
        [1.0, -1.0, 0.5, -2.0, 1.5, -0.5, 2.0, -1.5],
        [-1.0 - math.log(ratio) for ratio in ratios],
        lengths=[5, 3],
        ref_logprobs=[-1.5, -0.5, -1.2, -0.8, -2.0, -0.3, -1.1, -0.9],
    )


def gradient(options: LossOptions) -> torch.Tensor:
    inputs = off_policy_inputs()
    policy_loss(inputs, options).token_losses.sum().backward()
    assert inputs.trainer_logprobs.grad is not None
    return inputs.trainer_logprobs.grad


def base_options(loss_type: str, **options: Any) -> LossOptions:
    return LossOptions(loss_type=loss_type, **{**({"epsilon_high": 1.2} if loss_type == "cispo" else {}), **options})


# Another value than in `base_options`, which the ratios of `off_policy_inputs` must notice.
OTHER_VALUES: dict[str, Any] = {
    "epsilon": 0.02,
    "epsilon_high": 0.6,
    "delta": 1.3,
    "importance_sampling_level": "sequence",
    "sapo_temperature_pos": 2.0,
    "sapo_temperature_neg": 2.0,
    "vespo_k_pos": 0.5,
    "vespo_lambda_pos": 0.5,
    "vespo_k_neg": 0.5,
    "vespo_lambda_neg": 0.5,
    "beta": 0.3,
    "use_bias_correction_kl": False,
    "off_policy_mask_threshold": 0.01,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 1.1,
    "vllm_importance_sampling_clip_min": 0.8,
}
# With a bound that some of the ratios exceed.
CORRECTED: dict[str, Any] = {
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "token_mask",
    "vllm_importance_sampling_clip_max": 1.5,
}
# Options that do nothing alone.
WITH_OTHERS: dict[str, dict[str, Any]] = {
    "vllm_importance_sampling_mode": CORRECTED,
    "vllm_importance_sampling_clip_max": CORRECTED,
    "vllm_importance_sampling_clip_min": CORRECTED,
    "use_bias_correction_kl": {"beta": 0.3},
    # `vespo` takes none of the modes for whole rollouts, and its ratio is the product of the weights that no bound changes.
    "vllm_importance_sampling_correction": {**CORRECTED, "vllm_importance_sampling_correction": False},
}


def test_the_table_has_every_option_and_every_loss():
    table = options_table()
    assert set(table) == {*OTHER_VALUES, "max_completion_length"}
    assert {field.name for field in fields(LossOptions)} - {"loss_type"} == set(OTHER_VALUES)
    assert all(list(row) == list(LOSS_TYPES) for row in table.values())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("option", OTHER_VALUES)
def test_an_option_does_what_the_table_says(option, loss_type):
    says = options_table()[option][loss_type]
    without = base_options(loss_type, **WITH_OTHERS.get(option, {}))
    if says == "refused":
        with pytest.raises(ValueError, match=option):
            replace(without, **{option: OTHER_VALUES[option]})
        return
    if says == "needed":
        with pytest.raises(ValueError, match=option):
            LossOptions(loss_type=loss_type)
    changed = not torch.allclose(gradient(without), gradient(replace(without, **{option: OTHER_VALUES[option]})))
    assert changed is {"acts": True, "needed": True, "-": False}[says]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_max_completion_length_does_what_the_table_says(loss_type, tmp_path):
    options: dict[str, Any] = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    options |= {"output_dir": str(tmp_path), "loss_type": loss_type, "max_completion_length": 7}

    def weights(max_completion_length: int) -> torch.Tensor:
        counts = {"num_trained_tokens": 3, "num_rollouts": 2, "max_completion_length": max_completion_length}
        return token_weights(torch.tensor([0, 0, 1]), torch.tensor([2, 1]), AGGREGATIONS[loss_type], **counts)

    acts = options_table()["max_completion_length"][loss_type] == "acts"
    assert acts is not torch.equal(weights(7), weights(9))
    if acts:
        assert AtroposConfig(**options).max_completion_length == 7
    else:
        with pytest.raises(ValueError, match="max_completion_length"):
            AtroposConfig(**options)


# Where the option is accepted; cispo's cap lies above 1.
SURROGATE_BOUNDS = [
    (option, loss_type)
    for option in ("epsilon", "epsilon_high", "delta", "sapo_temperature_pos", "sapo_temperature_neg")
    for loss_type in LOSS_TYPES
    if options_table()[option][loss_type] in ("acts", "needed")
]


@pytest.mark.parametrize(("option", "loss_type"), SURROGATE_BOUNDS)
def test_with_the_correction_no_bound_of_the_surrogate_changes_the_gradient(option, loss_type):
    without = base_options(loss_type, **CORRECTED)
    value = 2.0 if (option, loss_type) == ("epsilon_high", "cispo") else OTHER_VALUES[option]
    torch.testing.assert_close(gradient(replace(without, **{option: value})), gradient(without))


def save_model(path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes)).save_pretrained(path)
    vocabulary = {"<pad>": 0, **{f"w{token}": token for token in range(1, VOCAB_SIZE)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>").save_pretrained(path)


def test_your_own_loss_trains_as_the_page_says(tmp_path, monkeypatch):
    (example,) = re.findall(r"^```python\n(.*?)^```", section("Your own loss"), re.DOTALL | re.MULTILINE)
    save_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "own_loss"}
    exec(compile(example, "docs/losses.md", "exec"), namespace)
    trainer = namespace["trainer"]

    # A good rollout with three trained tokens, a bad one with two.
    advantages, prompt = [2.0, -1.0], [3, 5]
    completions = [[7, 2, 9], [4, 8]]
    rollouts = [
        Rollout(
            input_ids=torch.tensor(prompt + completion),
            labels=torch.tensor([-100, -100, *completion]),
            reward=0.0,
            advantages=torch.full((2 + len(completion),), advantage),
            origin=RolloutOrigin(env_id=0, group=0, rollout=number),
        )
        for number, (completion, advantage) in enumerate(zip(completions, advantages, strict=True))
    ]
    ((micro_batch,),), num_items = trainer.get_batch_samples(iter([[rollouts]]), 1, torch.device("cpu"))
    trainer.training_step(trainer.model, [micro_batch], num_items)

    # weighted_sft divides by the trained tokens of the step, also those of the bad rollout: 5.
    model = LlamaForCausalLM.from_pretrained(tmp_path / "my-model", dtype=torch.float32)
    log_softmax = model(input_ids=torch.tensor([prompt + completions[0]])).logits[0, 1:-1].log_softmax(-1)
    logprobs = log_softmax.gather(-1, torch.tensor(completions[0])[:, None]).squeeze(-1)
    (-(1 - logprobs.detach().exp()) * 2.0 * logprobs).sum().div(5).backward()
    for (name, parameter), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=name)
    metrics = trainer._metrics.reduce()
    # Three of five tokens.
    assert metrics["good_tokens_frac"] == pytest.approx(0.6)
    assert 0.0 < metrics["doubt"] < 1.0
