"""Rotary frequencies do not depend on the neighbours of a rollout, and are those of vLLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scoring_cases import plan, tiny
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from trl_atropos.errors import PreflightError
from trl_atropos.policy.load import prepare_policy
from trl_atropos.policy.options import PolicyOptions
from trl_atropos.policy.rotary import longrope_boundary, pin_rotary_frequencies


BOUNDARY = 16
LONG = 48
SHORT_FACTOR, LONG_FACTOR = [1.0] * 4, [4.0, 6.0, 8.0, 12.0]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def phi3(model_class: type[PreTrainedModel] = Phi3ForCausalLM, boundary: int = BOUNDARY) -> PreTrainedModel:
    return tiny(
        model_class, Phi3Config, rope_parameters={**LONGROPE, "original_max_position_embeddings": boundary}, max_position_embeddings=128, sliding_window=None,
        original_max_position_embeddings=boundary,
    )  # fmt: skip


def gemma3() -> PreTrainedModel:
    """Each kind of layers has its own frequencies."""
    rope_parameters = {
        "full_attention": DYNAMIC,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return tiny(
        Gemma3ForCausalLM, Gemma3TextConfig, rope_parameters=rope_parameters, max_position_embeddings=BOUNDARY, head_dim=8,
        sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


MODELS = {
    "longrope": phi3,
    "dynamic": lambda: tiny(LlamaForCausalLM, LlamaConfig, rope_parameters=DYNAMIC, max_position_embeddings=BOUNDARY),
    "dynamic, of some layers": gemma3,
}


def logprobs(model: PreTrainedModel, *lengths: int) -> Tensor:
    """Of the first of several rows that are padded to the longest one."""
    rows = torch.randint(3, 60, (len(lengths), LONG), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor(lengths)
    input_ids = rows[:, : int(ends.max())]
    mask = (torch.arange(input_ids.shape[1]) < ends[:, None]).long()
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return logits[0, : lengths[0]].log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_a_rollout_scores_the_same_beside_a_long_one(name):
    model = MODELS[name]()
    distance = (logprobs(model, 8) - logprobs(model, 8, LONG)).abs().mean()
    assert distance > 5e-4, "transformers has mended it: what is tested here may go"
    pin_rotary_frequencies(model, LONG)
    torch.testing.assert_close(logprobs(model, 8), logprobs(model, 8, LONG), rtol=0, atol=1e-5)
    # Neither do frequencies stay that an earlier long row left.
    torch.testing.assert_close(logprobs(model, 8), logprobs(MODELS[name]() if name == "dynamic" else model, 8))


@pytest.mark.parametrize(("max_length", "factor"), [(BOUNDARY, SHORT_FACTOR), (BOUNDARY + 1, LONG_FACTOR)])
def test_longrope_has_the_frequencies_of_vllm(max_length, factor):
    # As `Phi3LongRoPEScaledRotaryEmbedding` of vLLM, which decides by max_model_len.
    model = phi3()
    logprobs(model, LONG)
    pin_rotary_frequencies(model, max_length)
    expected = 1.0 / (torch.tensor(factor) * 10000.0 ** (torch.arange(0, 8, 2) / 8))
    logprobs(model, 8, LONG)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_a_model_is_pinned_when_it_is_prepared_and_so_is_its_reference():
    prepared = prepare_policy(
        phi3(), PolicyOptions(), object(), None, needs_reference=True, sequence_parallel_size=1, max_length=LONG
    )
    for model in (prepared.model, prepared.reference_model):
        torch.testing.assert_close(logprobs(model, 8), logprobs(model, 8, LONG), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "boundary"),
    [(phi3, BOUNDARY), (gemma3, None), (lambda: tiny(LlamaForCausalLM, LlamaConfig), None)],
    ids=["longrope", "others", "default"],
)
def test_the_boundary_of_longrope_is_in_the_config(model, boundary):
    assert longrope_boundary(model().config) == boundary


class RemotePhi3(Phi3ForCausalLM):
    """What `trust_remote_code` may load: a model whose frequencies nobody here knows how to pin."""


def test_a_model_of_others_that_follows_the_longest_row_is_refused():
    model = phi3(RemotePhi3, boundary=2 * BOUNDARY)
    # Up to the boundary, there is nothing to see.
    plan(model, max_length=2 * BOUNDARY)
    with pytest.raises(PreflightError, match="Short rollouts get other logprobs beside one of 48 tokens"):
        plan(model, max_length=LONG)
    pin_rotary_frequencies(model, LONG)
    plan(model, max_length=LONG)


def test_a_trainer_pins_before_it_publishes_and_scores(tmp_path: Any):
    from trl_atropos import AtroposConfig, AtroposTrainer

    args = AtroposConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=LONG)
    trainer = AtroposTrainer(phi3(), args)
    torch.testing.assert_close(logprobs(trainer.model, 8), logprobs(trainer.model, 8, LONG), rtol=0, atol=1e-5)
