"""Tiny models for the unit tests of scoring, and what their scores must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from trl_atropos.data.micro_batches import RolloutCollator
from trl_atropos.policy.plan import plan_forward
from trl_atropos.policy.scoring import ForwardPlan, PolicyScorer
from trl_atropos.types import Rollout, RolloutOrigin


VOCAB_SIZE = 64
MAX_LENGTH = 64
CPU = torch.device("cpu")
# Large initial weights: a token that sees what it must not moves by more than rounding.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(
    model_class: type[PreTrainedModel],
    config_class: type[PretrainedConfig],
    attn_implementation: str = "sdpa",
    **options: Any,
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(**{**TINY, **options})
    model = model_class._from_config(config, attn_implementation=attn_implementation)
    # Biases and norms start at 0 and 1, where an error in them would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# Layers that carry a state from token to token.
RECURRENT: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lfm2": (Lfm2ForCausalLM, Lfm2Config, {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
    "falcon_h1": (FalconH1ForCausalLM, FalconH1Config,
                  {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
                   "lm_head_multiplier": 0.5}),
    "bamba": (BambaForCausalLM, BambaConfig,
              {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
               "mamba_chunk_size": 8}),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig,
                {"head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
                 "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}),
}  # fmt: skip


def recurrent(name: str, attn_implementation: str = "sdpa") -> PreTrainedModel:
    model_class, config_class, options = RECURRENT[name]
    return tiny(model_class, config_class, attn_implementation, **options)


def tiny_llama(attn_implementation: str = "sdpa", **options: Any) -> PreTrainedModel:
    return tiny(LlamaForCausalLM, LlamaConfig, attn_implementation, **options)


def plan(model: nn.Module, requested: str = "auto", **options: Any) -> ForwardPlan:
    defaults = {"wrapped": model, "max_length": MAX_LENGTH, "dtype": torch.float32, "device": CPU}
    return plan_forward(model, requested=requested, **{**defaults, **options})


def rollouts() -> list[Rollout]:
    """Two groups whose rollouts share a prompt and part at different tokens; two train equal tokens."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for group, lengths in enumerate([(40, 25, 33), (12, 12)]):
        shared = torch.randint(VOCAB_SIZE, (10,), generator=generator)
        for number, length in enumerate(lengths):
            input_ids = torch.randint(VOCAB_SIZE, (length,), generator=generator)
            input_ids[: 10 - number] = shared[: 10 - number]
            labels = input_ids.masked_fill(torch.arange(length) < 5, -100)
            made.append(
                Rollout(
                    input_ids=input_ids,
                    labels=labels,
                    reward=0.0,
                    advantages=torch.ones(length),
                    temperature=0.7 if group else 1.0,
                    origin=RolloutOrigin(0, group, number),
                )
            )
    return made


def own_logprobs(wrapped: nn.Module, made: Sequence[Rollout]) -> Tensor:
    """The model's own logits for each rollout alone, without any of our code; rollout after rollout."""
    logprobs = []
    for rollout in made:
        logits = wrapped(input_ids=rollout.input_ids[None], use_cache=False).logits[0, :-1].float()
        of_tokens = (logits / rollout.temperature).log_softmax(-1).gather(-1, rollout.input_ids[1:, None])[:, 0]
        logprobs.append(of_tokens[rollout.labels[1:] != -100])
    return torch.cat(logprobs)


def scored_logprobs(
    model: nn.Module,
    forward_plan: ForwardPlan,
    wrapped: nn.Module | None = None,
    autocast: Callable[[], Any] = nullcontext,
) -> Tensor:
    scorer = PolicyScorer(model, forward_plan, autocast)
    shares = scorer.shares_between_groups
    batch = RolloutCollator(forward_plan.layout, temperature=1.0, shares_between_groups=shares)(rollouts())
    scores, tie = scorer(wrapped or model, batch)
    assert tie.item() == 0.0
    return scores.logprobs[batch["token_index"]]


def assert_scores_are_the_models_own(model: nn.Module, forward_plan: ForwardPlan, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        expected = own_logprobs(model, rollouts())
        torch.testing.assert_close(scored_logprobs(model, forward_plan), expected, rtol=0, atol=tolerance)
